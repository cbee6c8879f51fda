"""Sums, progress, and going on after an interruption to the same bits."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from modulation.attribution.accumulate import Accumulator, Pass, Totals
from modulation.checkpoints import Checkpoint
from modulation.errors import CheckpointError


class Killed(Exception):
    """Stands for what ends a process."""


class Counting:
    """A step whose sums depend on rounding, and which dies at its `dies_at`-th batch."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.dies_at = dies_at

    def __call__(self, batch: Sequence[int]) -> dict[str, Tensor]:
        if len(self.batches) == self.dies_at:
            raise Killed
        self.batches.append(tuple(batch))
        return {"thirds": torch.tensor([sum(batch) / 3, 1e7]), "squares": torch.tensor([sum(batch) ** 2.0])}


def run(step: Counting, checkpoint: Checkpoint | None = None) -> dict[str, Totals]:
    accumulator = Accumulator(batch_size=2, checkpoint=checkpoint)
    return accumulator.run([Pass("one", range(5), step), Pass("two\n", range(100, 103), step)])


def test_it_goes_through_all_batches_in_order_and_sums_by_name() -> None:
    step = Counting()
    totals = run(step)
    assert step.batches == [(0, 1), (2, 3), (4,), (100, 101), (102,)]
    assert totals["one"].sums["squares"].item() == 1 + 25 + 16
    assert totals["two\n"].count == 3
    assert totals["two\n"].mean("squares").item() == pytest.approx((201**2 + 102**2) / 3)


def test_progress_knows_the_total_from_the_start() -> None:
    told: list[tuple[str, int, int]] = []
    accumulator = Accumulator(batch_size=2, on_progress=lambda *each: told.append(each))
    accumulator.run([Pass("a", range(3), Counting()), Pass("b", range(1), Counting())])
    assert told == [("a", 0, 4), ("a", 2, 4), ("a", 3, 4), ("b", 3, 4), ("b", 4, 4)]


@pytest.mark.parametrize("seconds_between", [0.0, 1e9], ids=["each batch", "each pass"])
@pytest.mark.parametrize("dies_at", range(5))
def test_what_was_interrupted_anywhere_ends_at_the_same_bits(
    dies_at: int, seconds_between: float, tmp_path: Path
) -> None:
    def checkpoint() -> Checkpoint:
        return Checkpoint(tmp_path / "run.checkpoint", "key", seconds_between)

    expected = run(whole := Counting())
    with pytest.raises(Killed):
        run(Counting(dies_at), checkpoint())
    assert checkpoint().path.exists() == (dies_at >= (1 if seconds_between == 0 else 3))
    rest = Counting()
    found = run(rest, checkpoint())
    reached = dies_at if seconds_between == 0 else 3 * (dies_at >= 3)
    assert rest.batches == whole.batches[reached:]
    for name, totals in expected.items():
        assert totals.count == found[name].count
        for what, values in totals.sums.items():
            assert torch.equal(values, found[name].sums[what])


def test_progress_of_a_continued_run_starts_where_it_was(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run.checkpoint", "key", 0.0)
    with pytest.raises(Killed):
        run(Counting(2), checkpoint)
    told: list[tuple[str, int, int]] = []
    accumulator = Accumulator(batch_size=2, checkpoint=checkpoint, on_progress=lambda *e: told.append(e))
    accumulator.run([Pass("one", range(5), Counting())])
    assert told == [("one", 4, 5), ("one", 5, 5)]
    accumulator.remove_checkpoint()
    assert list(tmp_path.iterdir()) == []


def test_another_runs_checkpoint_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    run(Counting(), Checkpoint(path, "key"))
    kept = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"belongs to another run: its key is key, this run's is other"):
        run(Counting(), Checkpoint(path, "other"))
    assert path.read_bytes() == kept


@pytest.mark.parametrize("damage", ["cut short", "empty", "pickle", "not ours"])
def test_a_damaged_checkpoint_is_refused_with_the_way_out(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    run(Counting(), Checkpoint(path, "key"))
    contents = {"cut short": path.read_bytes()[:-3], "empty": b"", "pickle": b"\x80\x04."}
    path.write_bytes(contents.get(damage, b""))
    if damage == "not ours":
        save_file({"x": torch.zeros(1).numpy()}, path)
        assert load_file(path)
    with pytest.raises(CheckpointError, match=r"run\.checkpoint: .*Delete the file to begin anew\."):
        run(Counting(), Checkpoint(path, "key"))
