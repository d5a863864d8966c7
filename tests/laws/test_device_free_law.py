"""The third law: bad input gets one clear line and exit code 2, and nothing is written.

Every case runs through the real command line. Each would catch a traceback, a mistake reported
once per rank, a message without its numbers, or a run directory that is left behind. Cases that
need no process group must also be answered before torch is imported, which takes a second or more.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2train.data.chunk import write_chunk
from k2train.data.manifest import ChunkInfo
from k2train.files import sha256_file
from tests.support import forkserver
from tests.support.command_line import HANG_SECONDS
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import (
    ROOT,
    ROWS,
    SEQUENCE,
    TRAIN,
    VOCAB,
    cold_train,
    config_tree,
    environment,
    kept_of,
    kill_all,
    make_corpus,
    start,
    train,
    trainer_job,
    wait_for,
    write_yaml,
)

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise AssertionError("torch was imported")
sys.meta_path.insert(0, Refuse())
sys.argv[0] = "k2train.train"
import runpy
runpy.run_module("k2train.train", run_name="__main__")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "data"
    make_corpus(folder, 2)
    return folder


def cold_without_torch(
    arguments: tuple[Any, ...], variables: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """The command line in a new interpreter in which importing torch is an error."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env=environment(**variables),
        cwd=ROOT,
    )


def warm_without_torch(
    arguments: tuple[Any, ...], variables: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """The same, forked off one that has imported what answers before torch."""
    return forkserver.run(
        [*TRAIN, *arguments],
        environment(**variables),
        on=forkserver.server(["tests.support.without_torch"]),
    )


def lines_without_torch(
    *arguments: Any, run: Callable[..., Any] = warm_without_torch, **variables: str
) -> list[str]:
    """The command line where importing torch is an error.

    Its stderr, after the exit code is checked.
    """
    done = run(arguments, variables)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("k2train: ") for line in lines), done.stderr
    return lines


class Case:
    """A config over the data in a folder of its own, where nothing may appear."""

    def __init__(self, folder: Path, data: Path, **changes: Any):
        self.runs = folder / "runs"
        self.path = write_yaml(
            folder / "c.yaml", config_tree(data / "manifest.json", self.runs, "bad", **changes)
        )

    def refused(
        self, *overrides: str, run: Callable[..., Any] = warm_without_torch, **variables: str
    ) -> list[str]:
        """Its lines; nothing may be there afterwards that was not before."""
        before = kept_of(self.runs), self.runs.exists()
        lines = lines_without_torch(self.path, *overrides, run=run, **variables)
        assert (kept_of(self.runs), self.runs.exists()) == before, "something was written"
        return lines

    def one_line(self, *overrides: str, **options: Any) -> str:
        lines = self.refused(*overrides, **options)
        assert len(lines) == 1, lines
        return lines[0]


