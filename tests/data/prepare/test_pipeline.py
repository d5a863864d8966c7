"""Preparation through the command line: from recipe and documents to a data folder, and errors."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
import yaml
import zstandard
from pyarrow import parquet

from k2train.data.chunk import check_files, open_chunk, verify_chunk
from k2train.data.manifest import Manifest, read_manifest
from k2train.data.prepare.encode.fill_in_middle import restore
from k2train.data.prepare.load_recipe import load_recipe
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.run import pipeline
from k2train.data.prepare.run.publish import damaged
from k2train.data.prepare.sources.listing import list_sources
from k2train.data.prepare.write.text_files import write_texts
from k2train.data.source_record import Comparison, common_data, compare_data
from k2train.data.text_record import open_texts
from k2train.data.tokenizer import EOS_ID, K2_SPECIAL_TOKENS, Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.data.verify.chunks import verify_files
from k2train.data.verify.folder import verify_folder
from k2train.errors import ConfigError, DataError
from k2train.files import sha256_file
from tests.support import forkserver
from tests.support.command_line import HANG_SECONDS
from tests.support.data_folder import edit, hashes, rehash

ROOT = Path(__file__).resolve().parents[3]
LENGTH = 16


def text_of(seed: int) -> str:
    choose = random.Random(seed)
    words = [
        "def",
        "return",
        "the",
        "value",
        "of",
        "a list",
        "\n    ",
        "é",
        "x = 1",
        *K2_SPECIAL_TOKENS[:3],
        "</s>",
    ]

    return " ".join(choose.choice(words) for _ in range(choose.randint(3, 60))) + f" {seed}"


WEB = {str(number): text_of(number) for number in range(1, 121)}
BOOKS = {f"b{number}": text_of(1000 + number) for number in range(60)}
NOTES = {f"folder/n{number:02d}.txt": text_of(2000 + number) for number in range(40)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents as jsonl in two files (one compressed), as parquet and as text files; and a
    tokenizer.
    """
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "web").mkdir()
    lines = [json.dumps({"text": text}) for text in WEB.values()]
    (folder / "web" / "a.jsonl").write_text("\n".join(lines[:50]) + "\n")
    (folder / "web" / "b.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines[50:]).encode()))
    (folder / "books").mkdir()
    table = arrow.table(
        {"name": list(BOOKS), "body": list(BOOKS.values()), "other": [1] * len(BOOKS)}
    )
    parquet.write_table(table, folder / "books" / "books.parquet", row_group_size=25)
    for name, text in NOTES.items():
        (folder / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "notes" / name).write_text(text)

    train_tokenizer([*WEB.values(), *BOOKS.values()], 300).save(folder / "t.model")
    return folder


def recipe_tree(corpus: Path, output: Path) -> dict[str, Any]:
    return {
        "name": "three kinds",
        "output": str(output),
        "seed": 5,
        "sequence_length": LENGTH,
        "chunks": 4,
        "held_out": {"rows": 12},
        "document_borders": True,
        "tokenizer": {"model": str(corpus / "t.model")},
        "subsets": {
            "web": {"kind": "jsonl", "paths": [str(corpus / "web" / "*")], "share": [0.0, 0.8]},
            "books": {
                "kind": "parquet",
                "paths": [str(corpus / "books" / "*.parquet")],
                "text_key": "body",
                "id_key": "name",
                "repeat": 2,
                "fill_in_the_middle": {"psm": 0.4, "spm": 0.4},
            },
            "notes": {
                "kind": "text",
                "paths": [str(corpus / "notes" / "**" / "*.txt")],
                "repeat": 0.5,
            },
        },
        "executor": {"workers": 1, "task_bytes": 4096, "run_tokens": 1024},
    }


def write_recipe(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


TOOL = ROOT / "tools/prepare_data.py"
IMPORTED = (
    *("k2train.data.prepare.load_recipe", "k2train.data.inspect.left_out", "k2train.data.manifest"),
    *("k2train.data.tokenizer", "multiprocessing.popen_spawn_posix", "numpy.random", "zstandard"),
)
"""What the command imports and forks well, which pyarrow with its thread does not; its workers are
new interpreters.
"""


def start(*arguments: object) -> forkserver.Process:
    """Start the command as a user gives it, in a warm process."""
    return forkserver.start([TOOL, *arguments], on=forkserver.server(IMPORTED))


def prepare(
    *arguments: object, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run the command to its end."""
    return forkserver.run([TOOL, *arguments], env, on=forkserver.server(IMPORTED))


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The recipe's folder, prepared once by one worker."""
    folder = tmp_path_factory.mktemp("made")
    done = prepare(write_recipe(folder / "r.yaml", recipe_tree(corpus, folder / "out")))
    assert done.returncode == 0, done.stderr
    assert "prepared: 4 chunks of" in done.stdout
    assert not (folder / "out.tmp").exists()
    assert not (folder / "out.work").exists()
    return read_manifest(folder / "out")


def documents_in(
    manifest: Manifest, names: list[str]
) -> dict[tuple[str, str, str, int], dict[int, tuple[list[int], str]]]:
    """Pieces of each (subset, source, document, repeat) in the chunks, by offset, with the kind of
    FIM.
    """
    found: dict[tuple[str, str, str, int], dict[int, tuple[list[int], str]]] = {}
    for info in (manifest.chunk(name) for name in names):
        rows = open_chunk(manifest, info)[:]
        for line in parquet.read_table(manifest.folder / str(info.provenance)).to_pylist():
            key = (line["subset"], line["source"], line["document"], line["repeat"])
            ids = rows[line["row"], line["start"] : line["start"] + line["length"]].tolist()
            assert line["offset"] not in found.setdefault(key, {}), f"{key} is used twice"
            found[key][line["offset"]] = (ids, line["fim"])
    return found


def texts_of_both_sides(manifest: Manifest) -> list[set[int]]:
    """Texts trained on, and held out, of 300 lines that have each text twice, back to back."""
    sides = []
    for names in ([info.name for info in manifest.chunks], ["held_out"]):
        numbers = {int(key[2]) - 1 for key in documents_in(manifest, names)}
        sides.append({min(number, 299 - number) for number in numbers})
    return sides


def test_every_token_is_that_of_the_document_named_for_it(made: Manifest) -> None:
    """Catches wrong provenance, a token lost or doubled in a document, and truncation by FIM."""
    check_files(made)
    for info in made.all_chunks():
        verify_chunk(made, info)
    tokenizer = Tokenizer.load(made.folder / "tokenizer.model")
    assert (tokenizer.sha256, tokenizer.vocab_size) == (made.tokenizer_sha256, made.vocab_size)
    texts = {("web", name): text for name, text in {**WEB}.items()}
    texts = {("web/a.jsonl", str(i)): WEB[str(i)] for i in range(1, 51)}
    texts |= {("web/b.jsonl.zst", str(i)): WEB[str(i + 50)] for i in range(1, 71)}
    texts |= {("books/books.parquet", name): text for name, text in BOOKS.items()}
    texts |= {(f"notes/{name}", name): text for name, text in NOTES.items()}
    kinds: Counter[str] = Counter()
    complete = 0

    for (_, source, document, _), pieces in documents_in(
        made, [info.name for info in made.all_chunks()]
    ).items():
        at, ids = 0, []
        for offset, (part, _) in sorted(pieces.items()):
            if offset != at:
                break
            ids += part
            at += len(part)

        if ids and ids[-1] == EOS_ID:
            complete += 1
            kinds[pieces[0][1]] += 1
            assert restore(tokenizer, np.array(ids[:-1])) == texts[source, document]
            assert (pieces[0][1] == "none") == (
                not any(token >= tokenizer.base_size for token in ids)
            )

    assert complete > 150
    assert kinds["psm"] > 10 and kinds["spm"] > 10


def test_the_account_is_that_of_the_files(made: Manifest) -> None:
    """Catches an account that does not match the files, a share that is not the recipe's, and
    uneven chunks.
    """
    account = made.facts.account
    for name, repeat in (("web", 1), ("books", 2), ("notes", 0.5)):
        item = account[name]
        samples = [info.tokens_per_subset[name] // LENGTH for info in made.chunks]
        assert max(samples) - min(samples) <= 1
        assert sum(samples) == int(item["training_tokens"] * repeat) // LENGTH
        assert item["tail_tokens"] == int(item["training_tokens"] * repeat) % LENGTH

    rows = [info.rows for info in made.chunks]
    assert max(rows) - min(rows) <= 1
    assert account["web"]["outside_documents"] + account["web"]["training_documents"] + account[
        "web"
    ]["held_out_documents"] == len(WEB)
    assert 10 < account["web"]["outside_documents"] < 40

    counted: Counter[tuple[str, str]] = Counter()
    for info in made.all_chunks():
        for line in parquet.read_table(made.folder / str(info.provenance)).to_pylist():
            counted[info.name, line["subset"]] += line["length"]
        assert {n: c for n, c in info.tokens_per_subset.items() if c} == {
            name: count for (chunk, name), count in counted.items() if chunk == info.name
        }


def test_what_is_held_out_is_never_trained_on(made: Manifest) -> None:
    """Catches a held-out document in a chunk, under any repeat."""
    training = {key[:3] for key in documents_in(made, [info.name for info in made.chunks])}
    held_out = {key[:3] for key in documents_in(made, ["held_out"])}
    assert held_out and training.isdisjoint(held_out)
    assert made.held_out is not None and made.held_out.rows == 12


def test_boundaries_are_the_starts_of_documents(made: Manifest) -> None:
    """Catches boundaries off by one, or missing where a document begins inside a row."""
    for info in made.all_chunks():
        lines = parquet.read_table(made.folder / str(info.provenance)).to_pylist()
        starts = [line["row"] * LENGTH + line["start"] for line in lines if line["start"]]
        assert np.load(made.folder / str(info.borders)).tolist() == starts


def test_the_account_is_printed_on_request(made: Manifest) -> None:
    """Catches tables in front of the summary that nobody asked for, a flag that prints none, and a
    broken pipe behind `| head`.
    """
    recipe = made.folder.parent / "r.yaml"
    short, long = prepare(recipe), prepare(recipe, "--account")
    hint = f"python tools/inspect_data.py {made.folder} shows the account"
    assert short.stdout.splitlines()[-1] == hint and len(short.stdout.splitlines()) == 3
    assert long.stdout.splitlines()[-2:] == short.stdout.splitlines()[:2]
    assert "samples in a chunk" in long.stdout
    piped = subprocess.run(
        f"{sys.executable} tools/prepare_data.py {recipe} --account | true",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (piped.stdout, "roken pipe" in piped.stderr) == ("", False)
    refused = prepare(recipe, "--account", "--estimate")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--account" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_again_does_nothing(made: Manifest, corpus: Path) -> None:
    """Catches a second start that repeats work, or misses a damaged file, another recipe, or
    another tokenizer.
    """
    recipe = made.folder.parent / "r.yaml"
    before = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    done = prepare(recipe, "executor.workers=2")
    assert done.returncode == 0 and "already prepared" in done.stdout, done.stderr
    assert {path: path.stat().st_mtime_ns for path in made.folder.iterdir()} == before

    for override, words in (("seed=6", "another recipe"), ("sequence_length=1", "sequence_length")):
        done = prepare(recipe, override)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
        assert words in done.stderr

    chunk = made.folder / "chunk_001.npy"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = prepare(recipe)
    assert (
        done.returncode == 2
        and "chunk_001.npy missing or different from the manifest; --force" in done.stderr
    )
    chunk.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["chunk_001.npy", "chunk_002.parquet", "sources.json", "tokenizer.model"]
)
def test_every_file_is_checked_before_it_is_called_prepared(
    made: Manifest, tmp_path: Path, name: str
) -> None:
    """Catches "all hashes checked" said of a folder with a damaged file."""
    shutil.copytree(made.folder, tmp_path / "out")
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = prepare(made.folder.parent / "r.yaml", f"output={tmp_path / 'out'}")
    assert done.returncode == 2 and f"{name} missing or different from the manifest" in done.stderr


def test_nothing_of_the_users_is_deleted(made: Manifest, corpus: Path, tmp_path: Path) -> None:
    """Catches a work or output folder whose other content is taken for leftovers."""
    recipe = made.folder.parent / "r.yaml"
    for key, folder, output in (
        ("work", tmp_path / "mine", tmp_path / "out"),
        ("output", tmp_path / "o.tmp", tmp_path / "o"),
        ("output", tmp_path / "p", tmp_path / "p"),
    ):
        folder.mkdir()
        (folder / "precious.txt").write_text("years of work")
        (folder / "deadbeefdeadbeef").mkdir()
        (folder / "deadbeefdeadbeef" / "thesis.tex").write_text("more")
        override = [f"work={folder}"] if key == "work" else []
        done = prepare(recipe, f"output={output}", "--force", *override)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
        assert done.stderr.startswith(f"{key}: {folder}")
        assert (folder / "precious.txt").read_text() == "years of work"
        assert (folder / "deadbeefdeadbeef" / "thesis.tex").exists()


def test_one_work_folder_for_two_recipes(corpus: Path, tmp_path: Path) -> None:
    """Catches removal of one preparation's work by another that shares the scratch disk."""
    recipes = []
    for name in ("a", "b"):
        tree = recipe_tree(corpus, tmp_path / name)
        tree["work"] = str(tmp_path / "scratch")
        recipes.append(write_recipe(tmp_path / f"{name}.yaml", tree | {"seed": len(recipes)}))

    killed_after_encoding(recipes[0], tmp_path / "scratch")
    records = {path for path in (tmp_path / "scratch").rglob("record.json")}
    assert records
    assert prepare(recipes[1]).returncode == 0
    assert records <= set((tmp_path / "scratch").rglob("record.json"))
    done = prepare(recipes[0])
    assert done.returncode == 0 and "resuming the preparation" in done.stderr
    assert not (tmp_path / "scratch").exists()


def test_two_at_once_into_one_output(corpus: Path, tmp_path: Path) -> None:
    """Catches a folder made of two recipes that have separate work folders."""
    recipe = write_recipe(tmp_path / "r.yaml", recipe_tree(corpus, tmp_path / "out"))
    first = start(recipe, f"work={tmp_path / 'w1'}")
    try:
        deadline = time.monotonic() + HANG_SECONDS
        while not list((tmp_path / "w1").glob("*/runs/*")):
            assert first.poll() is None and time.monotonic() < deadline, (
                "ended before its first task"
            )
            time.sleep(0.002)
        second = prepare(recipe, "seed=6", f"work={tmp_path / 'w2'}")
    finally:
        assert first.wait(timeout=HANG_SECONDS) == 0

    assert second.returncode == 2, second.stderr
    assert "already running" in second.stderr or "another recipe" in second.stderr
    manifest = read_manifest(tmp_path / "out")
    for info in manifest.all_chunks():
        verify_chunk(manifest, info)
    assert manifest.facts.seed == 5


def test_a_folder_that_cannot_be_written_is_one_line(made: Manifest) -> None:
    """Catches a traceback where a folder cannot be created."""
    for output in ("/proc/nowhere/x", "/dev/null/x"):
        done = prepare(made.folder.parent / "r.yaml", f"output={output}")
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr


def test_workers_tasks_and_runs_change_no_byte(
    made: Manifest, corpus: Path, tmp_path: Path
) -> None:
    """Catches an order that depends on the workers, or on how much is held in memory."""
    recipe = write_recipe(tmp_path / "r.yaml", recipe_tree(corpus, tmp_path / "out"))
    done = prepare(
        recipe, "executor.workers=4", "executor.task_bytes=1000000", "executor.run_tokens=100000"
    )
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == hashes(made.folder)


def tasks_done(work: Path) -> int:
    """Records of finished tasks, of all three phases."""
    return sum(
        len(list(work.glob(f"*/{part}")))
        for part in ("runs/*/record.json", "plan/plan.json", "chunks/*.json")
    )


@pytest.mark.slow
def test_kill_9_at_ten_moments(corpus: Path, tmp_path: Path) -> None:
    """Catches other bytes after kills than without them.

    Ten kills over all phases, of the driver alone or with its workers.
    """
    tree = recipe_tree(corpus, tmp_path / "alone") | {"chunks": 24}
    alone = prepare(write_recipe(tmp_path / "alone.yaml", tree))
    assert alone.returncode == 0, alone.stderr
    recipe = write_recipe(tmp_path / "r.yaml", tree | {"output": str(tmp_path / "out")})

    work = tmp_path / "out.work"
    choose = random.Random(3)
    for kill in range(10):
        process = start(recipe)
        # Of over 30 tasks the last kill waits for the first 18.
        while tasks_done(work) < 2 * kill:
            assert process.poll() is None, "ended before its moment"
            time.sleep(0.002)

        time.sleep(choose.uniform(0, 0.03))

        if kill % 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()

        assert process.wait() == -signal.SIGKILL, "ended before it was killed"
        assert not (tmp_path / "out").exists()

    done = prepare(recipe)
    assert done.returncode == 0 and "resuming the preparation" in done.stderr, done.stderr
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert not work.exists() and not (tmp_path / "out.tmp").exists()


def killed_after_encoding(recipe: Path, work: Path) -> None:
    """Leave a preparation with at least one finished task."""
    process = start(recipe)
    deadline = time.monotonic() + HANG_SECONDS
    while not list(work.glob("*/runs/*/record.json")):
        assert process.poll() is None and time.monotonic() < deadline, "ended before its first task"
        time.sleep(0.005)
    process.kill()
    process.wait()


def test_a_source_that_changes_between_two_starts(corpus: Path, tmp_path: Path) -> None:
    """Catches chunks made of two versions of a file."""
    tree = recipe_tree(corpus, tmp_path / "out")
    (tmp_path / "web").mkdir()
    for path in (corpus / "web").iterdir():
        (tmp_path / "web" / path.name).write_bytes(path.read_bytes())
    tree["subsets"]["web"]["paths"] = [str(tmp_path / "web" / "*")]
    recipe = write_recipe(tmp_path / "r.yaml", tree)
    killed_after_encoding(recipe, tmp_path / "out.work")
    path = tmp_path / "web" / "a.jsonl"
    content = path.read_bytes()
    path.write_bytes(content + b'{"text": "more"}\n')
    done = prepare(recipe)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) <= 2, done.stderr
    assert (
        "web/a.jsonl: missing, new or changed since this preparation began"
        in done.stderr.splitlines()[-1]
    )
    path.unlink()
    assert prepare(recipe).returncode == 2
    path.write_bytes(content)
    done = prepare(recipe)
    assert done.returncode == 0, done.stderr
    path.write_bytes(content[:-20] + content[-20:].upper())
    done = prepare(recipe)
    assert (
        done.returncode == 2 and "other documents" in done.stderr and "web/a.jsonl" in done.stderr
    )
    path.write_bytes(content + b'{"text": "more"}\n')
    done = prepare(recipe, "--force")
    assert done.returncode == 0 and "prepared: " in done.stdout, done.stderr


BROKEN: list[tuple[bytes, str]] = [
    (b'{"text": "cut', "JSON"),
    (b'{"text": "\xff\xfe"}', "UTF-8"),
    (b'{"text": "x"} and more', "JSON"),
    (b'{"txt": "a"}', "text"),
    (b'{"text": 7}', "text"),
    (b"[1]", "object"),
    (b'{"text": "\\ud800"}', "surrogate"),
]


def test_broken_lines_are_listed_and_the_rest_is_prepared(corpus: Path, tmp_path: Path) -> None:
    """Catches a broken line that stops the preparation, is not listed, or shifts later line
    numbers.
    """
    tree = recipe_tree(corpus, tmp_path / "out")
    (tmp_path / "web").mkdir()
    good = [json.dumps({"text": text}).encode() for text in WEB.values()]
    lines = [*good[:60], *(line for line, _ in BROKEN), *good[60:]]
    (tmp_path / "web" / "a.jsonl").write_bytes(b"\n".join(lines))
    tree["subsets"] = {"web": {"kind": "jsonl", "paths": [str(tmp_path / "web" / "*.jsonl")]}}
    recipe = write_recipe(tmp_path / "r.yaml", tree)
    done = prepare(recipe)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 2), done.stderr
    assert (
        "subsets.web: 7 of 127 documents are broken" in done.stderr
        and "max_rejected_share" in done.stderr
    )
    done = prepare(recipe, "max_rejected_share=0.06")
    assert done.returncode == 0, done.stderr
    assert "left out of web: 7 documents broken (" in done.stdout
    listed = [
        json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    ]
    assert [(entry["file"], entry["line"]) for entry in listed] == [
        ("web/a.jsonl", 61 + i) for i in range(7)
    ]
    for entry, (_, word) in zip(listed, BROKEN, strict=True):
        assert word.lower() in entry["why"].lower(), entry
    manifest = read_manifest(tmp_path / "out")
    assert manifest.facts.account["web"]["rejected_documents"] == 7
    names = {
        key[2] for key in documents_in(manifest, [info.name for info in manifest.all_chunks()])
    }
    assert "68" in names and "61" not in names


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t, f: t["subsets"]["web"].update(paths=[str(f / "nothing" / "*.jsonl")]),
            "subsets.web.paths",
        ),
        (lambda t, f: t.update(chunks=5000), "fewer than the 5,000 chunks"),
        (lambda t, f: t["held_out"].update(rows=100000), "held"),
        (lambda t, f: t.update(rows_per_chunk=100000), "needs 400"),
        (lambda t, f: t["tokenizer"].update(model=str(f / "none.model")), "tokenizer.model"),
        (lambda t, f: t.update(output=str(f)), "is not a data folder"),
        (
            lambda t, f: t["subsets"]["web"].update(
                kind="parquet", paths=[t["subsets"]["web"]["paths"][0].replace("*", "a.jsonl")]
            ),
            "a.jsonl",
        ),
        (lambda t, f: t["executor"].update(kind="slurm", partition="main"), "sbatch"),
        (lambda t, f: t["executor"].update(kind="ray"), "pip install ray"),
    ],
    ids=[
        "no-files",
        "too-many-chunks",
        "held-out",
        "rows",
        "tokenizer",
        "not-ours",
        "kind",
        "no-slurm",
        "no-ray",
    ],
)
def test_mistakes_are_one_line(
    corpus: Path, tmp_path: Path, change: Callable[[dict[str, Any], Path], None], words: str
) -> None:
    """Catches a traceback, another exit code than 2, and a folder left half-written."""
    tree = recipe_tree(corpus, tmp_path / "out")
    change(tree, tmp_path)
    environment = {**os.environ, "PATH": "/nowhere"}
    done = prepare(write_recipe(tmp_path / "r.yaml", tree), env=environment)
    lines = [line for line in done.stderr.splitlines() if " tasks" not in line]
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    assert words in lines[0]
    assert not (tmp_path / "out").exists()


