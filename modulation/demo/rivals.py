"""What NeuronTune is compared with on the demo model: controls and rivals, each as good as `tune` makes it.

Knows the demo model, the method and its alternatives. Knows nothing of the `heldout` split: a row says how
it is put in force, and the comparison measures it. Every choice is made on the validation part of `tune`
by one rule (`modulation/rivals/choice.py`); what was chosen is then found anew on all of `tune`, as for
the mask that ships.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any, Final

from modulation.attribution.base import Scores
from modulation.attribution.methods import DEFAULT_METHOD, default_options, with_options
from modulation.attribution.selection import ranked_sets
from modulation.demo.masking import ACTIVE_SHARE, TUNING_PROMPTS_PER_TOPIC, Bench, examples, whole
from modulation.demo.splits import all_records, learning_records, validation_records
from modulation.evaluation.data import Record
from modulation.levels import BALANCED, SECURITY_CRITICAL, UTILITY_PRIORITY, Threshold
from modulation.masks import Mask, NeuronSet
from modulation.modulator import Modulator
from modulation.rivals.choice import best
from modulation.rivals.layer_scaling import LayerScaling, layers_scaled, scaling_settings
from modulation.rivals.screening import generation_measure, margin_screen
from modulation.rivals.steering import Steering, steered, steering_settings, steering_vectors
from modulation.tuning.drafting import counts, draft, top_neurons
from modulation.tuning.settings import TuningSettings

Applied = Callable[[], AbstractContextManager[Any]]

SHARES: Final = (0.0025, 0.005, 0.01, ACTIVE_SHARE)
SAFETY_FACTORS: Final = (2.0, 2.5, 3.0, 4.0)
UTILITY_FACTOR: Final = 0.5
STRENGTHS: Final = (0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
NUM_GENERATED: Final = 4
_SCREENED_SHARE: Final = 0.34

# Attribution methods at fixed factors; of attack_aware what amplifying does, since the factor is given.
FIXED_METHODS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "attack_aware, fixed factors": (
        "attack_aware",
        {
            **{"direction": "amplify", "utility": "complying", "cost": "absolute", "include_plain": False},
            **{"benign_weight": 0.7, "borderline_weight": 0.25, "text_weight": 0.0},
        },
    ),
    "contrast, fixed factors": ("contrast", {}),
    "contrastive_pairs, fixed factors": ("contrastive_pairs", {}),
    "set_difference (SNIP), fixed factors": ("set_difference", {"score": "snip"}),
    "set_difference (Wanda), fixed factors": ("set_difference", {"score": "wanda"}),
}


@dataclass(frozen=True)
class Row:
    """One row of the comparison. `prepare` does the work: it gives how the row is put in force, and what
    was chosen, in words."""

    name: str
    kind: str
    prepare: Callable[[], tuple[Applied, str]]


@dataclass(frozen=True)
class Fixed:
    """Neurons of both kinds, `share` of all neurons together, at one factor each."""

    share: float
    safety_factor: float


@dataclass(frozen=True)
class Rivals:
    """All rows beside one mask. The bench has the mask's seed, and `settings` are what it was tuned with."""

    bench: Bench
    ours: Mask
    settings: TuningSettings
    _fixed_choices: dict[str, Fixed] = field(default_factory=dict, init=False, repr=False)

    def rows(self) -> Iterator[Row]:
        """Ours first, controls, then rivals."""
        yield Row("no change", "base", lambda: (nullcontext, ""))
        for level in (SECURITY_CRITICAL, BALANCED, UTILITY_PRIORITY):
            yield Row(f"NeuronTune, {level}", "ours", lambda level=level: self._at_level(level))  # type: ignore[misc]
        yield Row("plain risk minimisation, all neurons", "control", self._by_risk)
        yield Row("NeuronTune, all neurons", "ours", lambda: self._at(self.ours, whole(self.ours)))
        yield Row("attributed neurons, not pruned", "control", self._not_pruned)
        yield Row("random neurons, learned factors", "control", self._random_learned)
        yield Row("random candidates, pruned", "control", self._random_pruned)
        yield Row("random neurons, our factors", "control", self._random_with_ours)
        yield Row("random neurons, fixed factors", "control", self._random_fixed)
        for name in FIXED_METHODS:
            yield Row(name, "rival", lambda name=name: self._fixed(name))  # type: ignore[misc]
        yield Row("steering vector", "rival", self._steering)
        yield Row("whole layers scaled", "rival", self._layers)

    def _at_level(self, level: str) -> tuple[Applied, str]:
        return self._at(self.ours, self.ours.levels.named[level])

    def _at(self, mask: Mask, threshold: Threshold) -> tuple[Applied, str]:
        modulator = Modulator(self.bench.model, mask)
        told = f"({threshold.num_safety}, {threshold.num_utility})"
        return (lambda: modulator.applied(threshold)), told

    def _learned(self, scores: Scores, **changes: object) -> tuple[Applied, str]:
        """Of neurons with these scores, learned (and pruned) on all of `tune` for as many steps as ours."""
        steps = int(self.ours.metadata.method["tuning"]["num_steps"])
        settings = self.settings.model_copy(update={"num_steps": steps, **changes})
        records = all_records(self.bench.seed, TUNING_PROMPTS_PER_TOPIC)
        drafted = self.bench.drafted(scores, settings)
        tuned = self.bench.tuned(drafted, settings, records, judged=False)
        return self._at(tuned, whole(tuned))

    def _unpruned(self, scores: Scores) -> tuple[Applied, str]:
        """Learned at once, for as many steps as pruning and learning have together."""
        steps = int(self.ours.metadata.method["tuning"]["num_steps"])
        steps += len(self.settings.prune_shares) * self.settings.prune_steps
        return self._learned(scores, prune_shares=(), num_steps=steps)

    def _by_risk(self) -> tuple[Applied, str]:
        return self._learned(self._attributed, method="erm")

    def _not_pruned(self) -> tuple[Applied, str]:
        return self._unpruned(self._attributed)

    def _random_learned(self) -> tuple[Applied, str]:
        return self._unpruned(self._random_scores(self.bench.seed))

    def _random_pruned(self) -> tuple[Applied, str]:
        return self._learned(self._random_scores(self.bench.seed))

    @cached_property
    def _attributed(self) -> Scores:
        """What ours was drafted from."""
        method = with_options(DEFAULT_METHOD, default_options(DEFAULT_METHOD))
        return self.bench.scores(method, all_records(self.bench.seed))

    def _random_fixed(self) -> tuple[Applied, str]:
        """At the counts and factors of `attack_aware, fixed factors`."""
        setting = self._chosen_fixed("attack_aware, fixed factors")
        scores = self._random_scores(100 + self.bench.seed)
        mask = self._mask(scores, setting.share, (setting.safety_factor, UTILITY_FACTOR))
        return self._at(mask, whole(mask))[0], str(setting)

    def _random_with_ours(self) -> tuple[Applied, str]:
        return self._at(with_random_neurons(self.bench, self.ours), self.ours.levels.named[SECURITY_CRITICAL])

    def _random_scores(self, seed: int) -> Scores:
        return _random_scores(self.bench, seed)

    def _mask(self, scores: Scores, share: float, factors: tuple[float, float]) -> Mask:
        neurons = top_neurons(scores, *counts(self.bench.model, share))
        return draft(self.bench.model, "neurontune-demo", *neurons, factors=factors)

    def _fixed(self, name: str) -> tuple[Applied, str]:
        setting = self._chosen_fixed(name)
        scores = self.bench.scores(self._method(name), all_records(self.bench.seed))
        mask = self._mask(scores, setting.share, (setting.safety_factor, UTILITY_FACTOR))
        return self._at(mask, whole(mask))[0], str(setting)

    def _method(self, name: str) -> Any:
        method, changes = FIXED_METHODS[name]
        return with_options(method, {**default_options(method), **changes})

    def _chosen_fixed(self, name: str) -> Fixed:
        if name not in self._fixed_choices:
            self._fixed_choices[name] = self._choose_fixed(name)
        return self._fixed_choices[name]

    def _choose_fixed(self, name: str) -> Fixed:
        scores = self.bench.scores(self._method(name), learning_records(self.bench.seed))

        def apply(setting: Fixed) -> AbstractContextManager[Any]:
            mask = self._mask(scores, setting.share, (setting.safety_factor, UTILITY_FACTOR))
            return Modulator(self.bench.model, mask).applied(whole(mask))

        possible = [share for share in SHARES if self._has_enough(scores, share)]
        chosen: Fixed = self._best([Fixed(*each) for each in product(possible, SAFETY_FACTORS)], apply)
        return chosen

    def _has_enough(self, scores: Scores, share: float) -> bool:
        num_safety, num_utility = counts(self.bench.model, share)
        safety, utility = ranked_sets(scores, num_safety, num_utility)
        return len(safety) == num_safety and len(utility) == num_utility

    def _steering(self) -> tuple[Applied, str]:
        model = self.bench.model
        trial = self._vectors(learning_records(self.bench.seed))
        setting: Steering = self._best(
            steering_settings(len(trial), STRENGTHS),
            lambda s: steered(model, trial[s.layer], s.layer, s.strength),
        )
        final = self._vectors(all_records(self.bench.seed))[setting.layer]
        return (lambda: steered(model, final, setting.layer, setting.strength)), str(setting)

    def _vectors(self, records: list[Record]) -> Any:
        return steering_vectors(self.bench.model, self.bench.tokenizer, examples(records))

    def _layers(self) -> tuple[Applied, str]:
        model = self.bench.model
        num_layers = int(model.config.num_hidden_layers)
        setting: LayerScaling = self._best(
            scaling_settings(num_layers), lambda s: layers_scaled(model, {s.layer: s.factor})
        )
        return (lambda: layers_scaled(model, {setting.layer: setting.factor})), str(setting)

    def _best(self, settings: Any, apply: Any) -> Any:
        """By the rule of all rivals, on the validation part; a random third of it screens the settings."""
        records = validation_records(self.bench.seed, 2)
        sample = random.Random(self.bench.seed).sample(records, round(_SCREENED_SHARE * len(records)))
        screen = margin_screen(self.bench.model, self.bench.tokenizer, examples(sample))
        measure = generation_measure(self.bench.model, self.bench.tokenizer)
        return best(settings, apply, records, measure, screen=screen, num_generated=NUM_GENERATED)[0]


def with_random_neurons(bench: Bench, mask: Mask) -> Mask:
    """Other neurons, drawn from all, with the factors of the mask's, rank by rank."""
    scores = _random_scores(bench, 200 + bench.seed)
    safety, utility = top_neurons(scores, len(mask.safety), len(mask.utility))
    return replace(
        mask,
        safety=NeuronSet(safety, mask.safety.factors),
        utility=NeuronSet(utility, mask.utility.factors),
    )


def _random_scores(bench: Bench, seed: int) -> Scores:
    return bench.scores(with_options("random", {"seed": seed}), learning_records(bench.seed))