def test_config_mistakes_are_told_together(tmp_path: Path, data: Path) -> None:
    """Unknown, misspelled, duplicate and mistyped keys: a line each, with its place and the nearest
    legal name.
    """
    case = Case(tmp_path, data)
    text = case.path.read_text()
    text = text.replace("  num_layers: 4\n", "  num_layers: four\n").replace(
        "  weight_decay", "  wait_decay"
    )
    text = text.replace("  hidden_size: 32\n", "  hidden_size: 32\n  hiden_size: 32\n")
    text += "run:\n  name: again\nnonsense: {a: 1}\n"
    case.path.write_text(text)
    lines = case.refused("lr.peek=1e-4", "batch.micro_sequences=0.5")
    text = "\n".join(lines)
    for words in (
        "model.num_layers: must be a whole number, is four",
        "model.hiden_size: unknown key; nearest is model.hidden_size",
        "nonsense: unknown key",
        "'lr.peek=1e-4': lr.peek: unknown key; nearest is lr.peak",
        "batch.micro_sequences: must be a whole number, is 0.5",
    ):
        assert words in text
    assert sum("duplicate" in line or "twice" in line or "again" in line for line in lines) == 1, (
        text
    )
    assert len(lines) == 6 and all(
        re.search(r"c\.yaml:\d+: |override '", line) for line in lines
    ), text


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    (
        (
            ["model.num_heads=3", "model.num_kv_heads=3"],
            1,
            ("model.hidden_size (32)", "model.num_heads (3)", "nearest"),
        ),
        (
            ["parallel.tensor=3", "parallel.sequence=false"],
            3,
            ("model.num_heads (4)", "parallel.tensor (3)", "nearest"),
        ),
        (["parallel.pipeline=5"], 5, ("model.num_layers (4)", "parallel.pipeline (5)", "nearest")),
        (
            ["parallel.tensor=2", "data.sequence_length=15"],
            2,
            ("data.sequence_length (15)", "parallel.tensor (2)"),
        ),
        (
            ["batch.micro_sequences=5"],
            1,
            ("batch.global_sequences (12)", "batch.micro_sequences (5)", "nearest"),
        ),
        ([], 5, ("batch.global_sequences (12)", "data-parallel size (5)", "nearest")),
        (
            ["parallel.tensor=2", "parallel.pipeline=2"],
            6,
            ("world size (6)", "(2) * parallel.pipeline (2) = 4", "4, 8"),
        ),
        (["lr.warmup_steps=10"], 1, ("lr.warmup_steps (10)", "(10)", "lower it")),
        (
            ["batch.global_sequences=66"],
            1,
            ("chunk_000 has 63 rows", "batch.global_sequences (66)", "lower it"),
        ),
        (["data.order=[0, 7]"], 1, ("data.order names chunk_007",)),
        (["data.order=[1, 1]"], 1, ("data.order names chunk_001 more than once",)),
        (["model.vocab_size=250"], 1, ("model.vocab_size (250)", "(251", "raise it")),
        (["data.sequence_length=32"], 1, ("data.sequence_length (32)", "(16)")),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_does_not_divide_or_fit(
    tmp_path: Path, data: Path, overrides: list[str], world: int, words: tuple[str, ...]
) -> None:
    """The numbers, the knobs and the nearest values that pass."""
    ranks = {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    variables = {} if world == 1 else ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    line = Case(tmp_path, data).one_line(*overrides, **variables)
    for word in words:
        assert word in line, line


def test_half_a_launcher_is_no_launcher(tmp_path: Path, data: Path) -> None:
    """Only RANK set would silently train a world of one, in every process."""
    assert "WORLD_SIZE, LOCAL_RANK not set" in Case(tmp_path, data).one_line(RANK="0")


SEVERAL_TASKS = (
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}, "task 0 of 4"),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "task 1 that srun started"),
    ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "task 0 of 2 that Open MPI"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "task 1 of 2 that mpiexec (PMI)"),
    ({"PMIX_RANK": "3"}, "task 3 that mpiexec (PMIx)"),
)


@pytest.mark.parametrize(
    ("variables", "words"), SEVERAL_TASKS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_start_that_is_repeated_for_every_task(
    tmp_path: Path, data: Path, variables: dict[str, str], words: str
) -> None:
    """Catches `srun python -m k2train.train`: a task that trains alone, one told to kill it."""
    line = Case(tmp_path, data).one_line(**variables)
    assert (
        words in line and "python -m k2train.launch" in line and "scripts/pretrain.sbatch" in line
    )


@pytest.mark.parametrize(
    ("variables", "words"),
    (
        ({}, "MASTER_ADDR and MASTER_PORT not set although RANK"),
        ({"MASTER_PORT": "29500"}, "MASTER_ADDR not set"),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "none"}, "MASTER_PORT must be a port, 1 to 65535"),
    ),
)
def test_no_place_to_meet(
    tmp_path: Path, data: Path, variables: dict[str, str], words: str
) -> None:
    """Catches a traceback of torch, and exit code 1, after which a launcher starts again."""
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    assert words in Case(tmp_path, data).one_line(**ranks, **variables)


def test_no_config(tmp_path: Path, data: Path) -> None:
    """A path that is not there, or is a folder."""
    for path in (tmp_path / "none.yaml", tmp_path):
        (line,) = lines_without_torch(path)
        assert str(path) in line


def rewritten(folder: Path, change: Callable[[np.ndarray], None]) -> None:
    """chunk_001 with its ids changed in place and the manifest's hash corrected, as a careless
    preparation would.
    """
    path = folder / "chunk_001.npy"
    ids = np.load(path)
    change(ids)
    np.save(path, ids)
    rehash(folder)