def test_recipe_mistakes_come_all_at_once(tmp_path: Path) -> None:
    """Catches a recipe checked one mistake at a time, and a misspelt key that is ignored."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: x\noutput: out\nchunks: 0\nsed: 1\nsequence_length: "
        "8\ntokenizer: {model: t}\nsubsets: {code: {kind: stdlib_code, "
        "shares: [0, 1]}, web: {kind: jsonl}}\nheld_out: {rows: 1}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path), ["held_out.rows=0", "executor.kind=slurm"])

    lines = str(caught.value).splitlines()
    for words in (
        "chunks:",
        "seed: missing",
        "sed: unknown key; nearest is seed",
        "nearest is share",
        "held_out.rows",
        "subsets.web: paths is missing",
        "executor: partition is missing",
    ):
        assert sum(words in line for line in lines) == 1, (words, lines)

    assert len(lines) == 7


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("subsets.docstrings.share=[0.0, 0.5]", "a file must be on one side"),
        ("subsets.prose.fill=true", "only one subset may have fill"),
        ("subsets.prose.share=[0.5, 0.2]", "must be ascending"),
        ("subsets.prose.documents=[0.5, 0.5]", "must be ascending"),
        ("subsets.prose.paths=[a]", "it takes no paths, origin, id_key or split_by"),
        (
            "subsets.prose.fill_in_the_middle.psm=0.6 subsets.prose.fill_in_the_middle.spm=0.6",
            "must not be above 1",
        ),
        ("rows_per_chunk=null", "fill needs rows_per_chunk"),
        ("held_out.rows=null", "give rows, or a share, or both"),
        ("tokenizer.specials=[a, a]", "names a token twice"),
    ],
)
def test_recipes_that_contradict_themselves(override: str, words: str) -> None:
    """Catches a recipe under which one file would be trained on and held out, or two subsets fill
    one gap.
    """
    with pytest.raises(ConfigError, match=words):
        load_recipe(
            str(ROOT / "configs/demo/data_stage1.yaml"), re.split(r" (?=subsets)", override)
        )


def test_identity_is_what_decides_bytes(corpus: Path, tmp_path: Path) -> None:
    """Catches an identity that changes with paths or workers, or does not change with a choice."""
    tree = recipe_tree(corpus, tmp_path / "out")
    plain = Recipe.model_validate(tree).sha256
    same: list[dict[str, Any]] = [{"output": "x"}, {"work": "y"}, {"executor": {"workers": 9}}]
    assert {Recipe.model_validate(tree | change).sha256 for change in same} == {plain}
    moved = json.loads(json.dumps(tree).replace(str(corpus), "elsewhere"))
    assert Recipe.model_validate(moved).sha256 == plain
    other: list[dict[str, Any]] = [
        {"seed": 6},
        {"chunks": 5},
        {"document_borders": False},
        {"held_out": {"rows": 13}},
    ]

    assert plain not in {Recipe.model_validate(tree | change).sha256 for change in other}
    turned = dict(reversed(tree["subsets"].items()))
    assert Recipe.model_validate(tree | {"subsets": turned}).sha256 != plain, (
        "rows follow the order of the subsets"
    )


def test_a_link_is_no_other_file(corpus: Path, tmp_path: Path) -> None:
    """Catches documents read twice through a link, and an origin that depends on the target of a
    link.
    """
    (tmp_path / "web").symlink_to(corpus / "web")
    (tmp_path / "latest").symlink_to(corpus / "web")
    tree = recipe_tree(corpus, tmp_path / "out")
    tree["subsets"] = {
        "web": {
            "kind": "jsonl",
            "paths": [str(tmp_path / "web" / "*"), str(tmp_path / "latest" / "*")],
        }
    }

    recipe = Recipe.model_validate(tree)
    assert [source.key for source in list_sources(recipe)["web"]] == [
        "web/a.jsonl",
        "web/b.jsonl.zst",
    ]
    tree["subsets"]["web"]["paths"] = [str(tmp_path / "latest" / "*")]
    assert Recipe.model_validate(tree).origin_of("web") == "latest"


def test_equal_texts_are_on_one_side(corpus: Path, tmp_path: Path) -> None:
    """Catches a text that occurs twice and is held out once, across subsets or shares."""
    (tmp_path / "web").mkdir()
    texts = [text_of(n) + f" twin {n}" for n in range(150)]
    lines = [json.dumps({"text": text}) for text in [*texts, *reversed(texts)]]
    (tmp_path / "web" / "a.jsonl").write_text("\n".join(lines))
    tree = recipe_tree(corpus, tmp_path / "out")
    both = {"kind": "jsonl", "paths": [str(tmp_path / "web" / "*")], "drop_duplicates": True}
    tree |= {
        "subsets": {
            "one": {**both, "documents": [0.0, 0.5]},
            "two": {**both, "documents": [0.5, 1.0]},
        }
    }

    tree |= {"chunks": 2, "held_out": {"share": 0.3}}
    done = prepare(write_recipe(tmp_path / "r.yaml", json.loads(json.dumps(tree))))
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "out")
    sides = texts_of_both_sides(manifest)
    assert len(sides[0]) > 50 and len(sides[1]) > 15 and sides[0].isdisjoint(sides[1])
    tree["subsets"]["two"]["drop_duplicates"] = False
    with pytest.raises(ConfigError, match="could be held out, and trained on in the other"):
        load_recipe(str(write_recipe(tmp_path / "r.yaml", json.loads(json.dumps(tree)))))


def test_other_versions_make_the_same_content(made: Manifest, tmp_path: Path) -> None:
    """Catches data made again, by another Python and another writer of Parquet, that passes for
    other data; and other data that passes for the same.
    """
    shutil.copytree(made.folder, tmp_path / "again")
    for info in made.all_chunks():
        path = tmp_path / "again" / str(info.provenance)
        table = parquet.read_table(path)
        parquet.write_table(table, path, compression="gzip", row_group_size=9)
    again = rehash(read_manifest(tmp_path / "again"))
    again = edit(again, lambda content: content["facts"].update(python="3.99.0"))
    assert made.content_sha256 == again.content_sha256 is not None
    assert made.sha256 != again.sha256
    assert made.chunks[0].provenance_sha256 != again.chunks[0].provenance_sha256
    assert again.is_named([made.content_sha256]) and not again.is_named([made.sha256, None])
    problems = [line for info in again.all_chunks() for line in verify_files(again, info).problems]
    assert problems == []

    # Provenance that names other documents is other data, and so is another token.
    for change in (
        lambda content: content["chunks"][1].update(provenance_content_sha256="0" * 64),
        lambda content: content["chunks"][0].update(sha256="0" * 64),
        lambda content: content["held_out"].update(borders_sha256="0" * 64),
        lambda content: content["facts"].update(recipe_sha256="0" * 64),
    ):
        other = edit(made_again(again, tmp_path), change)
        assert other.content_sha256 != made.content_sha256

    path = tmp_path / "again" / str(again.chunks[0].provenance)
    lines = parquet.read_table(path).to_pylist()
    lines[3]["offset"] += 1
    parquet.write_table(arrow.Table.from_pylist(lines, parquet.read_schema(path)), path)
    again = rehash(again)
    (problem,) = verify_files(again, again.chunks[0]).problems
    assert "its columns have the hash" in problem


def test_texts_are_recorded_and_left_out_of_the_next_stage(
    made: Manifest, corpus: Path, tmp_path: Path
) -> None:
    """Catches a record that lacks a text or has one too many, and a stage that trains on a text of
    the stage before, under whatever file, line and subset.
    """
    sources = {"books/books.parquet": BOOKS}
    sources |= {
        "web/a.jsonl": WEB,
        "web/b.jsonl.zst": {str(i): WEB[str(i + 50)] for i in range(1, 71)},
    }
    sources |= {f"notes/{name}": {name: text} for name, text in NOTES.items()}
    names = [info.name for info in made.all_chunks()]
    used = set()
    for _, source, document, _ in documents_in(made, names):
        known = sources[source]
        text = known.get(document) or next(iter(known.values()))
        used.add(hash_of(text))
    record = open_texts(made)
    assert record is not None and record.read(0, len(record)).tolist() == sorted(used)
    assert verify_folder(made) == [] and damaged(made) == []

    # The next stage: files of the same texts, cut anew, some of them new.
    (tmp_path / "more").mkdir()
    texts = [*WEB.values(), *BOOKS.values(), *(text_of(5000 + i) for i in range(80))]
    (tmp_path / "more" / "x.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    tree = recipe_tree(corpus, tmp_path / "next") | {"chunks": 2, "held_out": {"share": 0.2}}
    tree["subsets"] = {"more": {"kind": "jsonl", "paths": [str(tmp_path / "more" / "*")]}}
    for name, seen, shared in (("next", [], True), ("new", [str(made.path)], False)):
        done = prepare(
            write_recipe(tmp_path / "r.yaml", tree | {"output": str(tmp_path / name), "seen": seen})
        )
        assert done.returncode == 0, done.stderr
        later = read_manifest(tmp_path / name)
        compared = compare_data(made, later)
        count = len(set(texts_in(later)) & set(texts_in(made)))
        assert (count > 0) == shared
        whole = f"all {len(texts_in(later))} texts"
        found = (f"{count} of its {len(texts_in(later))} documents by text",) if shared else ()
        assert compared == Comparison(found, whole)
        line = subprocess.run(
            [sys.executable, ROOT / "tools/verify_data.py", later.path, "--against", made.path],
            capture_output=True,
            text=True,
        )
        assert line.returncode == (2 if shared else 0)
        assert f"shares {count} of its" in (line.stderr if shared else line.stdout)

    account = (later.facts.account or {})["more"]
    seen_count = sum(text in texts_in(made) for text in map(hash_of, texts))
    assert account["seen_documents"] == seen_count > 0
    assert verify_folder(later) == []
    again = prepare(tmp_path / "r.yaml")
    assert again.returncode == 0 and "already prepared" in again.stdout
    changed = prepare(write_recipe(tmp_path / "r.yaml", tree | {"output": str(tmp_path / "new")}))
    assert changed.returncode == 2 and "other data in `seen`" in changed.stderr


def test_seen_is_what_the_plan_left_out(
    made: Manifest, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a folder that claims to have left out what `seen` holds by the time it is published,
    one that is another for the order of `seen`, and a mistake that is told after hours.
    """
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(made.folder, folder)
    write_texts(folders[1] / "texts.npy", np.array([5, 7], dtype=np.uint64))
    other = {"sha256": sha256_file(folders[1] / "texts.npy"), "count": 2}
    edit(read_manifest(folders[1]), lambda content: content["facts"]["texts"].update(other))
    tree = recipe_tree(corpus, tmp_path / "new") | {"chunks": 1}
    tree["subsets"] = {"notes": {**tree["subsets"]["notes"], "min_characters": 1, "repeat": 1}}
    (tmp_path / "more").mkdir()
    lines = [json.dumps({"text": text_of(7000 + number)}) for number in range(80)]
    (tmp_path / "more" / "x.jsonl").write_text("\n".join(lines))
    tree["subsets"]["more"] = {"kind": "jsonl", "paths": [str(tmp_path / "more" / "*")]}
    digests = sorted(hashlib.sha256((f / "texts.npy").read_bytes()).hexdigest() for f in folders)

    gone = tree | {"seen": [str(tmp_path / "no" / "manifest.json")]}
    with pytest.raises(DataError, match=r"^seen: .*no/manifest.json cannot be read"):
        pipeline.prepare(load_recipe(str(write_recipe(tmp_path / "r.yaml", gone))))
    assert not (tmp_path / "new.work").exists()

    def then_changed(*arguments: Any) -> None:
        run_phases(*arguments)
        shutil.rmtree(folders[0])
        folders[1].rename(folders[0])

    run_phases = pipeline.run_phases
    monkeypatch.setattr(pipeline, "run_phases", then_changed)
    path = write_recipe(tmp_path / "r.yaml", tree | {"seen": [*map(str, folders)]})
    manifest, _ = pipeline.prepare(load_recipe(str(path)))
    assert list(manifest.facts.seen) == digests

    shutil.copytree(made.folder, folders[1])
    for order in (folders, folders[::-1]):
        path = write_recipe(tmp_path / "r.yaml", tree | {"seen": [*map(str, order)]})
        assert pipeline.prepare(load_recipe(str(path)))[1] is False


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def texts_in(manifest: Manifest) -> list[int]:
    found: list[int] = np.load(manifest.folder / "texts.npy").tolist()
    return found


