"""A model's forward pass compiled (torch.compile): what the model does between attention and the sites of
modulation runs in a few fused kernels, not in hundreds of small ones.

Knows a model's forward pass, its sites, and which function attends. Knows nothing of masks or requests.

What depends on who is in a step is not compiled. Attention to the paged cache is an operation that the
compiled pass calls, and so is each site: there a module that stands for it is called, which takes hooks as
the model's own does where it is not compiled. So hooks come and go, and nothing is compiled anew.
"""

import functools
import inspect
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from modulation.errors import ModelError
from modulation.sites import HookPoint, find_sites
from server.engines.attention import refuse_unknown

NAME: Final = "in_compiled_pass"
"""What the model's attention is called while it is compiled."""

Attend = Callable[..., tuple[Tensor, None]]

# What the pass that this thread runs calls: its `at_site` and its `attend`. An operation of torch's is the
# same for all models of a process, so this cannot be kept anywhere but here; between passes it is empty.
_running = threading.local()


@torch.library.custom_op("neurontune::at_site", mutates_args=("activations",))
def _at_site(activations: Tensor, layer: int) -> None:
    _running.at_site(activations, layer)


@torch.library.custom_op("neurontune::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float | None) -> Tensor:
    answers: Tensor = _running.attend(query, key, value, layer, scaling)
    return answers


@_attend.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, _layer: int, _scaling: float | None) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _attend_in_pass(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the manager builds none for attention by request
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    refuse_unknown(arguments)
    answers: Tensor = torch.ops.neurontune.attend(query, key, value, module.layer_idx, scaling)
    return answers, None


AttentionInterface.register(NAME, _attend_in_pass)


def refuse_without_compiler() -> None:
    """Raise ModelError where there is no C++ compiler: torch.compile needs one, also beside a GPU."""
    wanted = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(wanted) is None:
        raise ModelError(
            f"--compile needs a C++ compiler, and there is no {wanted}: install one (Debian: "
            "apt-get install g++), name another in CXX, or leave --compile out."
        )


class CompiledForward:
    """The forward pass of `model`, from now on compiled, at its first steps, for as many threads as torch has
    there: a step on another number of them would be compiled anew.

    It runs only as a step of continuous batching, with `attend` set to the function that attends. Masks are
    laid out for the model after this, since they hook what stands for its sites.

    Raises:
        ModelError: there is no compiler.
        UnsupportedModelError: the model's family has no known sites.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_without_compiler()
        self.attend: Attend | None = None
        self._points = [HookPoint.put_on(site) for site in find_sites(model)]
        for layer, site in enumerate(find_sites(model)):
            projection = model.get_submodule(site.name)
            projection.register_forward_pre_hook(functools.partial(_change, layer))
        forward = model.forward
        named = inspect.signature(forward).parameters.values()
        self._named = {each.name for each in named if each.kind is not each.VAR_KEYWORD}
        self._compiled = torch.compile(forward, dynamic=True, fullgraph=True)

        @functools.wraps(forward)
        def compiled(**step: Any) -> Any:
            return self._run(step)

        model.forward = compiled

    def _run(self, step: dict[str, Any]) -> Any:
        """A step: the model gets what its pass names, attention the rest."""
        kept = step.get("logits_to_keep")
        if isinstance(kept, Tensor):
            # Part of a larger tensor, but not where a prompt is scored; the compiler tells those apart.
            step["logits_to_keep"] = kept.clone()
        of_attention = {name: each for name, each in step.items() if name not in self._named}
        with self._runs(of_attention):
            return self._compiled(**{name: each for name, each in step.items() if name in self._named})

    @contextmanager
    def _runs(self, of_attention: dict[str, Any]) -> Iterator[None]:
        attend = self.attend
        assert attend is not None, "the manager says how to attend"

        def attend_at(q: Tensor, k: Tensor, v: Tensor, layer: int, scaling: float | None) -> Tensor:
            return attend(SimpleNamespace(layer_idx=layer), q, k, v, None, scaling, **of_attention)[0]

        _running.at_site, _running.attend = self._at_site, attend_at
        try:
            yield
        finally:
            del _running.at_site, _running.attend

    def _at_site(self, activations: Tensor, layer: int) -> None:
        changed = self._points[layer](activations)
        if changed is not activations:
            activations.copy_(changed)


def _change(layer: int, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
    torch.ops.neurontune.at_site(arguments[0], layer)