def rehash(folder: Path) -> None:
    manifest = (folder / "manifest.json").read_text()
    old = re.findall(r'"chunk_001".*?"sha256": "(\w+)"', manifest, re.DOTALL)[0]
    (folder / "manifest.json").write_text(
        manifest.replace(old, sha256_file(folder / "chunk_001.npy"))
    )


def beyond(ids: np.ndarray) -> None:
    ids[41, 13] = VOCAB


def other_length(folder: Path) -> None:
    ids = np.zeros((ROWS, SEQUENCE + 1), dtype=np.uint16)
    info = write_chunk(folder, "chunk_001", [ids], ROWS, VOCAB, {})
    assert isinstance(info, ChunkInfo)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(bytes(content))


def edited_manifest(old: str, new: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        text = (folder / "manifest.json").read_text()
        assert old in text
        (folder / "manifest.json").write_text(text.replace(old, new, 1))

    return edit


BAD_DATA: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "folder missing": (shutil.rmtree, ("manifest.json cannot be read",)),
    "manifest missing": (
        lambda f: (f / "manifest.json").unlink(),
        ("manifest.json cannot be read",),
    ),
    "manifest cut": (
        lambda f: os.truncate(f / "manifest.json", 300),
        ("manifest.json: not valid JSON",),
    ),
    "manifest empty": (
        lambda f: os.truncate(f / "manifest.json", 0),
        ("manifest.json: not valid JSON",),
    ),
    "manifest of another length": (
        edited_manifest(f'"sequence_length": {SEQUENCE}', '"sequence_length": 8'),
        ("tokens",),
    ),
    "manifest without a hash": (edited_manifest('"sha256"', '"sha1"'), ("chunks[0]", "'sha256'")),
    "manifest that leaves its folder": (
        edited_manifest("chunk_001.npy", "../chunk.npy"),
        ("outside the folder",),
    ),
    "chunk missing": (lambda f: (f / "chunk_001.npy").unlink(), ("chunk_001", "No such file")),
    "chunk cut": (
        lambda f: os.truncate(f / "chunk_001.npy", 1000),
        ("chunk_001", "truncated", "1000 bytes", "2144"),
    ),
    "chunk empty": (
        lambda f: os.truncate(f / "chunk_001.npy", 0),
        ("chunk_001", "not a NumPy file"),
    ),
    "chunk of another length": (other_length, ("chunk_001", "[63, 17]", "[63, 16]")),
    "chunk with another hash": (lambda f: flipped(f / "chunk_001.npy"), ("chunk_001", "sha256")),
    "id beyond the vocabulary": (
        lambda f: rewritten(f, beyond),
        ("chunk_001", "row 41, position 13", "id 251", "vocab_size 251"),
    ),
    "held-out chunk missing": (
        lambda f: (f / "held_out.npy").unlink(),
        ("held_out", "No such file"),
    ),
    "held-out chunk with another hash": (
        lambda f: flipped(f / "held_out.npy"),
        ("held_out", "sha256"),
    ),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data(tmp_path: Path, data: Path, what: str) -> None:
    """A chunk is named with what is wrong, an id with chunk, row and position."""
    damage, words = BAD_DATA[what]
    shutil.copytree(data, tmp_path / "data")
    damage(tmp_path / "data")
    line = Case(tmp_path, tmp_path / "data").one_line()
    for word in words:
        assert word in line, line


def test_answers_come_fast(tmp_path: Path, data: Path) -> None:
    """Well under the time that importing torch takes.

    Processor time, since the machine may be busy.
    """
    case = Case(tmp_path, data)
    torch_seconds = child_seconds(
        lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)
    )
    for overrides in (["model.num_heads=x"], ["parallel.tensor=2"], ["data.manifest=nowhere"]):
        seconds = [
            child_seconds(lambda given=overrides: case.one_line(*given, run=cold_without_torch))  # type: ignore[misc]
            for _ in range(2)
        ]
        assert min(seconds) < 0.5 * torch_seconds, (overrides, torch_seconds)