def made_again(manifest: Manifest, tmp_path: Path) -> Manifest:
    """A copy of the manifest to edit."""
    folder = tmp_path / "edited"
    shutil.copytree(manifest.folder, folder, dirs_exist_ok=True)
    return read_manifest(folder)


def test_a_text_under_many_names_is_on_one_side(corpus: Path, tmp_path: Path) -> None:
    """Catches a text that is held out under one name and trained on under another: twice in a
    file, and in the file of another subset with another share.
    """
    texts = [text_of(n) + f" twin {n}" for n in range(150)]
    lines = [json.dumps({"text": text, "by": "me"}) for text in [*texts, *reversed(texts)]]
    for name in ("web", "mirror"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("\n".join(lines))
    with (tmp_path / "web" / "a.jsonl").open("a") as stream:
        stream.write('\n{"text": "", "by": "me"}\n{"text": "not mine", "by": "you"}\n')
    tree = recipe_tree(corpus, tmp_path / "out") | {"chunks": 2, "held_out": {"share": 0.2}}
    tree["subsets"] = {
        "web": {
            "kind": "jsonl",
            "paths": [str(tmp_path / "web" / "*")],
            "where": {"by": ["me"]},
        },
        "mirror": {
            "kind": "jsonl",
            "paths": [str(tmp_path / "mirror" / "*")],
            "share": [0.0, 0.7],
        },
    }
    done = prepare(write_recipe(tmp_path / "r.yaml", tree))
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "out")
    sides = texts_of_both_sides(manifest)
    assert len(sides[0]) > 80 and len(sides[1]) > 20 and sides[0].isdisjoint(sides[1])
    # Both lines of a text, in both subsets: of the 150 texts, those that only `mirror` holds out.
    account = (manifest.facts.account or {})["web"]
    copies = account["held_out_copy_documents"]
    assert copies > 0 and copies % 2 == 0
    # Every kind of document counts when the account is verified.
    assert (account["empty_documents"], account["filtered_documents"]) == (1, 1)
    assert verify_folder(manifest) == []


