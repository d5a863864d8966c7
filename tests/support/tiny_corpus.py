"""Tiny data folder, a config for it, and the real command line, shared by end-to-end tests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from k2train import fault_injection
from k2train.config.load import Config
from k2train.data.chunk import write_chunk, write_manifest
from k2train.data.manifest import Manifest
from k2train.errors import UserError
from k2train.guard.control_files import ControlFiles
from k2train.guard.stop_signals import StopRequest
from k2train.launch.environment import Launch
from k2train.processes import descendants
from k2train.run_lock.lock import RunLock
from k2train.train.monitor import RunMonitor
from k2train.train.preflight import Start, prepare_start
from k2train.train.recorded_choices import run_directory
from k2train.train.run import build, train_to_end
from k2train.train.shutdown import OpenRun
from k2train.train.trainer import Trainer
from tests.support import forkserver
from tests.support.command_line import hear_signals
from tests.support.tiny_model import TINY, grid_of

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("-m", "k2train.train")
SEQUENCE = 16
VOCAB = 251
GLOBAL = 12
STEPS_PER_CHUNK = 5
# Three rows beyond the last full step, which nothing may ever read.
ROWS = GLOBAL * STEPS_PER_CHUNK + 3


def make_corpus(
    folder: Path,
    chunks: int = 4,
    seed: int = 1,
    vocab: int = VOCAB,
    held_out: bool = True,
    tokenizer: str = "t" * 64,
) -> Manifest:
    """A data folder of `chunks` chunks of random ids, 5 steps each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.Philox(key=seed))

    def chunk(name: str, rows: int) -> Any:
        ids = rng.integers(0, vocab, (rows, SEQUENCE))
        return write_chunk(
            folder, name, [ids.astype(np.uint16)], rows, vocab, {"noise": rows * SEQUENCE}
        )

    infos = [chunk(f"chunk_{i:03d}", ROWS) for i in range(chunks)]
    return write_manifest(
        folder,
        tokenizer_sha256=tokenizer,
        sequence_length=SEQUENCE,
        vocab_size=vocab,
        chunks=infos,
        held_out=chunk("held_out", 2 * GLOBAL) if held_out else None,
    )


def config_tree(manifest: Path, directory: Path, name: str, **changes: Any) -> dict[str, Any]:
    """TINY over the corpus, cosine with warm-up.

    Dotted keys changed, the dot written as two underscores.
    """
    tree = {
        section: dict(value) if isinstance(value, dict) else value
        for section, value in TINY.items()
    }
    tree["run"] |= {"name": name, "directory": str(directory)}
    tree["data"] |= {"manifest": str(manifest), "sequence_length": SEQUENCE}
    tree["batch"] = {"global_sequences": GLOBAL, "micro_sequences": 3}
    tree["lr"] = {"kind": "cosine", "peak": 1e-2, "final": 1e-3, "warmup_steps": 3}
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        if inner:
            tree.setdefault(section, {})[inner] = value
        else:
            tree[section] = value
    return tree


