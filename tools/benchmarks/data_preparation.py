"""Data preparation bench: encoding, workers, chunk files and memory, against simple baselines."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from benchmarks.data_corpus import Figure, library_texts, make_recipe, workspace_of
from benchmarks.timing import in_turns
from k2train.data.prepare.allocate.allocate import plan_task
from k2train.data.prepare.encode.encode import encode_task
from k2train.data.prepare.encode.vocabulary import obtain_tokenizer
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.run.pipeline import prepare
from k2train.data.prepare.sources.listing import list_sources
from k2train.data.prepare.write.write_chunk import chunk_task


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
