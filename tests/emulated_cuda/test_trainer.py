"""Whole runs under emulated CUDA: stopped, resumed to the bit, and moved between devices.

Would catch a snapshot that training writes over, a state that is not saved or comes back on the
wrong device, audits that only hold on a CPU, and a save that lets the device wait.
"""

from pathlib import Path
from typing import Any

import pytest

from k2train.checkpoint.file_digest import verify_root
from k2train.checkpoint.manifest import list_checkpoints
from k2train.checkpoint.verify import verify_checkpoint
from k2train.planner.compare_run import compare_run, read_run
from k2train.record.metrics import StepRecord, latest
from tests.emulated_cuda.conftest import Train
from tests.support.tiny_corpus import audited_tree, make_corpus, write_yaml
from tests.support.tiny_corpus import train as cpu_train

STEPS = 5
"""One chunk."""
WORLDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"precision": "bf16"}),
    "four": (
        4,
        {
            "parallel__tensor": 2,
            "parallel__pipeline": 2,
            "parallel__overlap": "on",
            "parallel__gathered": "again",
        },
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulated")
    make_corpus(folder / "data", 1)
    return folder


def config_of(base: Path, name: str, **changes: Any) -> Path:
    changes = {"kernels__compile": "off", "checkpoint__every_chunks": 1, **changes}
    return write_yaml(base / f"{name}.yaml", audited_tree(base, name, **changes))


def rows_of(base: Path, name: str) -> list[StepRecord]:
    return list(latest(base / "runs" / name / "metrics.jsonl"))


def root_of(base: Path, name: str) -> str:
    """The root of the last state, which the files must have too."""
    last = list_checkpoints(base / "runs" / name / "checkpoints")[-1]
    return verify_root(last, verify_checkpoint(last))


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_a_stopped_run_goes_on_to_the_bit(base: Path, cuda_train: Train, world: str) -> None:
    """Replicas and state are audited in every step; 75 says that there is more to do.

    The run that goes straight on also records its actions, which changes no bit of it.
    """
    processes, changes = WORLDS[world]
    straight = config_of(base, f"{world}-straight", **changes, profile__actions=[2, 3])
    ended = cuda_train(straight, processes=processes)
    assert ended.returncode == 0, ended.stderr
    assert "on cuda" in ended.stderr, ended.stderr

    broken = config_of(base, f"{world}-broken", **changes)
    stopped = cuda_train(broken, "run.stop_after_steps=2", processes=processes)
    assert stopped.returncode == 75, stopped.stderr
    ended = cuda_train(broken, processes=processes)
    assert ended.returncode == 0, ended.stderr

    compared = compare_run(read_run(base / "runs" / f"{world}-straight"), None)
    assert compared.run.device_type == "cuda" and len(compared.run.traces) == processes
    assert compared.comparison is not None and compared.comparison.measured.steps == (2, 3)

    root = root_of(base, f"{world}-straight")
    assert root and root_of(base, f"{world}-broken") == root
    losses = [
        [row.loss for row in rows_of(base, f"{world}-{way}")] for way in ("broken", "straight")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_a_run_moves_between_devices(base: Path, cuda_train: Train) -> None:
    """From CUDA to the CPU and back, with the losses of a run on the CPU within fp32 rounding."""
    alone = cpu_train(config_of(base, "cpu"))
    assert alone.returncode == 0, alone.stderr

    moved = config_of(base, "moved")
    for train, steps, code in (
        (cuda_train, 2, 75),
        (cpu_train, 2, 75),
        (cuda_train, None, 0),
    ):
        stop = "null" if steps is None else steps
        ended = train(moved, f"run.stop_after_steps={stop}")
        assert ended.returncode == code, ended.stderr

    found, wanted = ([row.loss for row in rows_of(base, name)] for name in ("moved", "cpu"))
    assert len(found) == STEPS
    assert found == pytest.approx(wanted, rel=1e-6)
    assert root_of(base, "moved")


def test_a_save_waits_for_its_copies_only(base: Path, cuda_train: Train, tmp_path: Path) -> None:
    """Catches copies into memory that is not pinned, which stop the host once for each tensor."""
    path = tmp_path / "waits"
    ended = cuda_train(
        config_of(base, "saving", audit__root_every_steps=0, audit__replicas_every_steps=0),
        EMULATED_CUDA_WAITS=str(path),
    )
    assert ended.returncode == 0, ended.stderr
    lines = path.read_text().splitlines()
    saving = [line for line in lines if "checkpoint/snapshot.py" in line]
    assert saving and all("stream synchronize" in line for line in saving), saving
    (step,) = [line for line in lines if "copy to cpu" in line and "optim/grad_norm.py" in line]
    assert step.startswith(f"{STEPS} copy to cpu"), step
