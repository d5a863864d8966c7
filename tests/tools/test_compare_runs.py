"""Comparison of runs: the first differing step and tensor, by losses, state roots and tensors."""

import json
from pathlib import Path
from typing import Any

import compare_runs
import pytest

from k2train.checkpoint.manifest import seal
from k2train.errors import RunError
from k2train.record.events import Started
from k2train.record.ledger import Ledger
from k2train.state_digest import short_digests, state_root
from tests.support.events import event

NAMES = ("embedding.weight", "layers.0.mlp.up.weight", "norm.weight")
STATES = ("master", "exp_avg", "exp_avg_sq")


def digests(step: int, changed: str = "") -> dict[str, str]:
    """Of a state after `step`; the key `changed` has another digest."""
    keys = [f"{name}.{state}" for name in NAMES for state in STATES]
    return {
        key: f"{step:016x}{number + 100 * (key == changed):016x}" for number, key in enumerate(keys)
    }


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(
    run: Path,
    steps: int = 8,
    loss_from: int = 99,
    state_from: int = 99,
    every: int = 2,
    tensors: bool = True,
    checkpoints: tuple[int, ...] = (4,),
    changed: str = f"{NAMES[1]}.exp_avg",
    adam_offset: int = 0,
) -> Path:
    """A record of `steps` steps with a root every `every`.

    Losses, and one digest, are others from a step on.
    """

    def state(step: int) -> tuple[str, dict[str, str]]:
        found = digests(step, changed if step >= state_from else "")
        return state_root(found, step, step + adam_offset * (step >= state_from)), found

    rows, roots = [], []

    for step in range(1, steps + 1):
        row = {
            "step": step,
            "attempt": 1,
            "chunk": "chunk_000",
            "loss": 5.0 / step + (step >= loss_from) * 1e-6,
        }
        if every and step % every == 0:
            root, found = state(step)
            row["state_root"] = root
            roots.append(
                {"step": step, "attempt": 1, "root": root, "tensors": short_digests(found)}
            )
        rows.append(row)

    write_lines(run / "metrics.jsonl", rows)
    if tensors and roots:
        write_lines(run / "state_roots.jsonl", roots)
    for number, step in enumerate(checkpoints):
        root, found = state(step)
        manifest = {
            "format": 1,
            "name": f"ckpt_{number:03d}",
            "step": step,
            "adam_steps": step,
            "consumed_tokens": 0,
            "chunks": {"consumed": number},
            **{key: {} for key in ("config", "data", "files")},
            "tensors": {"model": {}, "optimizer": {}},
        }
        if every:
            manifest["state"] = {"root": root, "digests": found}
        path = run / "checkpoints" / f"ckpt_{number:03d}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(json.dumps(seal(manifest)))

    return run


def found(tmp_path: Path, by_root: bool = False, **changes: Any) -> list[str]:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", **changes)
    return compare_runs.differences(a, b, strict=True, by_root=by_root)