def write_yaml(path: Path, tree: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def environment(**variables: str) -> dict[str, str]:
    """This process's, one thread a process and no launcher's variables unless given."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}


def train(
    *arguments: Any, processes: int = 1, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end in a warm process, or with `processes` as so many ranks."""
    return forkserver.run([*TRAIN, *arguments], environment(**variables), processes=processes)


def start(*arguments: Any, processes: int = 1, **variables: str) -> forkserver.Process:
    """Start the command line warm; the caller ends it with `kill_all` or waits."""
    return forkserver.start([*TRAIN, *arguments], environment(**variables), processes=processes)


def cold_command(arguments: Sequence[Any], processes: int = 1) -> list[str]:
    """The command line of `k2train.train` for a new interpreter.

    Under torchrun when `processes` is more than 1.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
    return [*launcher, *TRAIN, *map(str, arguments)]


def cold_train(
    *arguments: Any, processes: int = 1, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The same as a user starts it, for tests of the start itself."""
    return subprocess.run(
        cold_command(arguments, processes),
        capture_output=True,
        text=True,
        timeout=forkserver.PATIENCE_SECONDS,
        env=environment(**variables),
        cwd=ROOT,
    )


def cold_start(
    arguments: Sequence[Any], stderr: int = subprocess.STDOUT, **variables: str
) -> "subprocess.Popen[str]":
    """Start a new interpreter that hears signals; the caller ends it with `kill_all` or waits."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment(**variables),
        cwd=ROOT,
        preexec_fn=hear_signals,
    )


def wait_for(path: Path, process: forkserver.Process) -> None:
    """Wait until `path` exists; fails when the process ends first."""
    deadline = time.monotonic() + forkserver.PATIENCE_SECONDS
    while not path.exists():
        assert process.poll() is None, (
            f"ended with {process.returncode} before {path.name}: {process.output()}"
        )
        assert time.monotonic() < deadline, f"no {path} after {forkserver.PATIENCE_SECONDS:.0f} s"
        time.sleep(0.002)


def kill_all(process: "subprocess.Popen[str] | forkserver.Process") -> int:
    """`kill -9` the process or launcher and all workers at once; the return code."""
    warm = isinstance(process, forkserver.Process)
    below = descendants(process.pids if warm else [process.pid])
    process.kill()
    for pid in below:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if warm:
        return process.wait()
    process.communicate(timeout=forkserver.PATIENCE_SECONDS)
    return process.returncode


def tree_of(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory with its bytes; empty without a directory."""
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def kept_of(directory: Path) -> dict[str, bytes]:
    """The same without what only says who was there last: the lease, and the heartbeats of the
    watch.
    """
    return {
        name: content
        for name, content in tree_of(directory).items()
        if not any(part == "watch" or part.startswith("lease_") for part in Path(name).parts)
    }


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
    return found


def nothing(trainer: Trainer) -> None:
    """Change nothing; the default `change`."""


@contextmanager
def opened(launch: Launch, start: Start) -> Iterator[OpenRun]:
    """A run of this rank, closed in any case, its watchdog too."""
    grid = grid_of(launch, start.setup.config)
    monitor = RunMonitor(start.setup, grid, start.directory, StopRequest())
    try:
        with OpenRun(grid, monitor) as run:
            yield run
    finally:
        monitor.close()


def _changed(
    run: OpenRun, verify: bool, change: Callable[[Trainer], None], start: Start
) -> Trainer | None:
    trainer = build(start, run, verify=verify)
    if trainer is not None:
        change(trainer)
    return trainer


def trainer_job(
    launch: Launch, tree: dict[str, Any], change: Callable[[Trainer], None] = nothing
) -> int | str:
    """A whole run in the pool, as `k2train.train.run.train` does it; `change` is done to the
    trainer before its first step.

    Returns the exit code, the one line of a user's mistake, or the name of the checkpoint that
    finished the stage.
    """
    fault_injection.arm("", launch.rank)
    try:
        config = Config.model_validate(tree)
        if launch.rank == 0:
            ControlFiles(run_directory(config)).refuse_start()
        begun = prepare_start(config, launch.world_size, verify=launch.rank == 0)
        with opened(launch, begun) as run:
            code = train_to_end(begun, run, partial(_changed, run, launch.rank == 0, change))
            if code is None:
                return f"finished: {begun.candidates[0].name}"
            run.code = code
        return run.code
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def locked_job(launch: Launch, tree: dict[str, Any]) -> int:
    """A start as the command line does it, lock included; the exit code."""
    config = Config.model_validate(tree)
    with RunLock(run_directory(config)) as lock:
        start = prepare_start(config, launch.world_size, verify=True)
        with opened(launch, start) as run:
            trainer = build(start, run, lock)
            assert trainer is not None, "there are steps to train"
            return trainer.run()


def audited_tree(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Config of a run that compares replicas and records its root in every step."""
    changes = {"audit__root_every_steps": 1, "audit__replicas_every_steps": 1, **changes}
    tree = config_tree(base / "data" / "manifest.json", base / "runs", name, **changes)
    tree["batch"]["micro_sequences"] = 3
    return tree
