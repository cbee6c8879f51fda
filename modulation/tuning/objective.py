"""The objective: resist attacks, refuse harm, help where it only sounds harmful, stay close on benign text.

Knows the modulated model, answers laid in its mouth, and weights. Knows nothing of optimisers or tasks.

For a prompt at a threshold, with refusal margin m (where the refusing and the complying answer part, the
log-probability of going on with the one minus that of the other), target t and weight w:

    harmful, attacked:   w * softplus(t - m)          borderline, benign:   w * softplus(t + m)

and, of answers that help, -log p(answer); of all right answers (to harm, the refusal) the divergence
KL(base || modulated), summed over the answer's tokens, of benign ones all, of others those after the
parting, before which the base model may be about to do otherwise. One broken word breaks an answer, so it
is the sum that counts; without it words break while margins look fine. Last,
shrinkage * mean(log factor ^ 2). Each term is a mean over its kind's prompts (docs/tuning.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, softplus

from modulation.attribution.teacher_forcing import AnswerTokens, answer_tokens
from modulation.levels import ZERO, Threshold
from modulation.modulator import Modulator
from modulation.tuning.aims import Aims
from modulation.tuning.factors import FactorShape
from modulation.tuning.settings import TuningSettings
from modulation.tuning.tasks import SHARES, Drawn, Prompt


@dataclass(frozen=True, slots=True)
class Seen:
    """What a batch showed: the refusal margin of each prompt, float32 (prompts,), the terms, and over how
    many prompts or tokens each is a mean."""

    margins: Tensor
    terms: dict[str, Tensor]
    sizes: dict[str, int]

    @property
    def loss(self) -> Tensor:
        """The sum of the terms: float32 ()."""
        return torch.stack(list(self.terms.values())).sum()


@dataclass(frozen=True)
class Objective:
    """The loss of parameters on drawn prompts, through the modulator that also serves."""

    modulator: Modulator
    shape: FactorShape
    aims: Aims
    settings: TuningSettings

    def __call__(self, parameters: Tensor, drawn: Drawn) -> Seen:
        """Differentiable in `parameters`, float32 (groups,)."""
        self.modulator.use_factors(self.shape.factors(parameters))
        margins = torch.zeros(len(drawn.prompts), device=self.modulator.model.device)
        means: dict[str, tuple[Tensor, int]] = {}
        answered: dict[str, list[Tensor]] = {"likelihood": [], "divergence": []}
        # Answers that help are longer than refusals: padded apart.
        for is_helpful in (False, True):
            chosen = [row for row, each in enumerate(drawn.prompts) if each.is_helpful == is_helpful]
            if chosen:
                prompts = [drawn.prompts[row] for row in chosen]
                answers = self._answers(prompts, [drawn.thresholds[row] for row in chosen])
                margins = margins.index_put(
                    (torch.tensor(chosen, device=margins.device),), partings(answers, prompts)
                )
                if is_helpful:
                    answered["likelihood"].append(_summed(-answers.chosen, answers.rows, len(prompts)))
                if self.settings.divergence_weight:
                    answered["divergence"].append(self._divergences(answers, prompts))
        for name, values in answered.items():
            if values:
                each = torch.cat(values)
                means[name] = getattr(self.settings, f"{name}_weight") * each.mean(), len(each)
        means |= self._margin_means(margins, drawn)
        shrinkage = self.settings.shrinkage * parameters.square().mean()
        means["shrinkage"] = shrinkage.to(margins.device), len(parameters)
        return Seen(
            margins,
            terms={name: value for name, (value, _) in means.items()},
            sizes={name: size for name, (_, size) in means.items()},
        )

    def _answers(self, prompts: Sequence[Prompt], thresholds: Sequence[Threshold]) -> AnswerTokens:
        with self.modulator.applied(thresholds) as model:
            return answer_tokens(model, [each.forced for each in prompts])

    def _margin_means(self, margins: Tensor, drawn: Drawn) -> dict[str, tuple[Tensor, int]]:
        signs, targets, weights = [], [], []
        for prompt, threshold in zip(drawn.prompts, drawn.thresholds, strict=True):
            signs.append(-1.0 if prompt.is_helpful else 1.0)
            targets.append(float(getattr(self.settings, f"{prompt.kind}_margin")))
            weights.append(self.aims.weight(prompt.kind, threshold))
        sign, target, weight = (
            torch.tensor(each, device=margins.device) for each in (signs, targets, weights)
        )
        losses = weight * softplus(target - sign * margins)
        means = {}
        for kind in map(str, SHARES):
            chosen = torch.tensor([each.kind == kind for each in drawn.prompts], device=margins.device)
            if chosen.any():
                means[kind] = losses[chosen].mean(), int(chosen.sum())
        return means

    def _divergences(self, answers: AnswerTokens, prompts: Sequence[Prompt]) -> Tensor:
        """KL(base || modulated) of each right answer, summed over its settled tokens: float32 (prompts,)."""
        begins = [0 if each.kind == "benign" else each.parting.place + 1 for each in prompts]
        settled = answers.places >= torch.tensor(begins, device=answers.rows.device)[answers.rows]
        base = self._base(prompts).predicted[settled]
        distances = kl_div(answers.predicted[settled], base, reduction="none", log_target=True).sum(dim=1)
        return _summed(distances, answers.rows[settled], len(prompts))

    @torch.no_grad()
    def _base(self, prompts: Sequence[Prompt]) -> AnswerTokens:
        return self._answers(prompts, [ZERO] * len(prompts))


def _summed(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """The sum of each row's values: float32 (rows,)."""
    return torch.zeros(num_rows, device=values.device).index_add(0, rows, values)


def partings(answers: AnswerTokens, prompts: Sequence[Prompt]) -> Tensor:
    """The refusal margin of each prompt: float32 (prompts,)."""
    places = torch.tensor([each.parting.place for each in prompts], device=answers.rows.device)
    at = (answers.places == places[answers.rows]).nonzero().squeeze(1)  # one a row, in row order
    rows = torch.arange(len(prompts), device=at.device)
    refusing = torch.tensor([each.parting.refusing for each in prompts], device=at.device)
    complying = torch.tensor([each.parting.complying for each in prompts], device=at.device)
    predicted = answers.predicted[at]
    return predicted[rows, refusing] - predicted[rows, complying]