def test_files_given_to_other_subsets(corpus: Path, tmp_path: Path) -> None:
    """Catches two folders with one identity though each subset had the other one's files."""
    for name, words in (("en", "word"), ("de", "wort")):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": f"{words} " * 20 + str(i)}) for i in range(80))
        )

    tree = recipe_tree(corpus, tmp_path / "out") | {"held_out": None, "chunks": 2}
    for first, second in (("en", "de"), ("de", "en")):
        tree["subsets"] = {
            "en": {"kind": "jsonl", "origin": "c", "paths": [str(tmp_path / f"{first}.jsonl")]},
            "de": {"kind": "jsonl", "origin": "c", "paths": [str(tmp_path / f"{second}.jsonl")]},
        }
        done = prepare(write_recipe(tmp_path / "r.yaml", tree))

    assert done.returncode == 2 and "the same given to other subsets" in done.stderr, (
        done.stdout + done.stderr
    )


def test_workers_take_the_drivers_own_code(made: Manifest, corpus: Path, tmp_path: Path) -> None:
    """Catches workers that import another k2train from the working directory."""
    (tmp_path / "k2train").mkdir()
    (tmp_path / "k2train" / "__init__.py").write_text("raise SystemExit('another checkout')")
    recipe = write_recipe(tmp_path / "r.yaml", recipe_tree(corpus, tmp_path / "out"))
    command = [sys.executable, str(ROOT / "tools/prepare_data.py"), str(recipe)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == hashes(made.folder)


def test_a_corpus_may_move_between_two_starts(made: Manifest, corpus: Path, tmp_path: Path) -> None:
    """Catches tasks that look for files at the paths of an earlier start."""
    shutil.copytree(corpus, tmp_path / "here")
    tree = recipe_tree(tmp_path / "here", tmp_path / "out")
    recipe = write_recipe(tmp_path / "r.yaml", tree)
    killed_after_encoding(recipe, tmp_path / "out.work")
    (tmp_path / "here").rename(tmp_path / "there")
    write_recipe(recipe, recipe_tree(tmp_path / "there", tmp_path / "out"))
    done = prepare(recipe)
    assert done.returncode == 0 and "resuming" in done.stderr, done.stderr
    assert hashes(tmp_path / "out") == hashes(made.folder)


def test_demo_recipes_fit_each_other() -> None:
    """Catches demo stages that overlap, train two tokenizers, or are not 4 times the context."""
    first, second = (load_recipe(str(ROOT / f"configs/demo/data_stage{i}.yaml")) for i in (1, 2))
    assert second.sequence_length == 4 * first.sequence_length
    assert second.tokenizer == first.tokenizer
    assert {n: s.kind for n, s in second.subsets.items()} == {
        n: s.kind for n, s in first.subsets.items()
    }
    assert all(
        first.subsets[name].share[1] <= second.subsets[name].share[0] for name in first.subsets
    )
    assert first.sha256 != second.sha256


def test_k2_recipes_are_the_card() -> None:
    """Catches a recipe that differs from K2's model card.

    The published mix: 1.300T tokens in 360 chunks, 69.3B in 20; the totals are arithmetic on the
    card.
    """
    first, second = (load_recipe(str(ROOT / f"configs/k2_65b/data_stage{i}.yaml")) for i in (1, 2))
    totals = []
    for recipe in (first, second):
        made = [
            min(s.limit_tokens or 10**18, int((s.expected_tokens or 0) * s.repeat))
            for s in recipe.subsets.values()
        ]
        totals.append(sum(made) / 1e9)

    assert totals == [pytest.approx(1300.01), pytest.approx(69.3)]
    assert (first.chunks, first.sequence_length, second.chunks, second.sequence_length) == (
        360,
        2048,
        20,
        8192,
    )

    assert int(69.3e9 / 20 / 8192) // 510 == 829, "the steps a chunk of stage 2"


def test_stages_share_nothing(corpus: Path, tmp_path: Path) -> None:
    """Catches a second stage, with another seed and lengths, that sees text of the first."""
    manifests = []
    for number, share in enumerate(([0.0, 0.6], [0.6, 1.0])):
        tree = recipe_tree(corpus, tmp_path / f"stage{number}")
        tree |= {"seed": number, "chunks": 2, "held_out": {"share": 0.1}}
        for subset in tree["subsets"].values():
            subset["share"] = list(share)
        done = prepare(write_recipe(tmp_path / f"{number}.yaml", tree))
        assert done.returncode == 0, done.stderr
        manifests.append(read_manifest(tmp_path / f"stage{number}"))

    first, second = (
        {key[:3] for key in documents_in(m, [i.name for i in m.all_chunks()])} for m in manifests
    )
    assert first and second and first.isdisjoint(second)
    assert common_data(*manifests) == []
    assert common_data(manifests[0], manifests[0])
