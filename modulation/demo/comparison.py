"""The comparison on the demo model: every row answered, judged and measured on the `heldout` split.

Knows rows, figures and a results file. Knows nothing of how rows come about.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

from modulation.artefacts import write_whole
from modulation.demo.masking import Bench
from modulation.demo.rivals import Row
from modulation.errors import DataError
from modulation.evaluation.answering import transformers_answerer
from modulation.evaluation.data import Record
from modulation.evaluation.metrics import evaluate_answers
from modulation.evaluation.perplexity import perplexity
from modulation.evaluation.report import percent

METRICS: Final = ("asr", "over_refusal", "benign_correct", "refusal_plain")
Results = dict[str, dict[str, Any]]


def measure(bench: Bench, row: Row, records: Sequence[Record]) -> dict[str, Any]:
    """The row's metrics, the perplexity of right benign answers, and what was chosen for it."""
    apply, chosen = row.prepare()
    answer = transformers_answerer(bench.model, bench.tokenizer)
    with apply():
        answers = answer([record.prompt for record in records])
        found = perplexity(bench.model, bench.tokenizer, records, 64, kinds=("benign",))
    metrics: Mapping[str, Any] = evaluate_answers(records, answers)
    assert found is not None
    return {"kind": row.kind, "chosen": chosen, "perplexity": found["perplexity"], "metrics": dict(metrics)}


def compare(
    bench: Bench,
    rows: Iterable[Row],
    records: Sequence[Record],
    out: Path,
    on_row: Callable[[str], object] = lambda _name: None,
) -> Results:
    """Measure every row that `out` does not hold yet; `out` is written after each, so a run can go on.

    Raises DataError for a file that is not one of these results, or of another seed.
    """
    results = _read(out, bench.seed)
    for row in rows:
        if row.name not in results:
            on_row(row.name)
            results[row.name] = measure(bench, row, records)
            text = json.dumps({"seed": bench.seed, "rows": results}, indent=1) + "\n"
            write_whole(out, text.encode())
    return results


def _read(path: Path, seed: int) -> Results:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        rows, of = dict(found["rows"]), found["seed"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no comparison ({error}). Delete it or name another file.") from error
    if of != seed:
        raise DataError(f"{path} holds the comparison of seed {of}, not {seed}. Name another file.")
    return rows


def comparison_table(runs: Sequence[Results]) -> str:
    """A Markdown table: the mean of each figure over the seeds that have the row, and its range."""
    lines = [
        "| | seeds | ASR | over-refusal | benign correct | plain refused | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for run in runs for name in run):
        found = [run[name] for run in runs if name in run]
        cells = [_cell([each["metrics"][metric]["rate"] for each in found]) for metric in METRICS]
        cells.append(f"{mean(each['perplexity'] for each in found):.4f}")
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rates: Sequence[float]) -> str:
    if len(rates) == 1:
        return percent(rates[0])
    return f"{percent(mean(rates))} ({100 * min(rates):.1f} to {100 * max(rates):.1f})"
