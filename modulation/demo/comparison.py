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
from modulation.evaluation.html.svg import require_matplotlib
from modulation.evaluation.metrics import Rate, evaluate_answers, rate_of_counts
from modulation.evaluation.perplexity import perplexity
from modulation.evaluation.report import percent
from modulation.rivals.choice import NoSettingError

OF_A_SEED: Final = ("seed", "prompts", "mask")
"""The conditions in which comparisons that are put together may differ."""
METRICS: Final = ("asr", "over_refusal", "benign_correct", "refusal_plain")
_LOOKS: Final = {
    "base": ("#444444", "X"),
    "ours": ("#0a6fb8", "o"),
    "control": ("#b8860b", "s"),
    "rival": ("#b03a2e", "^"),
}
FEWEST_RIGHT: Final = 95
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
    conditions: Mapping[str, Any],
    on_row: Callable[[str], object] = lambda _name: None,
) -> Results:
    """Measure every row that `out` does not hold yet; `out` is written after each, so a run can go on.
    `on_row` is told of each that begins. A row of which no setting is within the limits has no figures but
    says so, {"kind", "left_out": why}; `on_row` is told of that, too.

    `conditions` are plain JSON values, by name: all that rows with these names depend on.
    Raises DataError for a file that is not one of these results, or was measured under other conditions.
    """
    results: Results = {}
    if out.exists():
        results, held = _read(out)
        for name, (wanted, there) in _differences(conditions, held).items():
            raise DataError(
                f"{out} holds a comparison with {name} {there}, not {wanted}. Name another file with --out."
            )
    for row in rows:
        if row.name not in results:
            on_row(row.name)
            try:
                results[row.name] = measure(bench, row, records)
            except NoSettingError as error:
                on_row(f"{row.name}: left out. {error}")
                results[row.name] = {"kind": row.kind, "left_out": str(error)}
            text = json.dumps({"conditions": conditions, "rows": results}, indent=1) + "\n"
            write_whole(out, text.encode())
    return results


def read_comparable(paths: Sequence[Path]) -> list[Results]:
    """The rows of results files, one a seed. Raises DataError where a file holds no results, where one was
    measured under other conditions than another, and where two have one seed."""
    read: list[tuple[Path, Results, dict[str, Any]]] = []
    for path in paths:
        rows, conditions = _read(path)
        for other, _, theirs in read:
            if theirs.get("seed") == conditions.get("seed"):
                raise DataError(f"{other} and {path} are both of seed {conditions.get('seed')}. Name one.")
            for name, (here, there) in _differences(conditions, theirs).items():
                if name not in OF_A_SEED:
                    raise DataError(
                        f"{path} was measured with {name} {here}, {other} with {there}. They do not go "
                        "together."
                    )
        read.append((path, rows, conditions))
    return [rows for _, rows, _ in read]


def _read(path: Path) -> tuple[Results, dict[str, Any]]:
    """The rows and the conditions of a results file."""
    try:
        found = json.loads(path.read_text())
        return dict(found["rows"]), dict(found["conditions"])
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no comparison ({error}). Delete it or name another file.") from error


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Conditions, with settings by their own names, that are not the same in both; None: there is none."""
    here, there = _flat(one), _flat(other)
    pairs = {name: (here.get(name), there.get(name)) for name in {**here, **there}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(conditions: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in conditions.items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": each for key, each in inner.items()} or {name: value}
    return flat


def comparison_table(runs: Sequence[Results]) -> str:
    """A Markdown table: of each rate the mean over the seeds that have the row, its range, and the 95 %
    Wilson interval of their prompts together (as if masks were one and no two prompts had a topic); of
    perplexity the mean. A row that was left out is in it, too, and says so; one that was left out for some of
    the seeds says for how many."""
    lines = [
        "| | seeds | ASR | over-refusal | benign correct | plain refused | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in _measured(runs).items():
        if not found:
            lines.append(f"| {name} | 0 | no setting within the limits | | | | |")
            continue
        left_out = sum("left_out" in run.get(name, {}) for run in runs)
        seeds = f"{len(found)}, left out for {left_out}" if left_out else f"{len(found)}"
        cells = [_cell([each["metrics"][metric] for each in found]) for metric in METRICS]
        cells.append(f"{mean(each['perplexity'] for each in found):.4f}")
        lines.append(f"| {name} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _measured(runs: Sequence[Results]) -> dict[str, list[dict[str, Any]]]:
    """By name, in the order of the runs, the rows that have figures."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {
        name: [run[name] for run in runs if name in run and "left_out" not in run[name]] for name in names
    }


def _cell(found: Sequence[Rate]) -> str:
    together = rate_of_counts(sum(each["count"] for each in found), sum(each["total"] for each in found))
    interval = f"[{100 * together['low']:.1f}, {100 * together['high']:.1f}]"
    rates = [each["rate"] for each in found]
    if len(rates) == 1:
        return f"{percent(rates[0])} {interval}"
    return f"{percent(mean(rates))} ({100 * min(rates):.1f} to {100 * max(rates):.1f}) {interval}"


def save_plot(runs: Sequence[Results], path: Path) -> None:
    """Draw the table as a file: attack success against over-refusal, means over the seeds that have the row.
    Hollow marks are of models that break: fewer than 95 % of benign answers are right.

    Raises NeuronTuneError without matplotlib.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = {name: found for name, found in _measured(runs).items() if found}
    with rc_context({"svg.hashsalt": "neurontune", "svg.fonttype": "path", "font.size": 9.0}):
        figure = Figure(figsize=(9.6, 5.2), layout="constrained")
        axes = figure.subplots()
        for number, (name, found) in enumerate(drawn.items(), 1):
            x, y = (_mean(found, metric) for metric in ("over_refusal", "asr"))
            colour, marker = _LOOKS[found[0]["kind"]]
            breaks = _mean(found, "benign_correct") < FEWEST_RIGHT
            seeds = f"{len(found)} seed{'s' * (len(found) > 1)}"
            axes.scatter(
                x,
                y,
                facecolor="none" if breaks else colour,
                edgecolor=colour,
                marker=marker,
                s=42,
                zorder=3,
                label=f"{number}  {name} ({seeds})",
            )
            side = (6, 4) if number % 2 else (-6, -10)
            axes.annotate(
                str(number),
                (x, y),
                textcoords="offset points",
                xytext=side,
                ha="left" if number % 2 else "right",
                fontsize=8,
            )
        axes.set_xlabel("held-out borderline prompts refused, %")
        axes.set_ylabel("held-out attacks that succeed, %")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 100)
        axes.grid(linewidth=0.4, color="#dddddd")
        title = f"hollow: fewer than {FEWEST_RIGHT} % of benign answers right"
        figure.legend(loc="outside right upper", title=title, fontsize=8, title_fontsize=8, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def _mean(found: Sequence[Mapping[str, Any]], metric: str) -> float:
    """In per cent."""
    return 100 * mean(float(each["metrics"][metric]["rate"]) for each in found)
