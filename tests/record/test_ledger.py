"""Run ledger and environment facts: hash chain, crashes, concurrent writers.

Would catch a broken chain that passes, a crash that costs a line, two writers mixing their lines,
and facts that name the host or another project's commit.
"""

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from k2train import fault_injection
from k2train.errors import RunError
from k2train.record.events import (
    CheckpointSaved,
    Faults,
    Finished,
    Resumed,
    Started,
    Stopped,
    Straggler,
    of_kind,
)
from k2train.record.jsonl import encode_line
from k2train.record.ledger import Ledger, read_ledger, run_notes
from k2train.record.line_check import TAIL, with_check
from k2train.record.system_info import environment_facts, processor_name
from tests.support.events import entries, event

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys
from k2train.record.events import Straggler
from k2train.record.ledger import Ledger
ledger = Ledger(sys.argv[1])
print("ready", flush=True)
while True:
    entry = ledger.append(Straggler(attempt=1, step=1, told="x" * 3000))
    print(entry.seq, flush=True)
"""


def _ledger(path: Path, events: int) -> Ledger:
    ledger = Ledger(path)
    for index in range(events):
        ledger.append(event(CheckpointSaved, checkpoint=f"ckpt_{index:03d}", step=index))
    return ledger


STOPPED = event(Stopped, step=3)


def test_lines_are_chained_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    assert not path.exists(), "opening must not write"
    first = ledger.append(event(Started, environment={"pp": [2], "loss": float("nan")}))
    second = ledger.append(STOPPED)
    lines = path.read_bytes().split(b"\n")
    assert first.previous == "" and first.seq == 0
    assert isinstance(first.event, Started)
    assert first.event.environment == {"pp": [2], "loss": "nan"}
    assert second.previous == hashlib.sha256(lines[0]).hexdigest()
    assert ledger.head == (2, hashlib.sha256(lines[1]).hexdigest())
    assert read_ledger(path) == [first, second] == ledger.entries
    assert ledger.last(Started) == first.event and ledger.last(Finished) is None
    assert first.time.endswith("Z")


def test_opening_again_continues_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    head = _ledger(path, 3).head
    again = Ledger(path)
    assert again.repaired is None and again.head == head
    assert again.append(STOPPED).seq == 3
    assert [entry.seq for entry in read_ledger(path)] == [0, 1, 2, 3]


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    """Catches a value of a wrong type that ends every later start."""
    ledger = _ledger(tmp_path / "ledger.jsonl", 1)
    before = ledger.path.read_bytes()
    wrong: Any = "nine"
    with pytest.raises(RunError, match="line 2 has 'nine' as step"):
        ledger.append(replace(STOPPED, step=wrong))
    assert ledger.path.read_bytes() == before and ledger.append(STOPPED).seq == 1


@pytest.mark.parametrize("opener", [Ledger, read_ledger])
@pytest.mark.parametrize("step", [1, 3])
def test_a_changed_line_is_named(tmp_path: Path, opener: type, step: int) -> None:
    path = tmp_path / "ledger.jsonl"
    _ledger(path, 4)
    path.write_text(path.read_text().replace(f'"step": {step}', '"step": 9'))
    with pytest.raises(RunError, match=f"line {step + 1} does not match its own hash"):
        opener(path)


@pytest.mark.parametrize("opener", [Ledger, read_ledger])
def test_a_changed_line_with_a_new_check_breaks_the_chain(tmp_path: Path, opener: type) -> None:
    path = tmp_path / "ledger.jsonl"
    _ledger(path, 4)
    lines = [line[: -len(TAIL)] + b"}\n" for line in path.read_bytes().splitlines()]
    path.write_bytes(b"".join(map(with_check, lines)))
    opener(path)
    lines[1] = lines[1].replace(b'"step": 1', b'"step": 9')
    path.write_bytes(b"".join(map(with_check, lines)))
    with pytest.raises(RunError, match=r"line 3 does not continue line 2.*line 2 was changed"):
        opener(path)


def _without_checks(path: Path) -> None:
    """The ledger as it was written before lines carried a check."""
    old, previous = b"", ""
    for line in path.read_bytes().splitlines():
        entry = {key: value for key, value in json.loads(line).items() if key != "check"} | {
            "previous": previous
        }
        old += encode_line(entry)
        previous = hashlib.sha256(encode_line(entry)[:-1]).hexdigest()
    path.write_bytes(old)


def test_a_ledger_from_before_there_were_checks_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    _ledger(path, 3)
    _without_checks(path)
    assert (
        b"check" not in path.read_bytes().replace(b"checkpoint", b"")
        and len(read_ledger(path)) == 3
    )
    Ledger(path).append(event(Resumed, step=2))
    kinds = [type(entry.event) for entry in Ledger(path).entries]
    assert kinds == [CheckpointSaved] * 3 + [Resumed]
    Ledger(path).append(STOPPED)
    lines = path.read_bytes().splitlines(keepends=True)
    without = lines[-1][: -len(TAIL) - 1] + b"}\n"
    path.write_bytes(b"".join([*lines[:-1], without]))
    with pytest.raises(RunError, match="line 5 has no check, although earlier lines do"):
        read_ledger(path)


@pytest.mark.parametrize("events", [1, 3])
def test_every_single_bit_of_a_ledger_counts(tmp_path: Path, events: int) -> None:
    """All bits of all lines, newlines and last line included; the error names the changed line."""
    path = tmp_path / "ledger.jsonl"
    _ledger(path, events)
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), 1 if events == 1 else 3):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        number = whole.count(b"\n", 0, place // 8) + 1
        with pytest.raises(RunError, match=f"ledger.jsonl: line {number} "):
            read_ledger(path)


def test_nesting_without_end_and_what_is_not_json_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for line in (
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"a": NaN}',
        b'{"a": 1' + b"0" * 5000 + b"}",
        b"\xff\xfe{}",
    ):
        path.write_bytes(line + b"\n")
        with pytest.raises(RunError, match="line 1 is not JSON") as error:
            read_ledger(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_the_fault_point_strikes_before_anything_is_written(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path / "ledger.jsonl", 1)
    before = ledger.path.read_bytes()
    fault_injection.arm("ledger.append:error=ENOSPC", 0)
    try:
        with pytest.raises(OSError, match="No space left"):
            ledger.append(STOPPED)
    finally:
        fault_injection.arm("", 0)
    assert ledger.path.read_bytes() == before
    assert ledger.append(STOPPED).seq == 1


def test_a_removed_line_and_a_damaged_line_are_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    _ledger(path, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"".join(lines[2:]))
    with pytest.raises(RunError, match="line 2 does not continue line 1"):
        Ledger(path)
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(RunError, match="line 1 does not"):
        Ledger(path)
    path.write_bytes(lines[0] + b"{oops\n" + lines[2])
    with pytest.raises(RunError, match="line 2 is not JSON"):
        Ledger(path)
    path.write_bytes(lines[0] + b"[1]\n")
    with pytest.raises(RunError, match="line 2 holds list"):
        Ledger(path)
    path.write_bytes(lines[0] + b'{"event": "x"}\n')
    with pytest.raises(RunError, match="line 2 has no check"):
        Ledger(path)


def test_a_torn_last_line_is_moved_aside_and_said(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    _ledger(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"seq": 2, "eve')
    assert len(read_ledger(path)) == 2, "a reader leaves the torn line out"
    assert path.read_bytes() != whole, "and does not touch the file"
    ledger = Ledger(path)
    assert (
        ledger.repaired is not None
        and "15 bytes" in ledger.repaired
        and "ledger.torn" in ledger.repaired
    )
    assert path.read_bytes() == whole
    assert (tmp_path / "ledger.torn").read_bytes() == b'{"seq": 2, "eve\n'
    assert ledger.append(STOPPED).seq == 2
    assert Ledger(path).repaired is None


def test_a_file_changed_by_another_process_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    one, two = _ledger(path, 1), Ledger(path)
    one.append(STOPPED)
    with pytest.raises(RunError, match="something else writes"):
        two.append(STOPPED)
    assert len(read_ledger(path)) == 2


def test_a_full_disk_leaves_the_ledger_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = _ledger(path, 1)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(OSError, match="only 5 of"):
        ledger.append(STOPPED)
    monkeypatch.undo()
    ledger.append(STOPPED)
    assert [type(entry.event) for entry in read_ledger(path)] == [CheckpointSaved, Stopped]


def test_threads_do_not_break_the_chain(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")

    def work(name: int) -> None:
        for index in range(10):
            ledger.append(event(Straggler, attempt=name, step=index))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = of_kind(read_ledger(ledger.path), Straggler)
    assert len(events) == 40 and len({(event.attempt, event.step) for event in events}) == 40


def test_every_append_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        synced.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    monkeypatch.setattr("k2train.record.ledger.write_head", lambda *_: None)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(event(Started))
    assert len(synced) == 2, "the line, and the name of the new file"
    ledger.append(STOPPED)
    assert len(synced) == 3


def test_kill_9_never_leaves_an_unreadable_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    acknowledged = -1
    for round_index in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        said = [writer.stdout.readline() for _ in range(2)]
        time.sleep(0.05 + 0.037 * round_index)
        writer.send_signal(signal.SIGKILL)
        said += writer.stdout.read().split("\n")[:-1]
        writer.wait()
        writer.stdout.close()
        acknowledged = max([acknowledged, *map(int, said)])
        assert len(read_ledger(path)) > acknowledged, "an event that was acknowledged is gone"
    entries = Ledger(path).entries
    assert [entry.seq for entry in entries] == list(range(len(entries))) and acknowledged > 5


def test_environment_facts_name_versions_but_not_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    facts = environment_facts()
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["numpy"] and set(facts["packages"]) == {
        "k2train",
        "torch",
        "numpy",
        "safetensors",
    }
    assert facts["slurm_job_id"] == "4711"
    values = json.dumps([facts["platform"], facts["machine"], facts["packages"], facts["code"]])
    assert platform.node() not in values
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "slurm_job_id" not in environment_facts()


def test_the_commit_is_the_packages_own(tmp_path: Path) -> None:
    package = tmp_path / "k2train"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    assert environment_facts(package)["code"] is None
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert environment_facts(package)["code"] == {"commit": head, "dirty": False}
    (package / "a.py").write_text("2\n")
    assert environment_facts(package)["code"] == {"commit": head, "dirty": True}
    installed = tmp_path / ".venv" / "lib" / "k2train"
    installed.mkdir(parents=True)
    assert environment_facts(installed)["code"] is None, (
        "another project's commit was taken for ours"
    )


def test_the_processor_is_named_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a start that fails where the system has no /proc."""
    assert processor_name() == processor_name().strip()
    monkeypatch.setattr("builtins.open", mock.Mock(side_effect=FileNotFoundError))
    assert processor_name() == ""


def test_notes_tell_of_attempts_whose_bits_do_not_repeat() -> None:
    """Catches a run compared with another to the bit that never could have been its equal."""
    recorded = entries(
        event(Started, attempt=1, deterministic=False),
        event(Faults, attempt=1, faults=("end:term",)),
        event(Resumed, attempt=2, deterministic=True),
        event(Resumed, attempt=3),
        event(Resumed, attempt=4, deterministic=False),
    )
    faults, *loose = run_notes(iter(recorded))
    assert faults == "attempt 1 had faults on purpose: end:term"
    assert [line.split(": ")[0] for line in loose] == [
        f"attempt {n} computed with kernels.deterministic false" for n in (1, 4)
    ]
