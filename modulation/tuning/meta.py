"""Meta-learning of the factors in MAML's form (arXiv 1703.03400), and plain risk minimisation beside it.

Knows tasks, an objective and gradient steps. Knows nothing of models, files or terminals.

A step adapts the parameters to one attack family with a few inner steps on its support prompts. The outer
loss is, as in MLDG (arXiv 1710.03463), the mean of two: of the parameters before adaptation on the support
prompts, and of the adapted ones on query prompts of the *other* families, so that what helps against one
attack helps against those never seen. Without the first nothing holds the parameters that are served: they
drift to where only the inner step is any good (docs/trials.md). First order by default: the second loss's
gradient is taken at the adapted parameters as if they did not depend on the start (FOMAML). `erm` has no
inner steps and draws from all families.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from modulation.attribution.gates import frozen
from modulation.checkpoints import Savings
from modulation.tuning.objective import Objective, Seen
from modulation.tuning.tasks import Drawn, Tasks

OUTER_LOSS: Final = "mldg"
"""Of `maml`: half the loss before adaptation on support prompts, half that after it on query prompts."""

_BETAS = (0.9, 0.95)
_FINAL_RATE_SHARE = 0.1
_VALIDATION_BATCH = 64

OnStep = Callable[[int, int, float, float | None], object]
"""Told the step's number from 1, the steps in all, its outer loss, and the last validation loss."""


@dataclass
class Learned:
    """Parameters float32 (groups,): those of the best validation; `num_steps` made them. `history` has a
    row {"step", "loss", "attack_success", "over_refusal"} for each validation."""

    parameters: Tensor
    num_steps: int
    history: list[dict[str, float]] = field(default_factory=list)


def learn(
    objective: Objective,
    tasks: Tasks,
    validation: Tasks | None,
    start: Tensor,
    *,
    seed: int = 0,
    checkpoint: Savings | None = None,
    on_step: OnStep = lambda _step, _total, _loss, _validation: None,
) -> Learned:
    """Learn parameters from `start`, float32 (groups,). With validation tasks, stop when they have not
    improved `patience` times and return the best; without, return the last.

    Everything random is drawn from the seed and the step's number, so a run that goes on from its
    checkpoint gives the same result bit for bit. Raises CheckpointError for one of another run.
    """
    settings = objective.settings
    with frozen(objective.modulator.model):
        state = _State.restored(start, checkpoint)
        while state.step < settings.num_steps and state.num_worse < settings.patience:
            rate = settings.rate * (1 - (1 - _FINAL_RATE_SHARE) * state.step / settings.num_steps)
            source = random.Random(f"{seed}/{state.step}")
            loss = state.take_step(objective, tasks, source, rate)
            is_last = state.step == settings.num_steps
            is_judged = validation is not None and (state.step % settings.validate_every == 0 or is_last)
            if validation and is_judged:
                state.judge(validate(objective, validation, state.parameters, seed), settings.patience)
            on_step(state.step, settings.num_steps, loss, state.best_loss if state.history else None)
            if checkpoint and (checkpoint.is_due or is_judged or is_last):
                state.save(checkpoint)
    return state.learned(validation is not None)


@dataclass(frozen=True)
class Adaptation:
    """Parameters float32 (groups,), how many steps were taken, and how probable a refusal of the borderline
    prompts was before and is now (`_refusal`)."""

    parameters: Tensor
    num_steps: int
    refusal_before: float
    refusal_after: float


def adapt(
    objective: Objective,
    tasks: Tasks,
    start: Tensor,
    *,
    seed: int = 0,
    num_steps: int,
    rate: float,
    budget: float,
) -> Adaptation:
    """At most `num_steps` steps from `start` that lower the loss of attacked prompts, and not at the cost of
    the others. A step sees at most the support size of each kind, at the anchors in turn.

    A step goes down the attacked prompts' loss at a right angle to the gradient of the borderline prompts',
    and where it would raise the loss of the rest, at a right angle to that too (as A-GEM, arXiv 1812.00420).
    What curves is left to `budget`: a step after which a refusal of the borderline prompts, all of them, is
    more probable than at the start by more than that is not taken, and those that follow are half as long.
    """
    parameters, taken = start, 0
    with frozen(objective.modulator.model):
        before = after = _refusal(objective, tasks, start)
        for step in range(num_steps):
            source = random.Random(f"{seed}/adapt/{step}")
            support = tasks.sample(source, objective.settings.support_size, objective.aims)
            point = parameters.detach().requires_grad_()
            gradient = _yielding(objective(point, support), point)
            stepped = objective.shape.within_bounds(parameters - rate * gradient)
            reached = _refusal(objective, tasks, stepped)
            if reached <= before + budget:
                parameters, taken, after = stepped, taken + 1, reached
            else:
                rate /= 2
    return Adaptation(parameters, taken, before, after)


