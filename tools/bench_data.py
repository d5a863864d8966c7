"""Data pipeline benchmark: each stage against a simple baseline, as ratios within one run.

    python tools/bench_data.py [--only NAME ...] [--rounds N] [--folder DIR]

- Stage and baseline are measured in turns, and the median is shown: absolute rates belong to a
  machine, ratios mostly do not.
- The text is the standard library of the Python that runs this; the folders are temporary.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from command_line import Parser, command

from benchmarks.random_data import random_folder
from benchmarks.timing import in_turns, seconds_of
from k2train.config.load import load_config
from k2train.data.chunk import open_chunk
from k2train.data.loader import Loader, Share
from k2train.data.manifest import Manifest
from k2train.data.order import make_order
from k2train.data.prepare.allocate.allocate import plan_task
from k2train.data.prepare.encode.encode import encode_task
from k2train.data.prepare.encode.vocabulary import obtain_tokenizer
from k2train.data.prepare.k2_format.chunk import read_pieces
from k2train.data.prepare.k2_format.export_folder import export_k2
from k2train.data.prepare.k2_format.import_folder import import_k2
from k2train.data.prepare.k2_format.lines import parse_lines
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.run.pipeline import prepare
from k2train.data.prepare.sources.listing import encode_tasks, list_sources
from k2train.data.prepare.sources.stdlib import stdlib_root
from k2train.data.prepare.workspace import Workspace
from k2train.data.prepare.write.write_chunk import chunk_task
from k2train.errors import EXIT_DONE
from k2train.launch.environment import read_launch
from k2train.parallel.grid import ProcessGrid, start_process_group, stop_process_group
from k2train.train.engine import Engine
from k2train.train.setup import Setup

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Figure:
    """One row of the table: subject, baseline, their medians with a unit, and the target if any."""

    what: str
    against: str
    mine: float
    theirs: float
    unit: str
    aim: str = "-"

    @property
    def ratio(self) -> float:
        """Subject over baseline."""
        return self.mine / self.theirs


def library_texts() -> list[str]:
    """Read Python files of the standard library."""
    paths = sorted(stdlib_root().glob("*.py")) + sorted(stdlib_root().glob("*/*.py"))
    texts = (
        path.read_text("utf-8", errors="replace") for path in paths if "packages" not in str(path)
    )
    return [text for text in texts if text][:700]


def write_corpus(path: Path, copies: int) -> int:
    """Write the standard library `copies` times as jsonl; return the file's size in bytes.

    Documents have some 3,000 characters.
    """
    with path.open("w", encoding="utf-8") as stream:
        for copy in range(copies):
            for number, text in enumerate(library_texts()):
                for start in range(0, len(text), 3000):
                    stream.write(
                        json.dumps(
                            {"id": f"{copy}/{number}/{start}", "text": text[start : start + 3000]}
                        )
                        + "\n"
                    )
    return path.stat().st_size


def make_recipe(folder: Path, name: str, copies: int, **changes: object) -> Recipe:
    """Recipe over `copies` of the standard library in one jsonl file; all share one tokenizer."""
    corpus = folder / f"corpus_{copies}"
    corpus.mkdir(exist_ok=True)
    if not (corpus / "part.jsonl").exists():
        write_corpus(corpus / "part.jsonl", copies)

    tree: dict[str, object] = {
        "name": name,
        "output": folder / name,
        "seed": 1,
        "sequence_length": 256,
        "chunks": 2,
        "tokenizer": {
            "model": folder / "tokenizer.model",
            "train": {"vocab_size": 4096, "max_bytes": 2**23},
        },
        "subsets": {
            "code": {
                "kind": "jsonl",
                "paths": [str(corpus / "*.jsonl")],
                "origin": "bench",
                "id_key": "id",
            }
        },
    }
    return Recipe.model_validate(tree | changes)


def workspace_of(recipe: Recipe, folder: Path) -> Workspace:
    """Create a workspace whose sources are listed and cut into tasks."""
    listing = list_sources(recipe)
    tokenizer = obtain_tokenizer(recipe, listing, Progress(None))
    return Workspace.create(
        folder, folder / "out.tmp", recipe, tokenizer, encode_tasks(recipe, listing)
    )


def bench_encode(folder: Path, rounds: int) -> Iterator[Figure]:
    """Encoding against sentencepiece alone, on one core."""
    tokenizer = obtain_tokenizer(
        recipe := make_recipe(folder, "encode", 1), list_sources(recipe), Progress(None)
    )

    alone = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    pieces = [
        text[start : start + 3000]
        for text in library_texts()
        for start in range(0, len(text), 3000)
    ]
    mebibytes = sum(len(piece.encode()) for piece in pieces) / 2**20
    workspace = workspace_of(recipe, folder / "encode.work")

    mine, one, many, task = in_turns(
        rounds,
        lambda: tokenizer.encode_arrays(pieces),
        lambda: [alone.encode(piece) for piece in pieces],
        lambda: alone.encode(pieces, num_threads=1),
        lambda: encode_task(workspace, 0),
    )

    # The faster of sentencepiece's two ways is the baseline.
    best = mebibytes / min(one, many)
    yield Figure("encode text", "sentencepiece alone", mebibytes / mine, best, "MiB/s", ">= 0.9")
    yield Figure(
        "encode task: read, encode, sort, write",
        "sentencepiece alone",
        mebibytes / task,
        best,
        "MiB/s",
    )


def bench_cores(folder: Path, rounds: int) -> Iterator[Figure]:
    """The whole preparation with two workers against one."""

    def run(workers: int) -> None:
        recipe = make_recipe(
            folder, f"cores_{workers}", 4, executor={"workers": workers, "task_bytes": 2**22}
        )
        prepare(split(recipe), force=True)

    def split(recipe: Recipe) -> Recipe:
        parts = folder / "corpus_parts"
        if not parts.exists():
            parts.mkdir()
            for number in range(8):
                shutil.copy(folder / "corpus_4" / "part.jsonl", parts / f"part_{number}.jsonl")
        subset = recipe.subsets["code"].model_copy(update={"paths": (str(parts / "*.jsonl"),)})
        return recipe.model_copy(update={"subsets": {"code": subset}})

    two, one = in_turns(max(1, rounds // 3), lambda: run(2), lambda: run(1))
    yield Figure("prepare with 2 workers", "1 worker", 1 / two, 1 / one, "runs/s")


def bench_chunk(folder: Path, rounds: int) -> Iterator[Figure]:
    """Writing a chunk against a plain copy of the same bytes, both synced."""
    subset = {
        "kind": "jsonl",
        "paths": [str(folder / "corpus_4" / "*.jsonl")],
        "id_key": "id",
        "repeat": 8,
    }
    make_recipe(folder, "none", 4)
    recipe = make_recipe(
        folder, "chunk", 4, chunks=1, sequence_length=2048, subsets={"code": subset}
    )

    workspace = workspace_of(recipe, folder / "chunk.work")
    for number in range(len(workspace.tasks)):
        encode_task(workspace, number)
    plan_task(workspace)
    chunk_task(workspace, 0)

    npy = workspace.target / "chunk_000.npy"
    size = npy.stat().st_size / 2**20

    def copy() -> None:
        with npy.open("rb") as source, (folder / "copy.npy").open("wb") as target:
            shutil.copyfileobj(source, target, 2**23)
            os.fsync(target.fileno())

    mine, theirs = in_turns(rounds, lambda: chunk_task(workspace, 0), copy)
    yield Figure(
        f"write a chunk of {size:.0f} MiB",
        "copy of its .npy",
        size / mine,
        size / theirs,
        "MiB/s",
        ">= 0.5",
    )


def bench_loader(folder: Path, rounds: int) -> Iterator[Figure]:
    """Loading batches of the demo against its training step in one process."""
    config = load_config(
        str(ROOT / "configs/demo/stage1.yaml"), ["parallel.tensor=1", "parallel.pipeline=1"]
    )
    manifest = random_folder(folder / "loader", 8, 256, config.data.sequence_length, 4114)
    order = make_order(manifest, None, config.batch.global_sequences)

    share = Share(0, 1, config.batch.micro_sequences)
    with Loader(manifest, order, share, config.model.vocab_size) as loader:
        # All steps in order, as training reads them.
        steps = range(1, order.total_steps + 1)
        seconds = statistics.median(
            seconds_of(lambda: [loader.step(s) for s in steps]) for _ in range(rounds)
        ) / len(steps)
        batch = loader.step(1)

    start_process_group(read_launch(), torch.device("cpu"))
    try:
        setup = Setup.of(config, 1)
        engine = Engine(setup, ProcessGrid(setup.layout, 0, torch.device("cpu")))
        engine.train_step(batch, 1e-4)
        step = statistics.median(
            seconds_of(lambda: engine.train_step(batch, 1e-4)) for _ in range(max(3, rounds))
        )
    finally:
        stop_process_group()

    tokens = config.batch.global_sequences * config.data.sequence_length
    yield Figure("load a step", "seconds of a demo step", seconds * 1e3, step * 1e3, "ms", "< 0.01")
    yield Figure("load batches", "training, 1 process", tokens / seconds, tokens / step, "tokens/s")


def bench_import(folder: Path, rounds: int) -> Iterator[Figure]:
    """Importing K2's jsonl against json.loads line by line."""
    source = folder / "k2"
    source.mkdir(exist_ok=True)

    rng = np.random.default_rng(0)
    with (source / "chunk_0.jsonl").open("w", encoding="utf-8") as stream:
        for line in range(6000):
            ids = rng.integers(0, 32000, 2048).tolist()
            facts = {
                "source": "web",
                "subset_name": "refinedweb",
                "src_filename": "a.jsonl",
                "line_idx_in_src": line,
            }
            stream.write(json.dumps({"token_ids": ids, **facts}) + "\n")

    size = (source / "chunk_0.jsonl").stat().st_size / 2**20
    number = iter(range(1000))

    def loads() -> None:
        with (source / "chunk_0.jsonl").open("rb") as stream:
            for line in stream:
                json.loads(line)

    def whole() -> Manifest:
        return import_k2(source, folder / f"imported_{next(number)}")

    def parse() -> None:
        path = source / "chunk_0.jsonl"
        for _ in parse_lines(read_pieces(path), path.name, 2048, 32032):
            pass

    alone, mine, theirs = in_turns(rounds, parse, whole, loads)
    yield Figure(
        "read K2's jsonl to arrays of ids",
        "json.loads alone",
        size / alone,
        size / theirs,
        "MiB/s",
        ">= 5",
    )
    yield Figure(
        "import K2's jsonl, files written and synced",
        "json.loads alone",
        size / mine,
        size / theirs,
        "MiB/s",
        ">= 5",
    )

    manifest = whole()
    there = in_turns(1, lambda: export_k2(manifest, folder / f"exported_{next(number)}"))[0]
    yield Figure("export to K2's jsonl", "json.loads alone", size / there, size / theirs, "MiB/s")
    assert open_chunk(manifest, manifest.chunks[0]).shape == (6000, 2048), "the import is whole"


