"""W&B mirror: would catch a run that stops, waits or forks into a second curve because of W&B."""

import json
import re
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2train.record.event import Event
from k2train.record.events import (
    CheckpointSaved,
    ChunkStarted,
    Resumed,
    Spike,
    Started,
    parse_entry,
)
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord
from k2train.record.wandb import WandbMirror, WandbRun, wandb_run_id
from tests.support.command_line import HANG_SECONDS
from tests.support.wandb_file import history_row, wandb_records

ROOT = Path(__file__).resolve().parents[2]


def every_event() -> list[Event]:
    """One event of each kind, as a ledger has them."""
    lines = (ROOT / "tests/record/every_event.jsonl").read_text(encoding="utf-8").splitlines()
    return [parse_entry(json.loads(line)).event for line in lines]


def _fake(monkeypatch: pytest.MonkeyPatch, **replaced: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Put a stand-in for wandb in place; returns the list of calls it gets."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, row: dict[str, Any], step: int) -> None:
            calls.append(("log", row | {"_step": step}))
            replaced.get("log", lambda row: None)(row)

        def define_metric(
            self, name: str, step_metric: str | None = None, hidden: bool = False
        ) -> None:
            calls.append(("define_metric", (name, "hidden" if hidden else step_metric)))

        def alert(self, title: str, text: str, level: str, wait_duration: float) -> None:
            calls.append(("alert", (title, text, level)))

        config = types.SimpleNamespace(
            update=lambda facts, allow_val_change: calls.append(("config", facts))
        )

        def finish(self) -> None:
            calls.append(("finish", None))
            replaced.get("finish", lambda: None)()

    def init(**settings: Any) -> Run:
        calls.append(("init", settings))
        replaced.get("init", lambda: None)()
        return Run()

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    module.Settings = dict  # type: ignore[attr-defined]
    module.Table = lambda columns, data: (columns, data)  # type: ignore[attr-defined]
    module.login = lambda **asked: not asked["prompt"] and replaced.get("login", lambda: True)()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def _mirror(
    tmp_path: Path, notes: list[str], mode: Any = "offline", close_seconds: float = 10.0
) -> WandbMirror:
    run = WandbRun(mode, "k2train", "demo", wandb_run_id("runs/demo#1"), {"a": 1})
    return WandbMirror(run, tmp_path, notes.append, close_seconds)


def _rows(calls: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    return [row for kind, row in calls if kind == "log"]


def test_rows_go_in_order_with_axes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches repeated steps that W&B drops, and a curve over the wrong axis."""
    calls, notes = _fake(monkeypatch), []  # type: ignore[var-annotated]
    mirror = _mirror(tmp_path, notes)
    for step, attempt in ((1, 1), (2, 1), (2, 2)):
        mirror.step(StepRecord(step, attempt, consumed_tokens=64 * step, loss=2.0, seconds=36.0))
    mirror.close()
    mirror.close()
    mirror.step(StepRecord(3))
    assert notes == []
    settings = calls[0][1]
    assert settings["id"] == wandb_run_id("runs/demo#1") and settings["resume"] == "allow"
    assert settings["settings"]["console"] == "off" and settings["settings"]["disable_git"]
    assert settings["settings"]["x_disable_stats"]
    assert "entity" not in settings and "tags" not in settings
    axes = dict(call for kind, call in calls if kind == "define_metric")
    assert axes.pop("loss_over_tokens/train") == "tokens"
    assert axes.pop("loss_over_hours/train") == "hours"
    assert {axes.pop(name) for name in ("step", "tokens", "hours", "attempt")} == {"hidden"}
    assert set(axes.values()) == {"step"} and {"loss/train", "optimizer/lr"} <= axes.keys()
    rows = _rows(calls)
    assert [(row["step"], row["attempt"], row["tokens"]) for row in rows] == [
        (1, 1, 64),
        (2, 1, 128),
        (2, 2, 128),
    ]
    assert [row["_step"] for row in rows] == [1, 2, 3]
    assert rows[1]["hours"] == pytest.approx(0.02)
    # What has no slash is an axis, and has no chart.
    assert {key for key in rows[0] if "/" not in key} - {"_step"} == {
        "step",
        "tokens",
        "hours",
        "attempt",
    }
    assert calls[-1] == ("finish", None)


def test_the_settings_of_a_team_reach_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _fake(monkeypatch)
    run = WandbRun("offline", "p", "n", "id", {}, "team", "stages", ("a", "b"), "why", True, 7)
    mirror = WandbMirror(run, tmp_path)
    mirror.step(StepRecord(1))
    mirror.close()
    assert _rows(calls)[0]["_step"] == 8, "behind the rows of earlier starts"
    given = calls[0][1]
    assert (given["entity"], given["group"], given["tags"], given["notes"]) == (
        "team",
        "stages",
        ("a", "b"),
        "why",
    )
    assert not given["settings"]["x_disable_stats"] and given["settings"]["x_disable_meta"]


def test_held_out_losses_have_a_name_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a curve in which two sets, or a set and its subsets, are mixed."""
    calls, notes = _fake(monkeypatch), []  # type: ignore[var-annotated]
    mirror = _mirror(tmp_path, notes)
    mirror.begin(640, 3600.0)
    for name, subsets in (("held_out", {"code": 5.0, "web": 6.0}), ("news", {})):
        mirror.score(HeldOutRecord(5, 1, name, 5.5, 10, 2, 150, subsets))
    mirror.close()
    assert notes == []
    axes = {"step": 5, "attempt": 1, "tokens": 640, "hours": 1.0}
    groups = ("loss", "loss_over_tokens", "loss_over_hours")
    assert _rows(calls) == [
        {
            **axes,
            "_step": 1,
            **{f"{group}/held_out": 5.5 for group in groups},
            "held_out_by_subset/code": 5.0,
            "held_out_by_subset/web": 6.0,
        },
        {**axes, "_step": 2, **{f"{group}/held_out_news": 5.5 for group in groups}},
    ]


def test_events_are_alerts_tables_and_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a spike that calls nobody, a benign end that does, and a table of one start alone."""
    calls, notes = _fake(monkeypatch), []  # type: ignore[var-annotated]
    first = next(event for event in every_event() if isinstance(event, ChunkStarted))
    known = {first.chunk: ("ab12", 512, "code 100%")}
    run = WandbRun("offline", "k2train", "demo", "an-id", {})
    mirror = WandbMirror(run, tmp_path, notes.append, 10.0, chunks=known)
    entries = [event for event in every_event() if isinstance(event, Started | ChunkStarted)]
    for event in entries:
        mirror.past_event(event, "2026-01-01T00:00:00Z")
    for event in every_event():
        if isinstance(event, Resumed | CheckpointSaved):
            mirror.event(event)
    for kind in ("opened", "benign"):
        mirror.event(Spike(attempt=1, policy="alert", kind=kind, step=7, loss=9.0, usual_loss=2.0))
    mirror.close()
    assert notes == []
    alerts = [alert for kind, alert in calls if kind == "alert"]
    assert alerts == [("spike opened", "step 7: loss 9.0000, usually 2.0000; policy alert", "WARN")]
    tables = {name: table for row in _rows(calls) for name, table in row.items() if name != "_step"}
    names = ("checkpoints", "chunks", "events", "starts")
    tables = {name: tables[f"tables/{name}"] for name in names}
    for columns, rows in tables.values():
        assert rows and all(len(row) == len(columns) for row in rows)
    (told,) = tables["events"][1]
    assert told[1:5] == [1, 7, "WARN", "spike opened"]
    # Of one chunk the manifest is known.
    chunks = [dict(zip(tables["chunks"][0], row, strict=True)) for row in tables["chunks"][1]]
    assert chunks[0]["sha256"] == "ab12" and chunks[0]["tokens"] == 512
    assert {row["sha256"] for row in chunks[1:]} <= {None}
    started = next(event for event in entries if isinstance(event, Started))
    facts = [facts["facts"] for kind, facts in calls if kind == "config"]
    assert facts[0]["parameters"] == facts[-1]["parameters"] == started.parameters
    assert facts[0]["code_commit"] == started.environment["code"]["commit"]
    assert facts[0].keys() >= {"world_size", "layout", "data_sha256"}


def _raise(error: BaseException) -> Callable[..., None]:
    def raising(*_: Any) -> None:
        raise error

    return raising


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("no network\nlong trace"), SystemExit(1)])
def test_a_failure_is_one_note_and_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    calls = _fake(monkeypatch, **{where: _raise(error)})
    notes: list[str] = []
    mirror = _mirror(tmp_path, notes)
    for step in range(20):
        mirror.step(StepRecord(step))
    mirror.close()
    assert len(notes) == 1 and type(error).__name__ in notes[0] and "\n" not in notes[0]
    assert "metrics.jsonl is complete" in notes[0]
    assert sum(kind == "log" for kind, _ in calls) <= (40 if where == "finish" else 1)


def test_a_missing_package_is_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    notes: list[str] = []
    mirror = _mirror(tmp_path / "never", notes)
    mirror.step(StepRecord(1))
    mirror.close()
    assert len(notes) == 1 and "not installed" in notes[0]
    assert not (tmp_path / "never").exists()


def test_a_stuck_wandb_never_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    _fake(monkeypatch, init=go_on.wait)
    notes: list[str] = []
    mirror = _mirror(tmp_path, notes, close_seconds=0.2)

    def train() -> None:
        for step in range(1000):
            mirror.step(StepRecord(step))
        mirror.close()

    # Whatever waits for W&B here waits until `go_on`, which comes last.
    training = threading.Thread(target=train, daemon=True)
    training.start()
    training.join(HANG_SECONDS)
    assert not training.is_alive(), "it waits for W&B"
    assert len(notes) == 1 and "did not finish within 0.2 s" in notes[0]
    go_on.set()


def test_a_queue_that_overflows_is_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    _fake(monkeypatch, init=go_on.wait)
    monkeypatch.setattr("k2train.record.mirror.MAX_QUEUED", 5)
    notes: list[str] = []
    mirror = _mirror(tmp_path, notes, close_seconds=0.1)
    for step in range(20):
        mirror.step(StepRecord(step))
    mirror.close()
    assert len(notes) == 1 and "5 rows wait" in notes[0]
    go_on.set()


def test_online_without_credentials_does_not_ask_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _fake(monkeypatch, login=lambda: False)
    notes: list[str] = []
    mirror = _mirror(tmp_path, notes, mode="online")
    mirror.close()
    assert len(notes) == 1 and "no credentials" in notes[0] and calls == []
    # The stand-in answers no when it is allowed to ask.
    calls = _fake(monkeypatch)
    _mirror(tmp_path, notes, mode="online").close()
    assert len(notes) == 1 and calls[0][0] == "init"


def test_disabled_imports_nothing_and_starts_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, threading; from k2train.record.metrics import StepRecord;"
        "from k2train.record.wandb import WandbMirror, WandbRun;"
        f"m = WandbMirror(WandbRun('disabled', 'p', 'n', 'id', {{}}), {str(tmp_path / 'w')!r}); "
        f"m.step(StepRecord(1));"
        "m.close(); print('wandb' in sys.modules, threading.active_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "1"] and not (tmp_path / "w").exists()


def test_run_ids_are_stable_legal_and_differ() -> None:
    assert wandb_run_id("runs/demo") == wandb_run_id("runs/demo") == "k2-9580827331582499"
    assert wandb_run_id("runs/demo") != wandb_run_id("runs/demo2")
    assert re.fullmatch(r"[a-z0-9-]{1,64}", wandb_run_id("räns/ /?#"))


def test_wandb_itself_offline_across_a_restart(tmp_path: Path) -> None:
    """The real package, in a process each, as a run that is stopped and started again."""
    pytest.importorskip("wandb")
    code = (
        "import sys; from k2train.record.metrics import StepRecord;"
        "from k2train.record.held_out import HeldOutRecord;"
        "from k2train.record.events import CheckpointSaved, Straggler;"
        "from k2train.record.wandb import WandbMirror, WandbRun, wandb_run_id;"
        "note = lambda t: print('NOTE', t);"
        "run = WandbRun('offline', 'k2train', 'demo', wandb_run_id('runs/demo'), {'lr': 1.0},"
        " system_stats=sys.argv[2] == '2');"
        "m = WandbMirror(run, sys.argv[1], note, 600);"
        "m.begin(0, 0.0);"
        "[m.step(StepRecord(s, int(sys.argv[2]), loss=5.0 / s, seconds=1.0, consumed_tokens=s * 8))"
        " for s in range(1, 9)];"
        "m.score(HeldOutRecord(8, int(sys.argv[2]), 'held_out', 0.75));"
        "m.event(Straggler(attempt=1, step=8, told='a sentence that can be found'));"
        "m.event(CheckpointSaved(checkpoint='ckpt_001', attempt=1, step=8, chunks_consumed=1,"
        " consumed_tokens=64, loss=0.5, held_out_loss=0.75, bytes=2**30, manifest_sha256='0'));"
        "m.close(); print('closed')"
    )
    # Under another name of the machine, where this user may give it one.
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname canaryhost77 && exec "$@"', "sh"]
    if subprocess.run([*renamed, "true"], capture_output=True, check=False).returncode:
        renamed = []
    for attempt in ("1", "2"):
        command = [*renamed, sys.executable, "-c", code, str(tmp_path), attempt]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0 and done.stdout == "closed\n", done.stdout + done.stderr
        assert done.stderr == "", "it must not write into the progress line"
        time.sleep(1.1 if attempt == "1" else 0)
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{wandb_run_id('runs/demo')}.wandb"))
    assert len(files) == 2, "one id, a folder for each start"
    for file in files:
        data = file.read_bytes()
        assert b"a sentence that can be found" in data
        # A part of the metadata that also names host, user and program: it is there if any of it
        # is.
        assert sys.executable.encode() not in data
        assert b"canaryhost77" not in data
    for number, file in enumerate(files, 1):
        _check_rows(file, number)


def _check_rows(file: Path, attempt: int) -> None:
    """Read the records of W&B's file back: values, axes, the table and the alert."""
    found = wandb_records(file)
    rows = [row for row in map(history_row, found) if row]
    steps = [row for row in rows if "loss/train" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["loss/train"] for row in steps] == [5.0 / step for step in range(1, 9)]
    assert [row["tokens"] for row in steps] == [8 * step for step in range(1, 9)]
    assert {row["attempt"] for row in rows if "attempt" in row} == {attempt}
    assert [row["loss/held_out"] for row in rows if "loss/held_out" in row] == [0.75]
    (path,) = [value for row in rows for key, value in row.items() if key.endswith("ints/path")]
    stored = json.loads((file.parent / "files" / path).read_text())
    assert stored["data"][0][:2] == ["ckpt_001", 8]
    axes = {
        record.metric.name: record.metric.step_metric
        for record in found
        if record.WhichOneof("record_type") == "metric"
    }
    assert axes["loss/train"] == "step" and axes["loss_over_tokens/train"] == "tokens"
    assert axes["loss_over_hours/held_out"] == "hours"
    alerts = [r.alert.title for r in found if r.WhichOneof("record_type") == "alert"]
    assert alerts == ["straggler"]
