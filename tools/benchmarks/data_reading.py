"""Data reading bench: batches beside a training step, and K2's jsonl in and out."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.data_corpus import Figure
from benchmarks.random_data import random_folder
from benchmarks.timing import in_turns, seconds_of
from k2train.config.load import load_config
from k2train.data.chunk import open_chunk
from k2train.data.loader import Loader, Share
from k2train.data.manifest import Manifest
from k2train.data.order import make_order
from k2train.data.prepare.k2_format.chunk import read_pieces
from k2train.data.prepare.k2_format.export_folder import export_k2
from k2train.data.prepare.k2_format.import_folder import import_k2
from k2train.data.prepare.k2_format.lines import parse_lines
from k2train.launch.environment import read_launch
from k2train.parallel.grid import ProcessGrid, start_process_group, stop_process_group
from k2train.train.engine import Engine
from k2train.train.setup import Setup

ROOT = Path(__file__).resolve().parents[2]


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
