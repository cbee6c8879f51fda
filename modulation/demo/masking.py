"""The demo model's mask by the whole method, on the `tune` split alone.

Knows the folds of the split, attribution, tuning and levels. Knows nothing of the `heldout` split, and
nothing of commands. Every choice is made on the folds' validation parts (cross-validation); then the neurons
are attributed and their factors learned anew on all of `tune`, for as many steps as were best.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from types import MappingProxyType
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.accumulate import Accumulator
from modulation.attribution.base import Attribution, AttributionData, Scores
from modulation.attribution.examples import attribution_data, digest
from modulation.attribution.methods import DEFAULT_METHOD, default_options, with_options
from modulation.demo.phrasing import REFUSALS
from modulation.demo.splits import FOLDS, all_records, learning_records, validation_records
from modulation.evaluation.data import Record
from modulation.levels import Threshold
from modulation.masks import Mask
from modulation.modulator import Modulator
from modulation.tuning.curve import Point, pooled_points
from modulation.tuning.drafting import counts, draft, first_neurons, stage_sizes
from modulation.tuning.leveling import measured_points, with_levels
from modulation.tuning.runs import TuningRun, tune
from modulation.tuning.settings import TuningSettings

MODEL_ID: Final = "neurontune-demo"
ACTIVE_SHARE: Final = 0.0198
# The demo's tuning settings where they are not the defaults.
PRUNED: Final[Mapping[str, Any]] = MappingProxyType(
    {"prune_shares": (0.16, 0.07, 0.035), "harmful_weight": 1.0}
)
TUNING_PROMPTS_PER_TOPIC: Final = 8
VALIDATION_PROMPTS_PER_TOPIC: Final = 5

OnProgress = Callable[[str, int, int], object]
"""Told what is at work, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Bench:
    """The demo model with what is asked of it: a seed of prompts and draws, and whom to tell."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    seed: int = 0
    on_progress: OnProgress = lambda _what, _done, _total: None

    def scores(self, method: Attribution, records: Sequence[Record]) -> Scores:
        """What the method gives the neurons, on one prompt of each topic and family."""
        accumulator = Accumulator(
            on_progress=lambda _name, done, total: self._told("attribution", done, total)
        )
        return method(self.model, self.tokenizer, examples(records), accumulator)

    def drafted(self, scores: Scores, settings: TuningSettings, **metadata: Any) -> Mask:
        """A mask of the top neurons, or of those to prune from, with factors of 1."""
        return draft(self.model, MODEL_ID, *first_neurons(scores, self._sizes(settings)), **metadata)

    def tuned(
        self,
        mask: Mask,
        settings: TuningSettings,
        records: Sequence[Record],
        validation: Sequence[Record] | None = None,
    ) -> Mask:
        """What `drafted` made with these settings, pruned if they say so, with learned factors; `validation`,
        where there is one, decides when to stop."""
        run = TuningRun(settings, self.seed, self._sizes(settings)[1:])
        return tune(
            self.model,
            self.tokenizer,
            examples(records),
            None if validation is None else examples(validation),
            mask,
            run,
            on_step=lambda step, total, _loss, _validation: self._told("tuning", step, total),
        ).mask

    def curve(self, mask: Mask, records: Sequence[Record]) -> list[Point]:
        """What the records measure at every threshold of the sweep."""
        done = 0

        def count(number: int) -> None:
            nonlocal done
            done += number
            self._told("levels", done, 0)

        return measured_points(Modulator(self.model, mask), self.tokenizer, mask, records, count)

    def _sizes(self, settings: TuningSettings) -> tuple[Threshold, ...]:
        final = Threshold(*counts(self.model, ACTIVE_SHARE))
        return stage_sizes(self.model, settings.prune_shares, final)

    def _told(self, what: str, done: int, total: int) -> None:
        self.on_progress(what, done, total)


@dataclass(frozen=True)
class Trial:
    """A mask to which a fold's validation part is unseen, and its curve there."""

    mask: Mask
    records: Sequence[Record]
    points: Sequence[Point]

    @property
    def tuning(self) -> dict[str, Any]:
        """What the mask says of how its factors were learned."""
        return dict(self.mask.metadata.method["tuning"])


def make_mask(bench: Bench, settings: TuningSettings) -> tuple[Mask, Mask]:
    """Attribute and learn for each fold, choose the levels by all of their validation parts together; then
    attribute and learn anew on all of `tune`.

    Returns the mask, and the trial mask of the first fold with the levels chosen. Deterministic for a seed up
    to the rounding of the machine's arithmetic.
    """
    trials = [_tried(bench, settings, fold) for fold in range(len(FOLDS))]
    points = pooled_points([each.points for each in trials])
    records = [record for each in trials for record in each.records]

    def leveled(mask: Mask) -> Mask:
        source = "tune split, validation parts"
        return with_levels(mask, points, records, source, allow_less_safe=True)

    return leveled(_redone(bench, settings, [each.tuning for each in trials])), leveled(trials[0].mask)


def _tried(bench: Bench, settings: TuningSettings, fold: int) -> Trial:
    """Neurons and factors while choices are made: the fold's validation part is unseen."""
    scores = bench.scores(_attribution(), learning_records(bench.seed, fold=fold))
    learning = learning_records(bench.seed, TUNING_PROMPTS_PER_TOPIC, fold)
    judging = validation_records(bench.seed, fold=fold)
    mask = bench.tuned(bench.drafted(scores, settings), settings, learning, judging)
    records = validation_records(bench.seed, VALIDATION_PROMPTS_PER_TOPIC, fold)
    return Trial(mask, records, bench.curve(mask, records))


def _redone(bench: Bench, settings: TuningSettings, tried: Sequence[Mapping[str, Any]]) -> Mask:
    """Learned on all of `tune`, for as many steps as were best in the mean of the trials."""
    num_steps = max(1, round(mean(int(each["num_steps"]) for each in tried)))
    records = all_records(bench.seed)
    redone = bench.drafted(
        bench.scores(_attribution(), records),
        settings,
        method={"attribution": {"method": DEFAULT_METHOD, "options": default_options(DEFAULT_METHOD)}},
        data_digests={"attribution": digest(examples(records))},
    )
    final = bench.tuned(
        redone,
        settings.model_copy(update={"num_steps": num_steps}),
        final_records(bench.seed),
    )
    told = {
        "chosen": "levels, and of several validations the best step, on the validation parts of all folds, "
        "each with neurons and factors of its learning part; those in the mask are attributed and learned "
        "anew on all of the tune split",
        "trials": list(tried),
    }
    method = {**final.metadata.method, **told}
    return replace(final, metadata=final.metadata.model_copy(update={"method": method}))


def final_records(seed: int) -> list[Record]:
    """What the factors of a mask that ships are learned from, and those of its controls."""
    return all_records(seed, TUNING_PROMPTS_PER_TOPIC)


def _attribution() -> Attribution:
    return with_options(DEFAULT_METHOD, default_options(DEFAULT_METHOD))


def examples(records: Sequence[Record]) -> AttributionData:
    """Records of the demo corpus, which all have answers."""
    return attribution_data(records, refusal=REFUSALS[0])


def whole(mask: Mask) -> Threshold:
    """All neurons of the mask."""
    return mask.levels.maximum