def test_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(tmp_path) == []
    runs = [str(tmp_path / name) for name in "ab"]
    assert compare_runs.main([*runs, "--assert-equal"]) == 0
    assert compare_runs.main([*runs, "--by-root"]) == 0
    assert [line.partition("are ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "equal, bit for bit: 8 steps, the roots of 4 states, ckpt_000",
        "equal, by the roots of their states: the roots of 4 states",
    ]


def test_what_was_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches two runs that are called equal, of which nearly nothing was compared."""
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    lines = (b / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (b / "metrics.jsonl").write_bytes(b"".join(lines[:2] + lines[4:]))
    assert compare_runs.main([str(a), str(b)]) == 0
    assert ": 6 steps, " in (out := capsys.readouterr().out)
    assert "; 2 steps of one run alone, the first is 3: --assert-equal asks" in out


def test_the_first_step_and_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A moment that differs while every loss still agrees."""
    (line,) = found(tmp_path, state_from=5)
    assert line.startswith("step 6 is the first whose state differs: root ")
    assert line.endswith(f"; last equal at step 4; 1 of 3 tensors differ: {NAMES[1]}")
    assert compare_runs.main([str(tmp_path / name) for name in "ab"]) == 1
    assert capsys.readouterr().out.strip() == line


def test_a_loss_that_differs_before_a_root(tmp_path: Path) -> None:
    """Both are told, the loss first."""
    lines = found(tmp_path, loss_from=3, state_from=3)
    assert [line[: line.index(":")] for line in lines] == [
        "step 3 is the first that differs",
        "step 4 is the first whose state differs",
    ]
    assert "last equal at step 2" in lines[1]


def test_roots_alone_name_no_tensor_until_a_checkpoint_does(tmp_path: Path) -> None:
    """Runs that recorded roots only: the tensor is named where both have a manifest with digests,
    if that is later.
    """
    (line,) = found(tmp_path, state_from=1, tensors=False)
    assert "step 2 is the first" in line and "nothing earlier" in line
    assert line.endswith(f"; at step 4 1 of 3 tensors differ: {NAMES[1]}")
    short = [
        make_run(tmp_path / name, state_from=n, tensors=False, checkpoints=())
        for name, n in (("c", 3), ("d", 9))
    ]
    (line,) = compare_runs.differences(*short, strict=True)
    assert line.endswith("; last equal at step 2")


def test_moments_of_thinned_checkpoints(tmp_path: Path) -> None:
    """Their files are gone, their digests are not."""
    runs = [
        make_run(tmp_path / name, state_from=n, tensors=False) for name, n in (("a", 9), ("b", 3))
    ]
    for run in runs:
        (run / "checkpoints" / "ckpt_000" / "thinned.json").write_text("{}")
    (line,) = compare_runs.differences(*runs, strict=True)
    assert "1 of 3 tensors differ" in line


def test_updates_applied_count(tmp_path: Path) -> None:
    """The same tensors after another number of updates are another state."""
    (line,) = found(tmp_path, state_from=6, changed="", adam_offset=-1)
    assert line.endswith("no tensor differs, so the number of updates applied does")


def test_layouts_are_compared_by_root(tmp_path: Path) -> None:
    """Losses of two layouts differ by rounding; with --by-root they are not looked at."""
    assert found(tmp_path, by_root=True, loss_from=1) == []
    other = make_run(tmp_path / "c", state_from=7, loss_from=1)
    (line,) = compare_runs.differences(tmp_path / "a", other, strict=True, by_root=True)
    assert line.startswith("step 8 is the first whose state differs")


def test_runs_without_roots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Older runs are compared by what they have; asked for roots, there is nothing to say."""
    assert found(tmp_path, every=0) == []
    old = [str(tmp_path / "b"), str(make_run(tmp_path / "c", every=0, loss_from=5))]
    assert compare_runs.main(old) == 1
    assert capsys.readouterr().out.startswith("step 5 is the first that differs: loss")
    assert compare_runs.main([*old, "--by-root"]) == 2
    assert "audit.root_every_steps" in capsys.readouterr().err


def test_a_run_that_contradicts_itself(tmp_path: Path) -> None:
    """A checkpoint whose root is not the one its run recorded for that step."""
    a = make_run(tmp_path / "a")
    rows = [json.loads(line) for line in (a / "metrics.jsonl").read_text().splitlines()]
    rows[3]["state_root"] = "0" * 64
    write_lines(a / "metrics.jsonl", rows)
    lines = compare_runs.differences(a, make_run(tmp_path / "b"), strict=True)
    assert any(
        "contradicts itself: the root of step 4 is 0000000000000000 in metrics.jsonl and " in x
        for x in lines
    )


def test_only_the_last_attempt_of_a_step_counts(tmp_path: Path) -> None:
    """A step done again after a restart has its root twice; the later one is the run's."""
    a, b = make_run(tmp_path / "a", checkpoints=()), make_run(tmp_path / "b", checkpoints=())
    for file, key in (("metrics.jsonl", "state_root"), ("state_roots.jsonl", "root")):
        rows = [json.loads(line) for line in (b / file).read_text().splitlines()]
        write_lines(
            b / file,
            [*({**row, key: "f" * 64} for row in rows), *({**row, "attempt": 2} for row in rows)],
        )
    assert compare_runs.differences(a, b, strict=True) == []


def test_nothing_in_common(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", every=0)
    with pytest.raises(RunError, match="no checkpoint in common"):
        compare_runs.differences(a, make_run(tmp_path / "b", every=0, checkpoints=()), strict=False)
    with pytest.raises(RunError, match="no step in common"):
        compare_runs.differences(a, make_run(tmp_path / "c", steps=0), strict=False)


def test_a_difference_that_may_be_rounding_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a hunt for a fault where sums had no fixed order."""
    runs = [make_run(tmp_path / name, loss_from=start) for name, start in (("a", 99), ("b", 3))]
    for run, deterministic in zip(runs, (True, False), strict=True):
        ledger = Ledger(run / "ledger.jsonl")
        ledger.append(event(Started, attempt=1, deterministic=deterministic))
    assert compare_runs.main(list(map(str, runs))) == 1
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and notes[0].startswith(
        f"note: {runs[1]}: attempt 1 computed with kernels.deterministic false"
    )
