"""Robustness: what is left of safety when somebody prunes the neurons that carry it.

Knows sites, rankings and figures. Knows nothing of files, printing or how neurons were ranked.

The attack (arXiv 2602.12158) has the weights: it removes the top neurons of the safety set for everybody, at
every token. A pruned neuron is 0, and 0 times any factor is 0, so no level brings it back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modulation.errors import DataError, ModulationError
from modulation.evaluation.answering import transformers_answerer
from modulation.evaluation.data import Record
from modulation.evaluation.figures import figures_at
from modulation.evaluation.judges import Judge, by_rule
from modulation.evaluation.quality import Figures
from modulation.evaluation.report import percent
from modulation.levels import SafetyLevel
from modulation.masks import Mask
from modulation.modulator import Modulator
from modulation.sites import Site, find_sites

SAFETY: Final = "safety"
_WHOLE_PASS: Final = "the model"

Neurons = npt.NDArray[np.int32]
"""Ranked neurons, (n, 2) of (layer, index): the first ones are pruned first."""


class PrunedFigures(TypedDict):
    """The figures of one level with the first `num_pruned` neurons of the ranking `pruned` at 0."""

    level: str
    pruned: str
    num_pruned: int
    figures: Figures


@contextmanager
def pruned(model: PreTrainedModel, neurons: Neurons) -> Iterator[None]:
    """Hold the activations of `neurons` at 0 in every forward pass of the block, modulated or not.

    The same as setting their columns of the output projections to 0, without touching the weights.
    The hooks come off when the block ends, however it ends.

    Raises:
        ModulationError: a neuron that the model does not have, or a forward pass that went past a site.
    """
    sites = find_sites(model)
    columns = _columns(sites, neurons)
    passed: set[str] = set()
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(lambda *_: passed.add(_WHOLE_PASS)).remove)
        for site in sites:
            if len(columns[site.layer]):
                hook = _pruning_hook(site, columns[site.layer], passed)
                hooks.callback(site.module.register_forward_pre_hook(hook).remove)
        yield
        missed = [site.name for site in sites if len(columns[site.layer]) and site.name not in passed]
        if _WHOLE_PASS in passed and missed:
            raise ModulationError(
                f"The forward passes did not go through {missed[0]} and {len(missed) - 1} more sites: this "
                "model's code bypasses the hooks, so its neurons cannot be pruned."
            )


def safety_ranking(mask: Mask, scores: npt.ArrayLike | None = None) -> Neurons:
    """The mask's safety set. With scores (layers, neurons), higher is more, all neurons outside both sets
    follow, best first, so that more than the set can be pruned."""
    if scores is None:
        return mask.safety.neurons
    flat, others = np.asarray(scores, np.float64).ravel(), _outside(mask)
    num_neurons = mask.metadata.num_layers * mask.metadata.neurons_per_layer
    assert flat.size == num_neurons, (flat.size, num_neurons)
    following = others[np.argsort(-flat[others], kind="stable")]
    return np.concatenate([mask.safety.neurons, _positions(mask, following)])


def random_ranking(mask: Mask, seed: int) -> Neurons:
    """The control: neurons outside both sets, drawn by the seed; each of the first ones from the layer of the
    safety neuron of its rank, so that layers do not explain a difference; then all that are left."""
    drawn = np.random.default_rng(seed).permutation(_outside(mask)).tolist()
    by_layer: dict[int, list[int]] = {}
    for neuron in reversed(drawn):
        by_layer.setdefault(neuron // mask.metadata.neurons_per_layer, []).append(neuron)
    layers = mask.safety.neurons[:, 0].tolist()
    matched = [by_layer[layer].pop() for layer in layers if by_layer.get(layer)]
    taken = set(matched)
    return _positions(mask, np.array([*matched, *(each for each in drawn if each not in taken)], np.int64))


def read_counts(text: str, size: int) -> list[int]:
    """Counts separated by commas, in ascending order, each once: whole numbers of neurons, or shares of the
    safety set of `size` neurons such as `25%`, rounded up. Raises DataError."""
    return sorted({_read_count(each.strip(), size) for each in text.split(",")})


def check_counts(counts: Sequence[int], rankings: Mapping[str, Neurons]) -> None:
    """Raise DataError for a count beyond the end of a ranking."""
    for name, ranking in rankings.items():
        for count in counts:
            if not 0 <= count <= len(ranking):
                raise DataError(
                    f"{count} neurons cannot be pruned: the ranking {name!r} holds {len(ranking)}; "
                    f"accepted: 0 to {len(ranking)}."
                )


def pruned_metrics(
    modulator: Modulator,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    levels: Sequence[SafetyLevel],
    counts: Sequence[int],
    rankings: Mapping[str, Neurons],
    judge: Judge = by_rule,
    max_new_tokens: int = 64,
    on_answered: Callable[[int], object] | None = None,
) -> list[PrunedFigures]:
    """The figures of `records` at each level, with the first neurons of each ranking pruned, greedy.

    One entry a level, ranking and count, in this order. Nothing pruned is measured once a level and
    stands under every ranking. `on_answered` is told after each batch how many prompts it held; there are
    `num_measured` passes over all prompts. Raises DataError for a count beyond a ranking's end.
    """
    check_counts(counts, rankings)
    model = modulator.model
    answer = transformers_answerer(model, tokenizer, max_new_tokens, on_answered=on_answered)

    def measured(level: SafetyLevel, neurons: Neurons) -> Figures:
        with pruned(model, neurons):
            return figures_at(modulator, tokenizer, records, level.threshold, answer, judge)[0]

    found: list[PrunedFigures] = []
    for level in levels:
        whole = measured(level, np.empty((0, 2), np.int32)) if 0 in counts else Figures()
        for name, ranking in rankings.items():
            for count in counts:
                figures = measured(level, ranking[:count]) if count else whole
                found.append(PrunedFigures(level=level.name, pruned=name, num_pruned=count, figures=figures))
    return found


def num_measured(num_levels: int, counts: Sequence[int], num_rankings: int) -> int:
    """How many times `pruned_metrics` answers all prompts."""
    return num_levels * (sum(count > 0 for count in counts) * num_rankings + (0 in counts))


def pruning_table(points: Sequence[PrunedFigures], metric: str) -> str:
    """A Markdown table of one rate: a row a count of pruned neurons, a column a level and ranking."""
    columns = list(dict.fromkeys((point["level"], point["pruned"]) for point in points))
    cells: dict[tuple[str, str, int], str] = {}
    for point in points:
        rate: Any = point["figures"].get(metric)
        shown = f"{percent(rate['rate'])} ({rate['count']}/{rate['total']})" if rate else "-"
        cells[point["level"], point["pruned"], point["num_pruned"]] = shown
    lines = [
        "| neurons pruned | " + " | ".join(f"`{level}`, {name}" for level, name in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for count in dict.fromkeys(point["num_pruned"] for point in points):
        row = [cells.get((*column, count), "-") for column in columns]
        lines.append(f"| {count} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _pruning_hook(site: Site, columns: torch.Tensor, passed: set[str]) -> Callable[..., tuple[Any, ...]]:
    def prune(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        passed.add(site.name)
        return (arguments[0].index_fill(-1, columns, 0.0), *arguments[1:])

    return prune


def _columns(sites: Sequence[Site], neurons: Neurons) -> dict[int, torch.Tensor]:
    """Indices of the neurons by layer, on the device of the layer's weight."""
    for layer, index in neurons.tolist():
        if not (0 <= layer < len(sites) and 0 <= index < sites[layer].width):
            raise ModulationError(
                f"Neuron {index} of layer {layer} cannot be pruned: this model has layers 0-{len(sites) - 1} "
                f"of neurons 0-{sites[0].width - 1}. Use this model's own mask."
            )
    found = {}
    for site in sites:
        weight = site.module.weight
        assert isinstance(weight, torch.Tensor), type(weight)
        indices = np.unique(neurons[neurons[:, 0] == site.layer, 1]).astype(np.int64)
        found[site.layer] = torch.from_numpy(indices).to(weight.device)
    return found


def _outside(mask: Mask) -> npt.NDArray[np.int64]:
    """Flat indices of the neurons in neither set."""
    width = mask.metadata.neurons_per_layer
    members = np.concatenate([mask.safety.neurons, mask.utility.neurons]).astype(np.int64)
    return np.setdiff1d(np.arange(mask.metadata.num_layers * width), members[:, 0] * width + members[:, 1])


def _positions(mask: Mask, flat: npt.NDArray[np.int64]) -> Neurons:
    width = mask.metadata.neurons_per_layer
    return np.stack([flat // width, flat % width], axis=1).astype(np.int32)


def _read_count(text: str, size: int) -> int:
    digits = text.removesuffix("%")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise DataError(
            f"Count {text!r} of pruned neurons is not understood; accepted: whole numbers of neurons and "
            "shares of the safety set such as 25%, separated by commas."
        )
    return -(-int(digits) * size // 100) if text.endswith("%") else int(digits)
