"""Where a model family keeps its layers and its MLP neurons: the input of each layer's MLP output
projection; and where hooks go if that projection is compiled.

Knows module paths of model families. Knows nothing of masks or of what is done at a site.
"""

from dataclasses import dataclass
from typing import Any, Final, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from modulation.errors import UnsupportedModelError

# The layers, and within a layer the MLP's output projection, by `config.model_type`. The neurons of
# a layer are the input channels of that projection. An entry is added together with its test.
_OUTPUT_PROJECTION: Final[dict[str, tuple[str, str]]] = {
    "falcon": ("transformer.h", "mlp.dense_4h_to_h"),
    "gemma2": ("model.layers", "mlp.down_proj"),
    "gemma3_text": ("model.layers", "mlp.down_proj"),
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "granite": ("model.layers", "mlp.down_proj"),
    "llama": ("model.layers", "mlp.down_proj"),
    "mistral": ("model.layers", "mlp.down_proj"),
    "olmo2": ("model.layers", "mlp.down_proj"),
    "opt": ("model.decoder.layers", "fc2"),
    "phi3": ("model.layers", "mlp.down_proj"),
    "qwen2": ("model.layers", "mlp.down_proj"),
    "qwen3": ("model.layers", "mlp.down_proj"),
    "stablelm": ("model.layers", "mlp.down_proj"),
}

SUPPORTED_FAMILIES: Final = tuple(sorted(_OUTPUT_PROJECTION))

# Configuration fields by which mixture-of-experts families say how many experts they have.
_EXPERT_COUNTS: Final = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_moe_experts",
)

_HOOK_POINT: Final = "_hook_point"


@dataclass(frozen=True, slots=True)
class Site:
    """One layer's neurons: the input of `module`, a tensor (..., tokens, width).

    `layer` counts from 0; `name` is the module's path in the model.
    """

    layer: int
    name: str
    module: nn.Module
    width: int


class HookPoint(nn.Module):
    """Stands for a site whose model's own code cannot take hooks that come and go, since it is compiled: the
    site's input passes through, and the hooks are on this module.

    From now on `find_sites` gives it as the site's module.
    """

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.__dict__["weight"] = projection.weight  # it has no parameters of its own

    @classmethod
    def put_on(cls, site: Site) -> Self:
        """Make one for a site."""
        point = cls(site.module)
        site.module.__dict__[_HOOK_POINT] = point  # not as a submodule: the model is what it was
        return point

    def forward(self, activations: Tensor) -> Tensor:
        """The activations as they are."""
        return activations


def find_sites(model: PreTrainedModel) -> list[Site]:
    """The sites of `model`, layer 0 first.

    Raises:
        UnsupportedModelError: a family that is not in the table, or a mixture of experts.
    """
    layers_path, projection_path = _paths(model)
    return [
        _site(index, f"{layers_path}.{index}.{projection_path}", layer.get_submodule(projection_path))
        for index, layer in enumerate(find_layers(model))
    ]


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of `model`, one a site and in the sites' order: each gives the residual stream after it,
    a tensor (..., tokens, hidden), alone or as the first of a tuple.

    Raises as `find_sites` does.
    """
    layers_path, projection_path = _paths(model)
    try:
        layers = list(model.get_submodule(layers_path).children())
        for layer in layers:
            layer.get_submodule(projection_path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"Model class {type(model).__name__} of family {model.config.model_type!r} has no module "
            f"{layers_path}.*.{projection_path} ({error}): load it as a causal language model."
        ) from error
    if not layers:
        raise UnsupportedModelError(f"Model class {type(model).__name__} has no layers at {layers_path}.")
    return layers


def _paths(model: PreTrainedModel) -> tuple[str, str]:
    return find_paths(model.config)


def find_paths(config: Any) -> tuple[str, str]:
    """The path of a model's layers, and within a layer that of the projection, by the model's configuration.

    Raises as `find_sites` does.
    """
    family = str(config.model_type)
    supported = f"Supported model families: {', '.join(SUPPORTED_FAMILIES)}."
    for field in _EXPERT_COUNTS:
        count = getattr(config, field, None)
        if isinstance(count, int) and count > 1:
            raise UnsupportedModelError(
                f"Model family {family!r} is a mixture of experts ({field}={count}); its neurons "
                f"are not addressed by (layer, index). {supported}"
            )
    if family not in _OUTPUT_PROJECTION:
        raise UnsupportedModelError(
            f"Model family {family!r} is not known: nothing says where its MLP neurons are. {supported}"
        )
    return _OUTPUT_PROJECTION[family]


def input_dimension(module: nn.Module) -> int:
    """Which dimension of the projection's weight runs over neurons.

    1 for a linear layer (out, in); 0 for GPT-2's `Conv1D`, which stores (in, out).
    """
    return 0 if type(module).__name__ == "Conv1D" else 1


def _site(layer: int, name: str, module: nn.Module) -> Site:
    weight = module.weight
    assert isinstance(weight, nn.Parameter), (name, type(weight))
    width = int(weight.shape[input_dimension(module)])
    return Site(layer=layer, name=name, module=module.__dict__.get(_HOOK_POINT, module), width=width)