def child_seconds(work: Callable[[], object]) -> float:
    """Processor time of the processes that `work` runs to their end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.slow
def test_torchrun_tells_once(tmp_path: Path, data: Path) -> None:
    """Four ranks that see the same mistake report it once, also when a single rank sees it."""
    shutil.copytree(data, tmp_path / "data")
    flipped(tmp_path / "data" / "chunk_001.npy")
    case = Case(tmp_path, tmp_path / "data")
    for overrides, words in (
        (["parallel.tensor=2", "parallel.pipeline=4"], "world size (4)"),
        ([], "chunk_001"),
    ):
        done = cold_train(case.path, *overrides, processes=4)
        messages = [line for line in done.stderr.splitlines() if "k2train:" in line]
        assert len(messages) == 1 and words in messages[0], done.stderr
        assert done.returncode != 0 and not case.runs.exists()
        assert re.search(r"exitcode\s*: 2\b", done.stderr), done.stderr


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, pool: GlooPool) -> Path:
    """A folder with data and a run that was stopped at step 7 of 10."""
    folder = tmp_path_factory.mktemp("earlier")
    make_corpus(folder / "data", 2)
    tree = config_tree(
        folder / "data" / "manifest.json", folder / "runs", "bad", run__stop_after_steps=7
    )
    assert pool.run(1, trainer_job, tree) == [75]
    return folder


class Earlier(Case):
    """The same config over a copy of an unfinished run."""

    def __init__(self, folder: Path, earlier: Path):
        super().__init__(folder, earlier / "data")
        shutil.copytree(earlier / "runs", self.runs)


@pytest.mark.parametrize("resume", ("must", "3"))
def test_resume_where_nothing_is(tmp_path: Path, data: Path, resume: str) -> None:
    """Asked for and not there is an error, never a fresh start."""
    line = Case(tmp_path, data).one_line(f"run.resume={resume}")
    assert "run.resume" in line and str(tmp_path / "runs" / "bad" / "checkpoints") in line


def test_resume_of_a_number_that_is_not_there(tmp_path: Path, earlier: Path) -> None:
    """What is there is listed."""
    line = Earlier(tmp_path, earlier).one_line("run.resume=9")
    assert "ckpt_009" in line and "ckpt_000, ckpt_001, ckpt_001_step_000007" in line


def test_never_resume_does_not_touch_a_run(tmp_path: Path, earlier: Path) -> None:
    """`never` where a run lies would write over its record."""
    assert "run.resume is never" in Earlier(tmp_path, earlier).one_line("run.resume=never")


@pytest.mark.parametrize(
    ("overrides", "words"),
    (
        (
            ["model.num_layers=8", "model.rope_theta=5e5"],
            ("model.num_layers: 4 -> 8", "model.rope_theta: 10000.0 -> 500000"),
        ),
        (["batch.global_sequences=6"], ("batch.global_sequences: 12 -> 6",)),
        (["run.seed=8"], ("run.seed: 7 -> 8",)),
        (["data.order=[1, 0]"], ("data.order at position 0: chunk_000", "-> chunk_001")),
        (["data.order=[0]"], ("data.order: 2 chunks -> 1 chunk",)),
        (
            ["lr.peak=0.5", "optimizer.clip_norm=2"],
            ("lr.peak: 0.01 -> 0.5", "optimizer.clip_norm: 1.0 -> 2.0"),
        ),
        (["precision=bf16"], ("precision: fp32 -> bf16",)),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_resume_as_another_run(
    tmp_path: Path, earlier: Path, overrides: list[str], words: tuple[str, ...]
) -> None:
    """All differences in one line, before and after.

    What may change (the micro-batch) is not among them.
    """
    line = Earlier(tmp_path, earlier).one_line("batch.micro_sequences=2", *overrides)
    for word in words:
        assert word in line, line
    assert "micro_sequences" not in line


def test_resume_with_other_data(tmp_path: Path, earlier: Path) -> None:
    """Chunks of the same names and other bytes are other data."""
    case = Earlier(tmp_path, earlier)
    make_corpus(tmp_path / "other", 2, seed=5)
    assert "data.order at position 0" in case.one_line(f"data.manifest={tmp_path / 'other'}")
    make_corpus(tmp_path / "tokenizer", 2, tokenizer="u" * 64)
    assert "data.tokenizer_sha256" in case.one_line(f"data.manifest={tmp_path / 'tokenizer'}")


def test_thinned_cannot_be_continued(tmp_path: Path, earlier: Path) -> None:
    """Only weights are left: continuing without moments would be another
    run under the same name.
    """
    case = Earlier(tmp_path, earlier)
    for path in (case.runs / "bad" / "checkpoints").iterdir():
        (path / "thinned.json").write_text("{}\n")
        shutil.rmtree(path / "optimizer")
    assert "thinned" in case.one_line()
    assert "thinned" in case.one_line("run.resume=1")


def test_init_from_what_does_not_fit(tmp_path: Path, earlier: Path) -> None:
    """Another model, another tokenizer, shared data, a run that is not finished, nothing there.

    Each is refused at the stage transition, with what differs.
    """
    run = earlier / "runs" / "bad"
    parent = f"run.init_from={run / 'checkpoints' / 'ckpt_001'}"
    make_corpus(tmp_path / "next", 2, seed=9)
    make_corpus(tmp_path / "tokenizer", 2, seed=9, tokenizer="u" * 64)
    case = Case(tmp_path, tmp_path / "next")
    assert "model.ffn_hidden_size: 48 -> 64" in case.one_line(parent, "model.ffn_hidden_size=64")
    assert "tokenizer" in case.one_line(parent, f"data.manifest={tmp_path / 'tokenizer'}")
    assert "chunk_000 is chunk_000 of the stage before" in case.one_line(
        parent, f"data.manifest={earlier / 'data'}"
    )
    assert "ckpt_001_step_000007, step 7 of 10, 1 of 2 chunks" in case.one_line(
        f"run.init_from={run}"
    )
    assert "neither a checkpoint nor a run directory" in case.one_line(
        f"run.init_from={tmp_path / 'next'}"
    )


def test_init_from_what_is_damaged(tmp_path: Path, earlier: Path) -> None:
    """With torch. A flipped value of the parent ends the start with one line that names it."""
    case = Earlier(tmp_path, earlier)
    parent = case.runs / "bad" / "checkpoints" / "ckpt_001"
    flipped(next((parent / "optimizer").iterdir()))
    make_corpus(tmp_path / "next", 2, seed=9)
    done = train(
        case.path,
        f"run.init_from={parent}",
        f"data.manifest={tmp_path / 'next' / 'manifest.json'}",
        "run.name=child",
    )
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert line.startswith("k2train: run.init_from: ") and "optimizer/shard-" in line
    assert not list((case.runs / "child" / "checkpoints").glob("ckpt_*"))


def test_every_checkpoint_damaged(tmp_path: Path, earlier: Path) -> None:
    """A run whose manifests are all broken is never silently started anew."""
    case = Earlier(tmp_path, earlier)
    for path in (case.runs / "bad" / "checkpoints").glob("*/manifest.json"):
        os.truncate(path, 40)
    assert "no checkpoint to continue from" in case.one_line()


@pytest.mark.parametrize("whole", (True, False), ids=("values", "header"))
def test_damaged_shards_end_a_start(tmp_path: Path, earlier: Path, whole: bool) -> None:
    """With torch, since the ranks share the reading. One line, and no checkpoint is touched.

    What shows before the values are read leaves not a byte more on the disk. Values are read once,
    into place: by then the record of the start is open.
    """
    case = Earlier(tmp_path, earlier)
    checkpoints = case.runs / "bad" / "checkpoints"
    for path in checkpoints.glob("*/optimizer/*"):
        flipped(path) if whole else os.truncate(path, path.stat().st_size - 1)
    before = kept_of(checkpoints if whole else case.runs)
    done = train(case.path)
    *before_it, line = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert whole == bool(before_it), "a run that has begun has said what it is"
    assert "none of the 3 checkpoints" in line and "optimizer/shard-" in line
    assert kept_of(checkpoints if whole else case.runs) == before


def test_a_run_directory_that_another_run_holds(tmp_path: Path, data: Path) -> None:
    """The second start names the holder; the first continues undisturbed."""
    shutil.copytree(data, tmp_path / "data")
    case = Case(tmp_path, tmp_path / "data")
    process = start(case.path, "run.allow=[faults]", K2TRAIN_FAULTS="step.done@nth=1:sleep=5")
    try:
        wait_for(case.runs / "bad" / "metrics.jsonl", process)
        # Stopped, it holds the directory for as long as the second one takes to look.
        process.send_signal(signal.SIGSTOP)
        lines = lines_without_torch(case.path)
        process.send_signal(signal.SIGCONT)
        assert len(lines) == 1 and f"held by a live run: pid {process.pid}" in lines[0]
        assert process.poll() is None, "the first run ended too early to show anything"
        output, _ = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0, output
    finally:
        kill_all(process)
