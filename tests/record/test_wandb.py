"""W&B mirror: would catch a run that stops, waits or forks into a second curve because of W&B."""

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

from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord
from k2train.record.wandb import WandbMirror, WandbRun, wandb_run_id
from tests.support.command_line import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]


def _fake(monkeypatch: pytest.MonkeyPatch, **replaced: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Put a stand-in for wandb in place; returns the list of calls it gets."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, row: dict[str, Any]) -> None:
            calls.append(("log", row))
            replaced.get("log", lambda row: None)(row)

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            calls.append(("define_metric", (name, step_metric)))

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
    module.login = lambda **asked: not asked["prompt"] and replaced.get("login", lambda: True)()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def _mirror(
    tmp_path: Path, notes: list[str], mode: Any = "offline", close_seconds: float = 10.0
) -> WandbMirror:
    run = WandbRun(mode, "k2train", "demo", wandb_run_id("runs/demo#1"), {"a": 1})
    return WandbMirror(run, tmp_path, notes.append, close_seconds)


def test_rows_go_in_order_with_their_own_step_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, notes = _fake(monkeypatch), []  # type: ignore[var-annotated]
    mirror = _mirror(tmp_path, notes)
    for step, attempt in ((1, 1), (2, 1), (2, 2)):
        mirror.log(StepRecord(step, attempt))
    mirror.event("resumed from ckpt_001")
    mirror.close()
    mirror.close()
    mirror.log(StepRecord(3))
    assert notes == []
    settings = calls[0][1]
    assert settings["id"] == wandb_run_id("runs/demo#1") and settings["resume"] == "allow"
    assert settings["settings"]["console"] == "off" and settings["settings"]["disable_git"]
    assert calls[1:3] == [("define_metric", ("step", None)), ("define_metric", ("*", "step"))]
    *rows, event = [row for kind, row in calls if kind == "log"]
    assert [(row["step"], row["attempt"]) for row in rows] == [(1, 1), (2, 1), (2, 2)]
    assert "state_root" not in rows[0] and rows[0].keys() >= {"loss", "lr", "tokens_per_second"}
    assert event == {"step": 2, "event": "resumed from ckpt_001"}
    assert calls[-1] == ("finish", None)


def test_held_out_losses_have_a_name_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a curve in which two sets, or a set and its subsets, are mixed."""
    calls, notes = _fake(monkeypatch), []  # type: ignore[var-annotated]
    mirror = _mirror(tmp_path, notes)
    for name, subsets in (("held_out", {"code": 5.0, "web": 6.0}), ("news", {})):
        mirror.score(HeldOutRecord(5, 1, name, 5.5, 10, 2, 150, subsets))
    mirror.close()
    assert notes == []
    assert [row for kind, row in calls if kind == "log"] == [
        {
            "step": 5,
            "held_out_loss/held_out": 5.5,
            "held_out_loss/held_out/code": 5.0,
            "held_out_loss/held_out/web": 6.0,
        },
        {"step": 5, "held_out_loss/news": 5.5},
    ]


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
        mirror.log(StepRecord(step))
        mirror.event("x")
    mirror.close()
    assert len(notes) == 1 and type(error).__name__ in notes[0] and "\n" not in notes[0]
    assert "metrics.jsonl is complete" in notes[0]
    assert sum(kind == "log" for kind, _ in calls) <= (40 if where == "finish" else 1)


def test_a_missing_package_is_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    notes: list[str] = []
    mirror = _mirror(tmp_path / "never", notes)
    mirror.log(StepRecord(1))
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
            mirror.log(StepRecord(step))
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
    monkeypatch.setattr("k2train.record.wandb.MAX_QUEUED", 5)
    notes: list[str] = []
    mirror = _mirror(tmp_path, notes, close_seconds=0.1)
    for step in range(20):
        mirror.log(StepRecord(step))
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
        f"m.log(StepRecord(1));"
        "m.event('x'); m.close(); print('wandb' in sys.modules, threading.active_count())"
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
        "from k2train.record.wandb import WandbMirror, WandbRun, wandb_run_id;"
        "note = lambda t: print('NOTE', t);"
        "run = WandbRun('offline', 'k2train', 'demo', wandb_run_id('runs/demo'), {'lr': 1.0});"
        "m = WandbMirror(run, sys.argv[1], note);"
        "[m.log(StepRecord(s, int(sys.argv[2]), loss=5.0 / s)) for s in range(1, 9)];"
        "m.event('a sentence that can be found'); m.close(); print('closed')"
    )
    # Under another name of the machine, where this user may give it one.
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname canaryhost77 && exec "$@"', "sh"]
    if subprocess.run([*renamed, "true"], capture_output=True, check=False).returncode:
        renamed = []
    for attempt in ("1", "2"):
        command = [*renamed, sys.executable, "-c", code, str(tmp_path), attempt]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 and done.stdout == "closed\n", done.stdout + done.stderr
        assert done.stderr == "", "it must not write into the progress line"
        time.sleep(1.1 if attempt == "1" else 0)
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{wandb_run_id('runs/demo')}.wandb"))
    assert len(files) == 2, "one id, a folder for each start"
    for file in files:
        data = file.read_bytes()
        assert b"a sentence that can be found" in data and data.count(b"attempt") >= 8
        # A part of the metadata that also names host, user and program: it is there if any of it
        # is.
        assert sys.executable.encode() not in data
        assert b"canaryhost77" not in data
