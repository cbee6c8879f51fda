"""The demo model's mask by the whole method, on the `tune` split alone.

Knows the parts of the split, attribution, tuning and levels. Knows nothing of the `heldout` split, and
nothing of commands. Every choice is made on the validation part; then the neurons are attributed and
their factors learned anew on all of `tune`, for as many steps as were best.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.accumulate import Accumulator
from modulation.attribution.base import Attribution, AttributionData, Scores
from modulation.attribution.examples import attribution_data, digest
from modulation.attribution.methods import DEFAULT_METHOD, default_options, with_options
from modulation.demo.phrasing import REFUSALS
from modulation.demo.splits import all_records, learning_records, level_records, validation_records
from modulation.evaluation.data import Record
from modulation.levels import Threshold
from modulation.masks import Mask
from modulation.modulator import Modulator
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

    def tuned(self, mask: Mask, settings: TuningSettings, records: Sequence[Record], judged: bool) -> Mask:
        """What `drafted` made with these settings, pruned if they say so, with learned factors; `judged`: the
        validation part decides when to stop."""
        validation = examples(validation_records(self.seed)) if judged else None
        run = TuningRun(settings, self.seed, self._sizes(settings)[1:])
        return tune(
            self.model,
            self.tokenizer,
            examples(records),
            validation,
            mask,
            run,
            on_step=lambda step, total, _loss, _validation: self._told("tuning", step, total),
        ).mask

    def leveled(self, mask: Mask) -> Mask:
        """The mask with the levels that the rule chooses on the validation part."""
        records = level_records(self.seed)
        done = 0

        def count(number: int) -> None:
            nonlocal done
            done += number
            self._told("levels", done, 0)

        points = measured_points(Modulator(self.model, mask), self.tokenizer, mask, records, count)
        return with_levels(mask, points, records, "tune split, validation part", allow_less_safe=True)

    def _sizes(self, settings: TuningSettings) -> tuple[Threshold, ...]:
        final = Threshold(*counts(self.model, ACTIVE_SHARE))
        return stage_sizes(self.model, settings.prune_shares, final)

    def _told(self, what: str, done: int, total: int) -> None:
        self.on_progress(what, done, total)


def make_mask(bench: Bench, settings: TuningSettings) -> tuple[Mask, Mask]:
    """Attribute, learn, choose the levels; then attribute and learn anew on all of `tune`.

    Returns the mask, and the trial: what choices were made with, to which the validation families are
    still unseen. Deterministic for a seed up to the rounding of the machine's arithmetic.
    """
    trial = chosen_mask(bench, with_options(DEFAULT_METHOD, default_options(DEFAULT_METHOD)), settings)
    return _redone(bench, settings, trial), trial


def _redone(bench: Bench, settings: TuningSettings, trial: Mask) -> Mask:
    method = with_options(DEFAULT_METHOD, default_options(DEFAULT_METHOD))
    steps = int(trial.metadata.method["tuning"]["num_steps"])
    records = all_records(bench.seed)
    redone = bench.drafted(
        bench.scores(method, records),
        settings,
        method={"attribution": {"method": DEFAULT_METHOD, "options": default_options(DEFAULT_METHOD)}},
        data_digests={"attribution": digest(examples(records))},
    )
    final = bench.tuned(
        redone,
        settings.model_copy(update={"num_steps": max(1, steps)}),
        all_records(bench.seed, TUNING_PROMPTS_PER_TOPIC),
        judged=False,
    )
    metadata = final.metadata.model_copy(
        update={
            "levels": trial.metadata.levels,
            "evaluation": trial.metadata.evaluation,
            "method": {
                **final.metadata.method,
                "rule": trial.metadata.method["rule"],
                "chosen": "levels, and of several validations the best step, on the validation part, with "
                "neurons and factors of the learning part; those in the mask are attributed and learned anew "
                "on all of the tune split",
                "validation": trial.metadata.method["tuning"],
            },
            "data_digests": {**trial.metadata.data_digests, **final.metadata.data_digests},
        }
    )
    return replace(final, metadata=metadata)


def chosen_mask(bench: Bench, method: Attribution, settings: TuningSettings) -> Mask:
    """Neurons, factors and levels while choices are made: the validation families are unseen."""
    scores = bench.scores(method, learning_records(bench.seed))
    learning = learning_records(bench.seed, TUNING_PROMPTS_PER_TOPIC)
    return bench.leveled(bench.tuned(bench.drafted(scores, settings), settings, learning, judged=True))


def examples(records: Sequence[Record]) -> AttributionData:
    """Records of the demo corpus, which all have answers."""
    return attribution_data(records, refusal=REFUSALS[0])


def whole(mask: Mask) -> Threshold:
    """All neurons of the mask."""
    return mask.levels.maximum
