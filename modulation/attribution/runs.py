"""One attribution run from examples to a scores file, so that it can be killed and gone on with.

Knows methods, scores files and checkpoints, and what a run's result depends on. Knows nothing of
commands or terminals.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modulation.attribution.accumulate import Accumulator, OnProgress
from modulation.attribution.base import AttributionData
from modulation.attribution.examples import digest
from modulation.attribution.methods import with_options
from modulation.attribution.scores import ScoresFile, ScoresMetadata
from modulation.attribution.selection import ranked_sets
from modulation.checkpoints import Checkpoint, checkpoint_beside
from modulation.fingerprints import fingerprint
from modulation.sites import find_sites

_TOP_SHARE = 0.01
_NUM_SHOWN = 10


@dataclass(frozen=True)
class Run:
    """What is asked for: a method with all its options (`parse_options`), and how to go through the data."""

    method: str
    options: Mapping[str, Any]
    model_id: str
    seed: int = 0
    batch_size: int = 16


def attribute(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: AttributionData,
    run: Run,
    out: Path,
    on_progress: OnProgress = lambda _name, _done, _total: None,
) -> ScoresFile:
    """Compute the scores and write them to `out`; `out`.checkpoint stands beside it meanwhile.

    A run that finds the checkpoint of the same run goes on with it, to the same result bit for bit.

    Raises:
        DataError: data or options that the method cannot use.
        CheckpointError: a checkpoint that is damaged or of another run.
        ScoresError: scores that are not finite.
    """
    metadata = _metadata(model, data, run)
    checkpoint = Checkpoint(checkpoint_beside(out), _key(metadata, str(model.device)))
    accumulator = Accumulator(batch_size=run.batch_size, checkpoint=checkpoint, on_progress=on_progress)
    scores = with_options(run.method, run.options)(model, tokenizer, data, accumulator)
    made = ScoresFile(scores.safety.numpy(), scores.utility.numpy(), metadata)
    made.save(out)
    accumulator.remove_checkpoint()
    return made


def summary(made: ScoresFile) -> str:
    """The top neurons of both sets and, of the top 1 % of all neurons in each, how many a layer has."""
    layers, width = made.safety.shape
    size = max(1, round(_TOP_SHARE * layers * width))
    safety, utility = ranked_sets(made.scores, max(size, _NUM_SHOWN), max(size, _NUM_SHOWN))
    lines = ["rank   safety: layer neuron score     utility: layer neuron score"]
    for rank in range(min(_NUM_SHOWN, max(len(safety), len(utility)))):
        cells = [
            f"{neurons[rank][0]:>6}{neurons[rank][1]:>7} {values[tuple(neurons[rank])]:<9.4g}"
            if rank < len(neurons)
            else "".ljust(23)
            for neurons, values in ((safety, made.safety), (utility, made.utility))
        ]
        lines.append(f"{rank:<12}{cells[0]}{'':<10}{cells[1]}".rstrip())
    counts = [np.bincount(neurons[:size, 0], minlength=layers) for neurons in (safety, utility)]
    lines += ["", f"layer  safety  utility   (of the top {size} of each set)"]
    lines += [f"{layer:<7}{counts[0][layer]:<8}{counts[1][layer]}" for layer in range(layers)]
    return "\n".join(lines)


def _metadata(model: PreTrainedModel, data: AttributionData, run: Run) -> ScoresMetadata:
    sites = find_sites(model)
    return ScoresMetadata(
        method=run.method,
        options=dict(run.options),
        model_id=run.model_id,
        architecture=type(model).__name__,
        model_fingerprint=fingerprint(model),
        num_layers=len(sites),
        neurons_per_layer=sites[0].width,
        data_digest=digest(data),
        seed=run.seed,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=run.batch_size,
    )


def _key(metadata: ScoresMetadata, device: str) -> str:
    """Of everything that the sums depend on, to the last bit."""
    return hashlib.sha256(f"{metadata.model_dump_json()}|{device}".encode()).hexdigest()[:16]
