"""Whether an audit log has the lines that it must have, and no others.

Knows the log's fields. Knows no file and no server.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.soaking.tally import Tally


def deviations(lines: Iterable[Mapping[str, Any]], tally: Tally) -> list[str]:
    """What is missing, twice, wrong or nobody's; empty: the log is as `tally` says that it must be."""
    lines = list(lines)
    requests = [line for line in lines if line["event"] != "reload"]
    times = Counter(line["request_id"] for line in requests)
    found = [f"no line of {name}" for name in tally.audited if not times[name]]
    found += [f"{times[name]} lines of {name}" for name in times if times[name] > 1]
    found += [
        f"nobody sent {name}" for name in times if name not in tally.audited | dict.fromkeys(tally.perhaps)
    ]
    for line in requests:
        key, status = tally.audited.get(line["request_id"], (line["key"], None))
        if line["key"] != key or (status is not None and line["status"] != status):
            found.append(f"{line['request_id']} is of {key} with {status}: {line}")
    reloads = Counter((line["what"], line["ok"]) for line in lines if line["event"] == "reload")
    if reloads != tally.reloads:
        found.append(f"reloads {dict(reloads)}, not {dict(tally.reloads)}")
    return found


def endings(lines: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """How requests ended: status, and the error or the reason for the end."""
    return Counter(
        f"{line['status']} {line['error'] or line['finish_reason'] or 'nothing generated'}"
        for line in lines
        if line["event"] != "reload"
    )
