"""The one seam of modulation: per-token thresholds in, modulated activations out, through hooks.

Knows a model's sites and a mask. Knows nothing of requests, levels by name, or who sets thresholds.

The arithmetic (docs/method.md): per layer, token t and neuron i with rank r_i in its set, factor g_i
and threshold n_t, a'[t, i] = a[t, i] * (g_i if r_i < n_t else 1.0). Only the mask's neurons ever
change; at (0, 0) they are multiplied by exactly 1.0, or, on CUDA, left alone. Any mix of thresholds costs
the same.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modulation import fused
from modulation.errors import ModulationError
from modulation.levels import Threshold
from modulation.masks import Mask
from modulation.sites import Site, find_sites

_SAFETY, _UTILITY = 0, 1
# The most factors of a site, one a token and neuron: up to here multiplying all of its activations is faster
# than taking out the mask's neurons and putting them back (docs/measurements.md).
_MOST_WIDENED: Final = 32_768


class Modulator:
    """A mask laid out for one model. While entered (`with`), every forward pass is modulated.

    Set `thresholds` before a forward pass: int (tokens, 2) of (num_safety, num_utility), one row per
    token of the pass in row-major order, or (1, 2) for all of them. A forward pass without thresholds
    raises; it never runs unmodulated. `fingerprint` is that of the model's weights; None: they are in `model`
    itself.

    Raises, from the constructor:
        MaskMismatchError: the mask was made for another model.
        UnsupportedModelError: the model's family has no known sites.
    """

    def __init__(self, model: PreTrainedModel, mask: Mask, fingerprint: str | None = None) -> None:
        mask.verify(model, fingerprint)
        self.model = model
        self._sites = [site for site in find_sites(model) if _neurons_in(mask, site.layer)]
        self._hooks = ExitStack()
        self._entered = False
        # What the next pass does to the activations of a site, by its number.
        self._change: Callable[[int, Tensor], Tensor] | None = None
        self._unseen: set[str] = set()
        device = next(model.parameters()).device
        self._columns: list[Tensor] = []  # by site
        self._sizes: list[int] = []
        kinds: list[int] = []
        ranks: list[int] = []
        factors: list[float] = []
        for site in self._sites:
            members = _neurons_in(mask, site.layer)
            kinds += [kind for kind, _, _, _ in members]
            ranks += [rank for _, rank, _, _ in members]
            factors += [factor for _, _, factor, _ in members]
            weight = site.module.weight
            assert isinstance(weight, Tensor)
            self._columns.append(torch.tensor([i for *_, i in members], device=weight.device))
            self._sizes.append(len(members))
        # One entry per neuron of the mask, all layers together: (neurons,)
        self._kinds = torch.tensor(kinds, dtype=torch.int64, device=device)
        self._ranks = torch.tensor(ranks, dtype=torch.int32, device=device)
        self._factors = torch.tensor(factors, dtype=torch.float32, device=device)
        self._ones = torch.ones((), dtype=torch.float32, device=device)
        self._is_fused = all(fused.is_available(each.device) for each in self._columns)
        self._widths = [site.width for site in self._sites]
        self._wide_columns = self._standing_in_a_row(device)
        # Where each of these neurons stands among all, safety set first, by rank.
        places = [rank + kind * len(mask.safety) for kind, rank in zip(kinds, ranks, strict=True)]
        self._places = torch.tensor(places, dtype=torch.int64, device=device)

    def _standing_in_a_row(self, device: torch.device) -> Tensor | None:
        """Where the mask's neurons stand if those of all sites are in a row: int (neurons,). None: not all is
        float32 on the CPU, where alone multiplying them all is known to be faster."""
        weights: list[Any] = [site.module.weight for site in self._sites]
        if not weights or {device, *(each.device for each in weights)} != {torch.device("cpu")}:
            return None
        if any(each.dtype != torch.float32 for each in weights):
            return None
        begins = itertools.accumulate(self._widths, initial=0)
        return torch.cat([each + begin for each, begin in zip(self._columns, begins, strict=False)])

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose inputs are modulated, one per site."""
        return [site.module for site in self._sites]

    def use_factors(self, factors: Tensor) -> None:
        """From now on, multiply by these factors instead of the mask's: float32 (neurons,), the safety
        set first, by rank. Gradients flow through them."""
        assert factors.shape == self._factors.shape, (factors.shape, self._factors.shape)
        self._factors = factors.to(self._factors.device)[self._places]

    def set_thresholds(self, thresholds: Tensor) -> None:
        """Set what the next forward pass applies: int (tokens, 2), or (1, 2) for every token."""
        assert thresholds.ndim == 2 and thresholds.shape[1] == 2, thresholds.shape
        self.check()
        self._unseen = {site.name for site in self._sites}
        self._change = self._chosen(thresholds)

    def _chosen(self, thresholds: Tensor) -> Callable[[int, Tensor], Tensor]:
        if torch.is_grad_enabled():
            return self._gathered(thresholds)
        if self._is_fused:
            return self._fused(thresholds)
        most = _MOST_WIDENED * len(self._sites)  # together: their widths may differ
        if self._wide_columns is not None and len(thresholds) * sum(self._widths) <= most:
            return self._widened(thresholds, self._wide_columns)
        return self._gathered(thresholds)

    def _scale(self, thresholds: Tensor) -> Tensor:
        """What each neuron of the mask is multiplied by: float32 (tokens, neurons)."""
        limits = thresholds.index_select(1, self._kinds)
        return torch.where(self._ranks < limits, self._factors, self._ones)

    def _gathered(self, thresholds: Tensor) -> Callable[[int, Tensor], Tensor]:
        scales = torch.split(self._scale(thresholds), self._sizes, dim=1)
        return lambda number, activations: _scaled(activations, self._columns[number], scales[number])

    def _widened(self, thresholds: Tensor, columns: Tensor) -> Callable[[int, Tensor], Tensor]:
        whole = self._ones.expand(len(thresholds), sum(self._widths))
        scales = torch.split(whole.index_copy(1, columns, self._scale(thresholds)), self._widths, dim=1)

        def change(number: int, activations: Tensor) -> Tensor:
            scale = _per_token(scales[number], activations)
            if torch.is_grad_enabled():
                return (activations * scale).to(activations.dtype)
            return activations.mul_(scale)

        return change

    def _fused(self, thresholds: Tensor) -> Callable[[int, Tensor], Tensor]:
        thresholds = thresholds.to(torch.int32).contiguous()
        kinds, ranks, factors = (
            torch.split(each, self._sizes) for each in (self._kinds, self._ranks, self._factors)
        )

        def change(number: int, activations: Tensor) -> Tensor:
            _check_tokens(thresholds, activations)
            if torch.is_grad_enabled():
                return self._gathered(thresholds)(number, activations)
            neurons = self._columns[number], kinds[number], ranks[number], factors[number]
            return fused.scale_in_place(activations.contiguous(), *neurons, thresholds)

        return change

    def check(self) -> None:
        """Raise ModulationError if the last forward pass went past a site.

        A model whose code does not call its projection as a module (a fused kernel, say) has hooks
        that never fire; it would run unmodulated.
        """
        if self._unseen:
            raise ModulationError(
                f"The last forward pass did not go through {sorted(self._unseen)[0]} and "
                f"{len(self._unseen) - 1} more sites: this model's code bypasses the hooks, so it "
                "cannot be modulated."
            )

    def __enter__(self) -> Self:
        assert not self._entered, "a modulator is entered once at a time"
        self._entered = True
        self._unseen = set()
        with ExitStack() as hooks:
            for number, site in enumerate(self._sites):
                hooks.callback(site.module.register_forward_pre_hook(self._hook(number, site)).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._change = None
        self._entered = False

    @contextmanager
    def applied(self, threshold: Threshold | Sequence[Threshold]) -> Iterator[PreTrainedModel]:
        """Modulate every forward pass and `generate` of the model within the block.

        One threshold applies to every row of the batch; a sequence gives one per row. The hooks come
        off when the block ends, however it ends.

        Raises, from a forward pass:
            ModulationError: the batch has another number of rows.
        """
        rows = [threshold] if isinstance(threshold, Threshold) else list(threshold)
        per_row = torch.tensor(
            [(row.num_safety, row.num_utility) for row in rows],
            dtype=torch.int32,
            device=self._ranks.device,
        )

        def expand(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            tokens = arguments[0] if arguments else keywords.get("input_ids")
            if tokens is None:
                tokens = keywords["inputs_embeds"][..., 0]
            if len(rows) not in (1, tokens.shape[0]):
                raise ModulationError(
                    f"{len(rows)} thresholds were given, but the batch has {tokens.shape[0]} rows."
                )
            one_for_all = len(rows) == 1
            self.set_thresholds(per_row if one_for_all else per_row.repeat_interleave(tokens.shape[1], dim=0))

        with ExitStack() as stack:
            stack.enter_context(self)
            stack.callback(self.model.register_forward_pre_hook(expand, with_kwargs=True).remove)
            yield self.model
            self.check()

    def _hook(self, number: int, site: Site) -> Any:
        name = site.name

        def modulate(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            change = self._change
            if change is None:
                raise ModulationError(
                    f"No thresholds were set for this forward pass (layer {site.layer}); refusing to "
                    "run it unmodulated."
                )
            self._unseen.discard(name)
            if not self._unseen:
                self._change = None  # used up: the next pass needs thresholds of its own
            return (change(number, arguments[0]), *arguments[1:])

        return modulate


def _scaled(activations: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """`activations` (..., width) with `columns` (neurons,) multiplied by `scale` (tokens or 1, neurons); in
    place where no gradient is wanted: they were made for the projection that takes them."""
    scale = _per_token(scale, activations)
    chosen = activations.index_select(-1, columns)
    modulated = (chosen * scale.to(chosen.device)).to(chosen.dtype)
    if torch.is_grad_enabled():
        return activations.index_copy(-1, columns, modulated)
    return activations.index_copy_(-1, columns, modulated)


def _per_token(scale: Tensor, activations: Tensor) -> Tensor:
    """`scale` (tokens or 1, neurons) for activations (..., width): (..., neurons), or as it is for all."""
    _check_tokens(scale, activations)
    return scale if scale.shape[0] == 1 else scale.view(*activations.shape[:-1], -1)


def _check_tokens(of_tokens: Tensor, activations: Tensor) -> None:
    given, wanted = of_tokens.shape[0], activations.shape[:-1].numel()
    if given not in (1, wanted):
        raise ModulationError(f"Thresholds for {given} tokens were set, but the forward pass has {wanted}.")


def _neurons_in(mask: Mask, layer: int) -> list[tuple[int, int, float, int]]:
    """The mask's neurons in one layer: (kind, rank, factor, index)."""
    return [
        (kind, rank, float(factor), int(index))
        for kind, neurons in ((_SAFETY, mask.safety), (_UTILITY, mask.utility))
        for rank, ((where, index), factor) in enumerate(zip(neurons.neurons, neurons.factors, strict=True))
        if where == layer
    ]


def modulated(
    model: PreTrainedModel, mask: Mask, threshold: Threshold | Sequence[Threshold]
) -> AbstractContextManager[PreTrainedModel]:
    """Modulate every forward pass and `generate` of `model` within a `with` block.

    Raises as `Modulator` and `Modulator.applied` do.
    """
    return Modulator(model, mask).applied(threshold)
