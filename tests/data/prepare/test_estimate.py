"""Cost estimate: arithmetic on fixed rates, and readable lines for small and large recipes."""

import bz2
import gzip
import json
import lzma
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
import zstandard
from pyarrow import parquet

from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.run import density
from k2train.data.prepare.run.estimate import (
    Cost,
    Rates,
    cost,
    estimate_lines,
)
from k2train.data.prepare.run.local import CLUSTER_WORKERS, workers_of
from k2train.data.prepare.source import POSITIONS, Source, split_position
from k2train.data.prepare.sources.listing import encode_tasks, list_sources
from k2train.data.tokenizer import Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.errors import DataError

# 4 bytes a token; a core encodes 1000 bytes, and lays out 10,000 tokens, in a second.
RATES = Rates(1000.0, 4.0, 10_000.0, 3.0, 2.5, 2**20, "a tokenizer")
WEB = {"kind": "jsonl", "paths": ["web/*.jsonl"]}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 files of 10,000 bytes in the working directory: 100,000 tokens."""
    monkeypatch.chdir(tmp_path)
    Path("web").mkdir()
    for i in range(40):
        Path(f"web/{i:02d}.jsonl").write_bytes(b"x" * 10_000)


@pytest.fixture(scope="module")
def own_tokenizer() -> Tokenizer:
    return train_tokenizer([text_of(number) for number in range(50)], 300)


def recipe_of(subsets: dict[str, Any], **keys: Any) -> Recipe:
    content = {
        "name": "small",
        "output": "out",
        "seed": 1,
        "sequence_length": 10,
        "chunks": 4,
        "subsets": subsets,
    }
    return Recipe.model_validate({**content, "tokenizer": {"model": "none"}, **keys})


def test_amounts_follow_the_recipe() -> None:
    """Catches a repeat, a limit, a share or a draw left out of the cost, and text encoded once a
    repeat.
    """
    subsets = {
        "whole": {**WEB, "repeat": 2.5},
        "part": {**WEB, "documents": [0, 0.5], "limit_tokens": 20_000},
        "said": {**WEB, "expected_tokens": 1000, "repeat": 2},
    }
    needs = cost(recipe_of(subsets), RATES)
    assert needs.encoded_tokens == 100_000 + 50_000 + 1000
    assert needs.made_tokens == 250_000 + 20_000 + 2000
    assert needs.encode_seconds == pytest.approx(151_000 * 4 / 1000)
    assert needs.chunk_seconds == pytest.approx(27.2)
    assert needs.work_bytes == pytest.approx((300_000 + 50_000 + 2000) * 3)
    assert needs.output_bytes == pytest.approx(272_000 * 2.5)
    assert needs.chunk_tasks == 4
    assert cost(recipe_of(subsets, held_out={"rows": 1}), RATES).chunk_tasks == 5
    assert needs.from_files == ("whole", "part")
    assert cost(recipe_of(subsets, rows_per_chunk=100), RATES).made_tokens == 4 * 100 * 10
    assert needs.task_memory_bytes == 2**20 + 2 * 100_000
    small = recipe_of(subsets, executor={"run_tokens": 2000})
    assert cost(small, RATES).task_memory_bytes == 2**20 + 2 * 2000


@pytest.mark.parametrize("task_bytes", [2**28, 30_000, 1])
def test_tasks_are_those_that_will_be(task_bytes: int) -> None:
    """Catches a count of tasks that is not the preparation's, with and without files."""
    subsets = {
        "a": {**WEB, "documents": [0, 0.5]},
        "b": {**WEB, "documents": [0.5, 1]},
        "code": {"kind": "stdlib_code"},
    }
    recipe = recipe_of(subsets, executor={"task_bytes": task_bytes})
    assert cost(recipe, RATES).encode_tasks == len(encode_tasks(recipe, list_sources(recipe)))
    absent = {"kind": "jsonl", "paths": ["no/*.jsonl"], "expected_tokens": 30_000}
    more = recipe_of({**subsets, "absent": absent}, executor={"task_bytes": task_bytes})
    assert cost(more, RATES).encode_tasks == cost(recipe, RATES).encode_tasks + round(
        120_000 / task_bytes
    )
    alone = recipe_of({"absent": absent}, executor={"task_bytes": task_bytes})
    assert cost(alone, RATES).encode_tasks == max(1, 120_000 // task_bytes)


def test_no_time_below_that_of_the_longest_task() -> None:
    """Catches an hour promised with 1000 workers where one file alone takes a day."""
    Path("web/99.jsonl").write_bytes(b"x" * 300_000)
    needs = cost(recipe_of({"web": {**WEB}}, executor={"task_bytes": 10_000}), RATES)
    assert needs.encode_seconds == pytest.approx(700)
    assert needs.longest_encode_seconds == pytest.approx(300)
    assert needs.wall_seconds(1) == pytest.approx(needs.encode_seconds + needs.chunk_seconds)
    assert needs.wall_seconds(2) == pytest.approx(needs.wall_seconds(1) / 2)
    assert needs.wall_seconds(1000) == pytest.approx(300 + needs.chunk_seconds / 4)
    small = cost(recipe_of({"web": {**WEB, "share": [0, 0.0001]}}), RATES)
    assert small.longest_encode_seconds <= small.encode_seconds


def test_all_missing_files_are_reported_at_once() -> None:
    """Catches an estimate fixed one subset at a time, and a line without a remedy."""
    missing = {"kind": "jsonl", "paths": ["no/*.jsonl", "nor/*.jsonl"]}
    with pytest.raises(DataError) as caught:
        cost(
            recipe_of(
                {"a": missing, "web": WEB, "b": missing, "c": {**missing, "expected_tokens": 5}}
            ),
            RATES,
        )

    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["subsets.a.paths"] * 2 + [
        "subsets.b.paths"
    ] * 2
    assert lines[0].endswith("; for an estimate without the files give subsets.a.expected_tokens")


def test_lines_of_a_small_corpus() -> None:
    """Catches zeros for small amounts, and a number of workers other than will be started."""
    recipe = recipe_of({"web": WEB}, executor={"workers": 3})
    lines = estimate_lines(recipe, RATES, cost(recipe, RATES))
    assert lines[0] == "small: 100.0K tokens to encode once, 100.0K in 4 chunks of 25.0K"
    assert any(
        "encode           2           6m40s   reads about 195.31 KiB of documents" in line
        for line in lines
    )
    assert any("or 4m24s with 3 workers (executor.workers)" in line for line in lines)
    assert any(
        "disk      292.97 KiB of intermediate files, removed at the end, and 244.14 KiB of chunks"
        in line
        for line in lines
    )
    assert lines[-1] == "estimated from file sizes, as if plain text: web"
    assert not any(" 0." in line for line in lines)


@pytest.mark.parametrize(
    ("executor", "words"),
    [
        ({}, f"with {workers_of(recipe_of({'a': {'kind': 'stdlib_code'}}).executor)} worker"),
        ({}, "(all cores of this machine; executor.workers)"),
        ({"kind": "ray"}, f"with {CLUSTER_WORKERS} workers (executor.workers)"),
        ({"kind": "slurm", "partition": "main", "workers": 1}, "with 1 worker (executor.workers)"),
    ],
)
def test_workers_are_those_that_will_work(executor: dict[str, Any], words: str) -> None:
    """Catches 64 workers promised on a laptop."""
    needs = Cost(10**9, 10**9, 9, 4, 9e9, 9e9, 1.0, 1.0, 1e9, 1e9, 10**9, ())
    lines = estimate_lines(recipe_of({"web": WEB}, executor=executor), RATES, needs)
    assert any(words in line for line in lines)
    assert replace(needs, encode_seconds=10.0, chunk_seconds=10.0).wall_seconds(5) == pytest.approx(
        4.0
    )


# Files


WORDS = ["def", "return", "the", "value", "of", "a list", "self", "\n    ", "é", "x = 1", "None"]


def text_of(number: int) -> str:
    choose = random.Random(number)
    return " ".join(choose.choice(WORDS) for _ in range(choose.randrange(20, 600))) + f" {number}"


PACK = {
    "plain": ("jsonl", lambda content: content),
    "gz": ("jsonl.gz", gzip.compress),
    "zst": ("jsonl.zst", zstandard.ZstdCompressor(level=10).compress),
    "xz": ("jsonl.xz", lzma.compress),
    "bz2": ("jsonl.bz2", bz2.compress),
}


def test_tokens_of_compressed_files_are_those_that_are_made() -> None:
    """Catches file sizes taken for text, and a condition, a share or a limit that is forgotten."""
    subsets: dict[str, Any] = {}
    documents = [(number, text_of(number)) for number in range(1200)]
    lines = [
        json.dumps({"text": text, "meta": {"set": number % 2}}).encode() + b"\n"
        for number, text in documents
    ]
    for name, (suffix, pack) in PACK.items():
        Path(name).mkdir()
        for file in range(4):
            Path(f"{name}/{file}.{suffix}").write_bytes(pack(b"".join(lines[file::4])))
        subsets[name] = {"kind": "jsonl", "paths": [f"{name}/*"]}
    for name in ("parquet", "text"):
        Path(name).mkdir()
        subsets[name] = {"kind": name, "paths": [f"{name}/*"]}
    for file in range(3):
        table = arrow.table({"text": [text for _, text in documents[file::3]]})
        parquet.write_table(table, f"parquet/{file}.parquet", compression="zstd")
    for number, text in documents[:200]:
        Path(f"text/{number}.txt").write_text(text)
    subsets["where"] = {**subsets["zst"], "where": {"meta.set": [1]}, "min_characters": 900}
    subsets["share"] = {**subsets["gz"], "share": [0.0, 0.6], "origin": "shared"}

    tokenizer = train_tokenizer([text for _, text in documents[:200]], 300)
    tokens = {number: len(tokenizer.encode(text)) + 1 for number, text in documents}
    exact = dict.fromkeys(subsets, sum(tokens.values()))
    exact["text"] = sum(tokens[number] for number in range(200))
    exact["where"] = sum(tokens[n] for n, text in documents if n % 2 and len(text) >= 900)
    exact["share"] = sum(tokens.values()) * 0.6

    rates = replace(RATES, encoder=tokenizer)
    for name, subset in subsets.items():
        needs = cost(recipe_of({name: subset}), rates)
        assert needs.encoded_tokens == pytest.approx(exact[name], rel=0.15), name
        assert needs.from_files == () and needs.sampled[name] > 0
    lines_shown = estimate_lines(recipe_of({"zst": subsets["zst"]}), rates, needs)
    assert "looks into files: share 4" in lines_shown[-1]


def test_files_are_drawn_by_their_size() -> None:
    """Catches small files that speak for a large one."""
    sources = [Source("o", f"{i}", "", 1) for i in range(50)] + [Source("o", "z", "", 950)]
    drawn = density._drawn(sources, 8)
    assert sum(drawn.values()) == pytest.approx(1)
    assert drawn[sources[-1]] >= 0.9
    few = density._drawn(sources[-3:], 8)
    assert few == {sources[-3]: 1 / 952, sources[-2]: 1 / 952, sources[-1]: 950 / 952}


def test_only_files_inside_the_share_are_counted(own_tokenizer: Tokenizer) -> None:
    """Catches a share of a few texts taken as a part of their bytes."""
    Path("books").mkdir()
    for number in range(6):
        Path(f"books/{number}.txt").write_text("a" * 1000 * (number + 1))
    books = {
        "kind": "text",
        "paths": ["books/*"],
        "share": [0.0, 0.5],
        "split_by": "source",
    }
    recipe = recipe_of({"books": books})
    inside = [
        source
        for source in list_sources(recipe)["books"]
        if split_position(source.key) < POSITIONS // 2
    ]
    exact = sum(len(own_tokenizer.encode(Path(s.path).read_text())) + 1 for s in inside)
    assert 0 < len(inside) < 6
    assert cost(recipe, replace(RATES, encoder=own_tokenizer)).encoded_tokens == exact