def _yielding(seen: Seen, point: Tensor) -> Tensor:
    """The attacked term's gradient at `point` without what would move the borderline term, and without what
    would raise the others together."""
    terms = dict(seen.terms)
    parts = terms.pop("attacked"), terms.pop("borderline"), torch.stack(list(terms.values())).sum()
    attacked, borderline, rest = (torch.autograd.grad(part, point, retain_graph=True)[0] for part in parts)
    attacked, rest = _without(attacked, borderline), _without(rest, borderline)
    return _without(attacked, rest) if torch.dot(attacked, rest) < 0 else attacked


def _without(vector: Tensor, direction: Tensor) -> Tensor:
    """What of a vector is at a right angle to a direction."""
    length = torch.dot(direction, direction)
    return vector - torch.dot(vector, direction) / length * direction if length else vector


def _refusal(objective: Objective, tasks: Tasks, parameters: Tensor) -> float:
    """How probable a refusal of a borderline prompt is, with all neurons active: the mean over all of them of
    the refusing answer's share of the probability of both, where they part."""
    margins_alone = objective.settings.model_copy(update={"divergence_weight": 0.0})
    objective = replace(objective, settings=margins_alone)
    likely = 0.0
    with torch.no_grad():
        for start in range(0, len(tasks.borderline), _VALIDATION_BATCH):
            part = tasks.borderline[start : start + _VALIDATION_BATCH]
            drawn = Drawn(part, (objective.aims.maximum,) * len(part))
            likely += objective(parameters, drawn).margins.sigmoid().sum().item()
    return likely / len(tasks.borderline)


def validate(objective: Objective, tasks: Tasks, parameters: Tensor, seed: int = 0) -> dict[str, float]:
    """Loss and shares of margins on the wrong side, at the anchors, on the same prompts every time."""
    drawn = tasks.sample(
        random.Random(f"{seed}/validation"), objective.settings.validation_size, objective.aims
    )
    parts: list[Seen] = []
    sides = {"attacked": [0, 0], "borderline": [0, 0]}
    with torch.no_grad():
        for start in range(0, len(drawn.prompts), _VALIDATION_BATCH):
            part = Drawn(
                drawn.prompts[start : start + _VALIDATION_BATCH],
                drawn.thresholds[start : start + _VALIDATION_BATCH],
            )
            seen = objective(parameters, part)
            parts.append(seen)
            for prompt, margin in zip(part.prompts, seen.margins.tolist(), strict=True):
                if prompt.kind in sides:
                    wrong = margin > 0 if prompt.kind == "borderline" else margin < 0
                    sides[prompt.kind][0] += wrong
                    sides[prompt.kind][1] += 1
    shares = {kind: wrong / max(1, total) for kind, (wrong, total) in sides.items()}
    return {
        "loss": _of_data(parts),
        "attack_success": shares["attacked"],
        "over_refusal": shares["borderline"],
    }


def _of_data(parts: Sequence[Seen]) -> float:
    """The loss without shrinkage as if all prompts had been in one batch: each term a mean over all."""
    total = 0.0
    for name in dict.fromkeys(name for part in parts for name in part.terms if name != "shrinkage"):
        means = [(part.terms[name].item(), part.sizes[name]) for part in parts if name in part.terms]
        total += sum(mean * size for mean, size in means) / sum(size for _, size in means)
    return total


