"""Lines on their way to a file: in order, rotated, whole or counted as lost, and never waited for."""

import errno
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from server.audit_log import AuditFile, AuditLog


def never() -> None:
    pytest.fail("a line was lost")


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


class Lost:
    """Counts lines that are lost."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def test_lines_are_written_in_order_to_a_file_of_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for start in (0, 50):  # a second server goes on where the first ended
        log = AuditLog(AuditFile(str(path), 10**6, 3), never)
        for number in range(start, start + 50):
            log.write({"number": number})
        log.close()
    assert numbers(path) == list(range(100)) and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_others_could_read_is_theirs_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "audit.jsonl"
    path.touch(0o644)
    path.chmod(0o644)
    AuditFile(str(path), 10, 1).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and "its mode is 0600 now" in caplog.text


def test_a_file_that_was_moved_away_is_begun_anew_when_told(tmp_path: Path) -> None:
    """As logrotate does: move, then SIGHUP."""
    path, moved = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl-20260101"
    log = AuditLog(AuditFile(str(path), 10**6, 3), never)
    log.write({"number": 1})
    log.close()
    log = AuditLog(AuditFile(str(path), 10**6, 3), never)
    path.rename(moved)
    log.reopen()
    log.write({"number": 2})
    log.close()
    assert numbers(moved) == [1] and numbers(path) == [2]


def test_a_file_that_cannot_be_begun_anew_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    log = AuditLog(AuditFile(str(folder / "audit.jsonl"), 10**6, 3), never)
    folder.rename(tmp_path / "moved")
    log.reopen()
    log.write({"number": 1})
    log.close()
    assert numbers(tmp_path / "moved" / "audit.jsonl") == [1] and "goes on in the old file" in caplog.text


def test_a_full_file_is_kept_under_another_name_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(AuditFile(str(path), 100, 2), never)
    for number in range(10, 40):
        log.write({"number": number})  # 15 bytes each: 6 to a file
    log.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "audit.jsonl",
        "audit.jsonl.1",
        "audit.jsonl.2",
    ]
    assert numbers(path) == list(range(34, 40))
    assert numbers(tmp_path / "audit.jsonl.1") == list(range(28, 34))
    assert numbers(tmp_path / "audit.jsonl.2") == list(range(22, 28))


def test_a_line_longer_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    file = AuditFile(str(tmp_path / "a"), 5, 9)
    for line in (b"long enough\n", b"x\n", b"y\n"):
        file.write(line)
    file.close()
    assert (tmp_path / "a.1").read_bytes() == b"long enough\n" and (tmp_path / "a").read_bytes() == b"x\ny\n"


def test_a_file_that_cannot_be_renamed_grows_on_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    file = AuditFile(str(path), 10, 3)

    def refuse(*_names: Any) -> None:
        raise PermissionError(errno.EACCES, "not allowed")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        for number in range(5):
            file.write(b"line %d\n" % number)
    assert len(path.read_bytes().splitlines()) == 5
    file.write(b"line 5\n")
    file.close()
    assert path.read_bytes() == b"line 5\n" and (tmp_path / "audit.jsonl.1").stat().st_size == 35


def test_a_disk_that_fills_up_within_a_line_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    lost = Lost()
    log = AuditLog(AuditFile(str(path), 10**6, 3), lost)
    really = os.write
    room = [30]  # bytes that the disk has

    def write(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        num_written = really(file, data[: room[0]])
        room[0] -= num_written
        return num_written

    monkeypatch.setattr(os, "write", write)
    for number in range(10, 15):
        log.write({"number": number})
    log.close()
    assert numbers(path) == [10, 11] and lost.count == 3


def test_a_burst_of_losses_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    lost = Lost()
    moments = iter([0.0, 1.0, 59.0, 118.0, 180.0])
    log = AuditLog(AuditFile("/dev/full", 100, 1), lost, clock=lambda: next(moments))
    for number in range(5):
        log.write({"number": number})
    log.close()
    assert lost.count == 5
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "neurontune_audit_failures_total" in caplog.text


def test_a_disk_that_hangs_holds_nobody_up_and_the_queue_is_bounded(tmp_path: Path) -> None:
    hanging, entered = threading.Event(), threading.Event()

    class Slow(AuditFile):
        def write(self, line: bytes) -> None:
            entered.set()
            assert hanging.wait(20)
            super().write(line)

    lost = Lost()
    path = tmp_path / "audit.jsonl"
    log = AuditLog(Slow(str(path), 10**6, 1), lost, capacity=4)
    log.write({"number": 0})
    assert entered.wait(20)
    for number in range(1, 10):
        log.write({"number": number})
    assert lost.count == 5
    hanging.set()
    log.close()
    assert numbers(path) == [0, 1, 2, 3, 4]
    log.write({"number": 5})
    assert lost.count == 6


def test_stdout_is_a_target(capfd: pytest.CaptureFixture[str]) -> None:
    log = AuditLog(AuditFile("-", 10, 1), never)
    for number in range(3):
        log.write({"number": number, "text": "é\n"})
    log.close()
    assert [json.loads(line)["number"] for line in capfd.readouterr().out.splitlines()] == [0, 1, 2]