MEMORY = """
import sys
from k2train.data.prepare.write.write_chunk import chunk_task
from k2train.data.prepare.encode.encode import encode_task
from k2train.data.prepare.allocate.allocate import plan_task
from k2train.data.prepare.workspace import Workspace
from k2train.processes import peak_resident_bytes
from pathlib import Path
workspace = Workspace.open(Path(sys.argv[1]))
{
    "encode": lambda: [encode_task(workspace, n) for n in range(len(workspace.tasks))],
    "plan": lambda: plan_task(workspace),
    "chunks": lambda: [chunk_task(workspace, n) for n in range(len(workspace.chunk_names))],
}[sys.argv[2]]()
print(peak_resident_bytes())
"""


def bench_memory(folder: Path, rounds: int) -> Iterator[Figure]:
    """Peak memory of each phase's process with a 10 times larger corpus, at equal run size."""
    peaks: dict[tuple[str, int], float] = {}

    for copies in (4, 40):
        recipe = make_recipe(folder, f"memory_{copies}", copies, executor={"run_tokens": 2**21})
        workspace = workspace_of(recipe, folder / f"memory_{copies}.work")
        for phase in ("encode", "plan", "chunks"):
            command = [sys.executable, "-c", MEMORY, str(workspace.folder), phase]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[phase, copies] = int(done.stdout) / 2**20
        shutil.rmtree(workspace.folder)

    for phase in ("encode", "plan", "chunks"):
        yield Figure(
            f"peak memory of {phase}, 10x", "1x", peaks[phase, 40], peaks[phase, 4], "MiB", "= 1"
        )


BENCHES = {
    "encode": bench_encode,
    "cores": bench_cores,
    "chunk": bench_chunk,
    "loader": bench_loader,
    "import": bench_import,
    "memory": bench_memory,
}


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(
        prog="bench_data.py", description="Ratios of the data pipeline, measured in one run."
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(BENCHES), default=list(BENCHES), help="benchmarks to run"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="repetitions of each measurement (default 5)"
    )
    parser.add_argument("--folder", type=Path, help="where the temporary folders are made")

    given = parser.parse_args(arguments)
    print(
        f"{'what':45}  {'against':24}  {'k2train':>10}  {'baseline':>10}  {'unit':8}  {'ratio':>8} "
        " aim"
    )

    for name in given.only:
        with tempfile.TemporaryDirectory(prefix="k2train-bench-", dir=given.folder) as folder:
            for figure in BENCHES[name](Path(folder), given.rounds):
                print(
                    f"{figure.what:45}  {figure.against:24}  {figure.mine:10,.4g}  "
                    f"{figure.theirs:10,.4g}  {figure.unit:8}  {figure.ratio:8.4g}  {figure.aim}",
                    flush=True,
                )
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