def _loss_and_gradient(
    objective: Objective, parameters: Tensor, drawn: Drawn, *, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    loss = objective(parameters, drawn).loss
    (gradient,) = torch.autograd.grad(loss, parameters, create_graph=create_graph)
    return loss, gradient


@dataclass
class _State:
    """Where a run stands: parameters, Adam's moments, the best validation so far."""

    parameters: Tensor
    first: Tensor
    second: Tensor
    best: Tensor
    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    num_worse: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def restored(cls, start: Tensor, checkpoint: Savings | None) -> "_State":
        reached = checkpoint.load() if checkpoint else None
        if reached is None:
            zeros = torch.zeros_like(start)
            return cls(start.clone(), zeros, zeros.clone(), start.clone())
        tensors = {name: torch.from_numpy(array.copy()) for name, array in reached.arrays.items()}
        fields: dict[str, Any] = {**tensors, **reached.progress}
        if fields["best_loss"] is None:
            fields["best_loss"] = float("inf")
        return cls(**fields)

    def save(self, checkpoint: Savings) -> None:
        names = ("parameters", "first", "second", "best")
        arrays = {name: getattr(self, name).numpy().astype(np.float32) for name in names}
        best_loss = None if self.best_loss == float("inf") else self.best_loss
        progress = {name: getattr(self, name) for name in ("step", "best_step", "num_worse", "history")}
        checkpoint.save(arrays, {**progress, "best_loss": best_loss})

    def take_step(self, objective: Objective, tasks: Tasks, source: random.Random, rate: float) -> float:
        """One outer step; returns the outer loss."""
        loss, gradient = _outer_gradient(objective, tasks, self.parameters, source)
        self.step += 1
        self.first = _BETAS[0] * self.first + (1 - _BETAS[0]) * gradient
        self.second = _BETAS[1] * self.second + (1 - _BETAS[1]) * gradient.square()
        first = self.first / (1 - _BETAS[0] ** self.step)
        second = self.second / (1 - _BETAS[1] ** self.step)
        moved = self.parameters - rate * first / (second.sqrt() + 1e-8)
        self.parameters = objective.shape.within_bounds(moved)
        return loss

    def judge(self, found: dict[str, float], patience: int) -> None:
        self.history.append({"step": self.step, **found})
        if found["loss"] < self.best_loss:
            self.best, self.best_loss, self.best_step = self.parameters.clone(), found["loss"], self.step
            self.num_worse = 0
        else:
            self.num_worse = min(patience, self.num_worse + 1)

    def learned(self, validated: bool) -> Learned:
        if validated:
            return Learned(self.best, self.best_step, self.history)
        return Learned(self.parameters, self.step, self.history)


def _outer_gradient(
    objective: Objective, tasks: Tasks, parameters: Tensor, source: random.Random
) -> tuple[float, Tensor]:
    """The outer loss and its gradient with respect to the parameters before adaptation."""
    settings = objective.settings
    start = parameters.detach().clone().requires_grad_()
    if settings.method == "erm":
        drawn = tasks.draw(source, settings.batch_size, objective.aims, tasks.families)
        loss, gradient = _loss_and_gradient(objective, start, drawn)
        return loss.item(), gradient
    support_families, query_families = tasks.support_and_query(source)
    adapted = start
    before: list[tuple[Tensor, Tensor]] = []
    # Only the plain attention kernel has a second derivative.
    with sdpa_kernel(SDPBackend.MATH) if settings.second_order else nullcontext():
        for _ in range(settings.inner_steps):
            support = tasks.draw(source, settings.support_size, objective.aims, support_families)
            before.append(_loss_and_gradient(objective, adapted, support, create_graph=settings.second_order))
            adapted = objective.shape.within_bounds(adapted - settings.inner_rate * before[-1][1])
            if not settings.second_order:
                adapted = adapted.detach().requires_grad_()
        query = tasks.draw(source, settings.batch_size, objective.aims, query_families)
        support_loss, support_gradient = before[0]
        if settings.second_order:
            loss = (support_loss + objective(adapted, query).loss) / 2
            (gradient,) = torch.autograd.grad(loss, start)
        else:
            query_loss, query_gradient = _loss_and_gradient(objective, adapted, query)
            loss = (support_loss + query_loss) / 2
            gradient = (support_gradient + query_gradient) / 2
    return loss.item(), gradient
