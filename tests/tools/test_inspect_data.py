"""`tools/inspect_data.py`: its answers against data whose every token is known here."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from k2train.checkpoint.manifest import seal
from k2train.data.chunk import open_chunk
from k2train.data.inspect.account import find_tokenizer, text_parts
from k2train.data.inspect.provenance import _nearest, find_document, pieces_of
from k2train.data.inspect.run_progress import History, steps_done, steps_skipped
from k2train.data.manifest import ChunkInfo, Manifest, read_manifest
from k2train.data.order import ChunkOrder
from k2train.data.prepare.k2_format.import_folder import UNKNOWN_TOKENIZER
from k2train.data.tokenizer import EOS_ID, Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.record.event import Event
from k2train.record.events import (
    CheckpointSaved,
    ChunkDeferred,
    ChunkStarted,
    Resumed,
    Started,
    StepSkipped,
)
from k2train.record.ledger import Ledger
from k2train.record.metrics import StepRecord
from k2train.text import clean, table
from tests.support.command_line import load_tool
from tests.support.data_folder import add_chunk, finish, rewrite, with_files, write_pieces
from tests.support.events import entries, event

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "inspect_data.py"
CHUNKS, ROWS, LENGTH, BATCH = 4, 7, 16, 3
"""Two steps a chunk, and one row beyond them."""


tool = load_tool("inspect_data")


@dataclass(frozen=True)
class Corpus:
    """A data folder, and the documents (subset, source, name) -> (text, ids with </s>) it was
    packed from.
    """

    manifest: Manifest
    documents: dict[tuple[str, str, str], tuple[str, list[int]]]

    @property
    def folder(self) -> Path:
        return self.manifest.folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = [
        "def",
        "return",
        "value",
        "the",
        "of",
        "list",
        "\n    ",
        "x = 1",
        "</s>",
        "naïve",
        "<fim_middle>",
    ]

    return train_tokenizer(
        [" ".join(words[(i * k) % 11] for i in range(60)) for k in range(1, 40)], 300
    )


Build = Callable[..., Corpus]


@pytest.fixture
def build(tmp_path: Path, tokenizer: Tokenizer) -> Build:
    return lambda **options: _build(tmp_path / "data", tokenizer, **options)


def _texts() -> dict[tuple[str, str, str], str]:
    texts = {
        ("code", "src/a.py", "a.py"): "def f(x):\n    return '</s> <fim_middle>'\n" * 2,
        ("code", "src/a.py", "a.py:f"): "the value of x\n",
        ("prose", "web/p.jsonl", "héllo"): "naïve ünïcode ▁ 😀 the end",
    }
    return texts | {("prose", "web/p.jsonl", f"line-{i}"): f"list {i}" for i in range(30)}


def _build(
    folder: Path, tokenizer: Tokenizer, columns: bool = True, copy: bool = True, **facts: Any
) -> Corpus:
    """Documents laid end to end over the chunks, twice where needed.

    `columns`: with fim and repeat.
    """
    folder.mkdir()
    documents = {key: (text, [*tokenizer.encode(text), EOS_ID]) for key, text in _texts().items()}
    stream: list[tuple[int, tuple[str, str, str], int, int]] = []
    for repeat in range(20):
        for key, (_, ids) in documents.items():
            stream += [(token, key, offset, repeat) for offset, token in enumerate(ids)]

    assert len(stream) >= CHUNKS * ROWS * LENGTH, "the documents fill the chunks"
    infos = []

    for c in range(CHUNKS):
        part = stream[c * ROWS * LENGTH : (c + 1) * ROWS * LENGTH]
        ids = np.array([token for token, *_ in part]).reshape(ROWS, LENGTH)
        name = f"chunk_{c:03d}"
        lines = _pieces(part)
        per_subset = {
            s: sum(line["length"] for line in lines if line["subset"] == s)
            for s in ("code", "prose")
        }
        pieces = _columns(lines, () if columns else ("fim", "repeat"))
        infos.append(
            add_chunk(
                folder, name, ids, tokenizer.vocab_size, per_subset, pieces=pieces, group_rows=3
            )
        )

    if copy:
        tokenizer.save(folder / "tokenizer.model")
        facts["tokenizer"] = {"file": "tokenizer.model", "specials": list(tokenizer.specials)}

    manifest = finish(folder, infos, LENGTH, tokenizer.vocab_size, tokenizer.sha256, facts)
    return Corpus(manifest, documents)


def _pieces(part: list[tuple[int, tuple[str, str, str], int, int]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    before = None

    for i, (_, key, offset, repeat) in enumerate(part):
        row, start = divmod(i, LENGTH)
        if (row, key, repeat) != before:
            index = {
                "row": row,
                "start": start,
                "length": 0,
                "offset": offset,
                "fim": "none",
                "repeat": repeat,
            }
            found.append({**index, **dict(zip(("subset", "source", "document"), key, strict=True))})
            before = (row, key, repeat)
        found[-1]["length"] += 1

    return found


def _columns(lines: list[dict[str, Any]], without: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    return {key: [line[key] for line in lines] for key in lines[0] if key not in without}


def _run_tasks(corpus: Corpus, folder: Path, order: list[str] | None = None) -> Ledger:
    """A run directory as a start leaves it: config and ledger."""
    folder.mkdir(parents=True)
    config = {
        "data": {"manifest": str(corpus.manifest.path), "order": order, "sequence_length": LENGTH},
        "batch": {"global_sequences": BATCH},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append(event(Started, attempt=1, data_manifest_sha256=corpus.manifest.sha256))
    return ledger


def chunk_started(chunk: str, order_index: int, step: int, attempt: int = 1) -> ChunkStarted:
    return event(ChunkStarted, attempt=attempt, chunk=chunk, order_index=order_index, step=step)


def _metrics(
    run: Path, attempt: int, step: int, chunk: str, rows: list[int], applied: bool = True
) -> None:
    row = {
        "step": step,
        "attempt": attempt,
        "chunk": chunk,
        "loss": 1.0,
        "rows": rows,
        "applied": applied,
    }
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def _checkpoint(corpus: Corpus, run: Path, order: list[str], step: int) -> None:
    entries = [{"name": name, "sha256": corpus.manifest.chunk(name).sha256} for name in order]
    name = f"ckpt_{step // 2:03d}"

    facts = {
        "format": 1,
        "name": name,
        "step": step,
        "adam_steps": step,
        "consumed_tokens": step * BATCH * LENGTH,
        "chunks": {"consumed": step // 2, "step_in_chunk": 0, "order": entries},
        "config": yaml.safe_load((run / "config.yaml").read_text()),
        "data": {"manifest": str(corpus.manifest.path), "manifest_sha256": corpus.manifest.sha256},
        "tensors": {},
        "files": {},
    }

    (run / "checkpoints" / name).mkdir(parents=True)
    (run / "checkpoints" / name / "manifest.json").write_text(json.dumps(seal(facts)))


Ask = Callable[..., Any]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """The JSON answer to a question, given as the words of the command line."""

    def answer(*words: object) -> Any:
        code = tool.main([*map(str, words), "--json"])
        shown = capsys.readouterr()
        assert (code, shown.err) == (0, "")
        return json.loads(shown.out)

    return answer


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Ask:
    def shown(*words: object) -> str:
        assert tool.main([*map(str, words)]) == 0
        return capsys.readouterr().out

    return shown


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Ask:
    """The one line that a mistake is told in."""

    def message(*words: object) -> str:
        try:
            code = tool.main([*map(str, words)])
        except SystemExit as leaving:
            code = leaving.code
        shown = capsys.readouterr()
        assert code == 2 and shown.out == "" and shown.err.count("\n") == 1, (code, shown)
        return shown.err

    return message


# Rows


def test_every_row_tells_its_own_tokens(build: Build, ask: Ask, tokenizer: Tokenizer) -> None:
    """Catches a row or a piece that is another's, and a document that does not come back from its
    places.
    """
    corpus = build()
    message: dict[tuple[Any, ...], dict[int, list[int]]] = {}

    for info in corpus.manifest.chunks:
        ids = open_chunk(corpus.manifest, info)
        rows = ask(corpus.folder, "--chunk", info.name, "--rows", f"0-{ROWS - 1}")["rows"]
        assert [row["row"] for row in rows] == list(range(ROWS))
        for row in rows:
            assert [token for piece in row["pieces"] for token in piece["ids"]] == ids[
                row["row"]
            ].tolist()
            for piece in row["pieces"]:
                key = (piece["subset"], piece["source"], piece["document"], piece["repeat"])
                message.setdefault(key, {})[piece["offset"]] = piece["ids"]

    whole = 0
    for (*key, _), parts in message.items():
        found = [token for offset in sorted(parts) for token in parts[offset]]
        text, ids = corpus.documents[(key[0], key[1], key[2])]
        assert found == ids[: len(found)]
        if len(found) == len(ids):
            whole += 1
            assert "".join(part["text"] for part in text_parts(tokenizer, found)) == f"{text}</s>"

    assert whole > len(corpus.documents) // 2


def test_control_tokens_are_told_from_text_that_spells_them(tokenizer: Tokenizer) -> None:
    """Catches text shown as a control token, or one shown as text, in either direction."""
    text = "a </s> b <fim_middle>"
    ids = [
        *tokenizer.encode(text),
        tokenizer.special_id("<fim_middle>"),
        EOS_ID,
        *tokenizer.encode(" c"),
    ]

    parts = text_parts(tokenizer, ids)
    assert [part for part in parts if part["control"]] == [
        {"text": "<fim_middle>", "control": True},
        {"text": "</s>", "control": True},
    ]
    assert [part["text"] for part in parts if not part["control"]] == [text, " c"]


def test_a_row_is_shown_with_marks(
    build: Build, show: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a control token that looks like text, and marks of a terminal in a file."""
    corpus = build()
    found = [p for p in find_document(corpus.manifest, "a.py:f") if p["repeat"] == 0][-1]
    words = (corpus.folder, "--chunk", found["chunk"], "--row", found["row"])
    shown = show(*words)
    assert "⟦</s>⟧" in shown and "\x1b" not in shown and "a.py:f" in shown
    assert "repeat" in shown and "none" in shown
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[1m⟦</s>⟧\x1b[0m" in show(*words)


def test_what_is_learned_is_marked(build: Build, ask: Ask, show: Ask, tokenizer: Tokenizer) -> None:
    """Catches marks on other tokens than the mask's, and targets that are another chunk's."""
    corpus = build()
    row = 3
    ids = open_chunk(corpus.manifest, corpus.manifest.chunks[0])[row].tolist()
    learned = np.zeros((ROWS, LENGTH), dtype=bool)
    learned[:, 1] = True
    learned[row] = False
    learned[row, 4:7] = learned[row, -1] = True
    infos = [with_files(corpus.folder, info, mask=learned) for info in corpus.manifest.chunks]
    rewrite(corpus.folder, chunks=infos)

    (found,) = ask(corpus.folder, "--chunk", 0, "--row", row)["rows"]
    marks = [mark for piece in found["pieces"] for mark in piece["learned"]]
    assert marks == learned[row].tolist()
    parts = [part for piece in found["pieces"] for part in piece["text"]]
    said = "".join(part["text"] for part in parts if part["learned"])
    assert said == "".join(
        part["text"] for run in (ids[4:7], ids[-1:]) for part in text_parts(tokenizer, run)
    )
    marked = show(corpus.folder, "--chunk", 0, "--row", row, "--ids")
    for run in (ids[4:7], ids[-1:]):
        assert f"«{' '.join(map(str, run))}»" in marked

    targets = ROWS + 3
    assert f"{targets:,} targets, " in show(corpus.folder, "--chunk", 0)
    account = show(corpus.folder, "--chunks")
    assert f"loss masks: {CHUNKS * targets:,} targets, " in account
    facts = ask(corpus.folder)
    assert facts["targets"] == CHUNKS * targets
    assert [chunk["targets"] for chunk in facts["chunks"]] == [targets] * CHUNKS


def test_without_a_tokenizer_there_are_ids_and_a_word_about_it(
    build: Build, show: Ask, ask: Ask, refuse: Ask
) -> None:
    """Catches an empty text in place of what cannot be decoded, and another tokenizer's text."""
    corpus = build(copy=False)
    words = (corpus.folder, "--chunk", 0, "--row", 1)
    ids = open_chunk(corpus.manifest, corpus.manifest.chunks[0])[1].tolist()
    shown = show(*words)
    assert "note: no tokenizer.model" in shown and " ".join(map(str, ids[:3])) in shown
    facts = ask(*words)
    assert facts["rows"][0]["pieces"][0]["text"] is None and facts["notes"]
    other = train_tokenizer(["one two three four five six " * 30], 300)
    other.save(corpus.folder.parent / "other.model")
    assert "is not the tokenizer of" in refuse(
        *words, "--tokenizer", corpus.folder.parent / "other.model"
    )
    assert f"{corpus.folder / 'none.model'}: cannot be read" in refuse(
        *words, "--tokenizer", corpus.folder / "none.model"
    )
    path = corpus.manifest.path
    assert f"{path}: not a tokenizer.json" in refuse(*words, "--tokenizer", path)
    content = json.loads(path.read_text())
    assert f"with the hash of the data ({content['tokenizer_sha256'][:12]})" in shown
    path.write_text(json.dumps({**content, "tokenizer_sha256": UNKNOWN_TOKENIZER}))
    assert "of the data (unknown: imported without a tokenizer) is in its folder" in show(*words)


def test_a_tokenizer_beside_the_folder_is_taken_by_its_hash(
    build: Build, tokenizer: Tokenizer
) -> None:
    """Catches an older folder shown as ids though its tokenizer lies there, and a wrong one taken
    for it.
    """
    corpus = build(copy=False)
    beside = corpus.folder.parent / "tokenizer.model"
    train_tokenizer(["one two three four five six " * 30], 300).save(beside)
    assert find_tokenizer(corpus.manifest, None) is None
    tokenizer.save(beside)
    found = find_tokenizer(corpus.manifest, None)
    assert found is not None and found.sha256 == tokenizer.sha256


def test_an_older_folder_without_the_later_columns(build: Build, ask: Ask, show: Ask) -> None:
    """Catches a folder refused for its age, and "none" said where nothing was recorded."""
    corpus = build(columns=False)
    piece = ask(corpus.folder, "--chunk", 1, "--row", 0)["rows"][0]["pieces"][0]
    assert piece["fim"] is None and piece["repeat"] is None
    assert {part["repeat"] for part in ask(corpus.folder, "--chunk", 1)["parts"]} == {None}
    assert ask(corpus.folder, "--document", "a.py")["places"][0]["fim"] is None
    assert "fim" not in show(corpus.folder, "--chunk", 1)


def test_only_the_one_chunk_is_read(build: Build, ask: Ask) -> None:
    """Catches an answer about a row or a step that needs the whole data set to be at hand."""
    corpus = build()
    run = corpus.folder.parent / "runs" / "one"
    _run_tasks(corpus, run)
    for path in corpus.folder.glob("chunk_*"):
        if not path.name.startswith("chunk_001"):
            path.unlink()
    assert ask(corpus.folder, "--chunk", 1, "--row", 2)["rows"][0]["row"] == 2
    assert ask("--run", run, "--step", 3)["chunk"] == "chunk_001"


def test_only_the_row_groups_of_the_row_are_read(build: Build) -> None:
    """Catches a lookup that reads a chunk's whole provenance for one row: here the rest of it is
    destroyed.
    """
    corpus = build()
    info = corpus.manifest.chunks[0]
    path = corpus.folder / str(info.provenance)
    expected = pieces_of(corpus.manifest, info, range(ROWS - 1, ROWS))
    with parquet.ParquetFile(path) as file:
        assert file.metadata.num_row_groups > 2
        column = file.metadata.row_group(0).column(0)

    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    assert pieces_of(corpus.manifest, info, range(ROWS - 1, ROWS)) == expected


# The account


def _account(corpus: Corpus) -> dict[str, dict[str, int]]:
    made = {
        s: sum(i.tokens_per_subset[s] for i in corpus.manifest.chunks) for s in ("code", "prose")
    }
    return {
        "code": {"training_documents": 2, "training_tokens": made["code"] + 20},
        "prose": {"training_documents": 35, "training_tokens": made["prose"]},
    }


def test_the_account_is_counted_and_not_copied(
    build: Build, ask: Ask, show: Ask, tmp_path: Path
) -> None:
    """Catches a difference that is not made minus asked, and a limit left out of what was asked."""
    plain = build()
    account = _account(plain)
    wanted = {"code": account["code"]["training_tokens"] // 2, "prose": 90}
    account["code"]["asked_tokens"], account["prose"]["asked_tokens"] = wanted["code"], 2 * 90
    recipe = {"subsets": {"code": {"repeat": 0.5}, "prose": {"repeat": 2.0, "limit_tokens": 90}}}
    (plain.folder / "tokenizer.model").unlink()
    facts = {"name": "small", "seed": 3, "account": account, "recipe": recipe}
    content = json.loads(plain.manifest.path.read_text())
    plain.manifest.path.write_text(json.dumps({**content, "facts": facts}))
    answer = ask(plain.folder)
    by_name = {item["subset"]: item for item in answer["subsets"]}

    for name, asked in wanted.items():
        item = by_name[name]
        made = sum(info.tokens_per_subset[name] for info in plain.manifest.chunks)
        assert (item["asked_tokens"], item["made_tokens"], item["difference_tokens"]) == (
            asked,
            made,
            made - asked,
        )
        samples = [info.tokens_per_subset[name] // LENGTH for info in plain.manifest.chunks]
        assert (item["least_in_a_chunk"], item["most_in_a_chunk"]) == (min(samples), max(samples))

    assert answer["tokens"] == CHUNKS * ROWS * LENGTH
    lines = show(plain.folder).splitlines()
    code = next(line for line in lines if line.startswith("code"))
    assert f"{by_name['code']['difference_tokens']:+,}" in code.split() and "small" in lines[1]
    assert "chunk_003" not in show(plain.folder) and "chunk_003" in show(plain.folder, "--chunks")


def test_rows_per_chunk_bound_what_is_asked(build: Build, ask: Ask) -> None:
    """Catches a subset that fills the rest, or a proportion, shown as tokens that were lost."""
    corpus = build()
    total = CHUNKS * ROWS * LENGTH

    for fill in (True, False):
        recipe = {
            "chunks": CHUNKS,
            "rows_per_chunk": ROWS,
            "sequence_length": LENGTH,
            "subsets": {"code": {"repeat": 1, "fill": fill}, "prose": {"repeat": 1}},
        }
        account = {"code": {"asked_tokens": 10 * total}, "prose": {"asked_tokens": 200}}
        content = json.loads(corpus.manifest.path.read_text())
        corpus.manifest.path.write_text(
            json.dumps({**content, "facts": {"account": account, "recipe": recipe}})
        )
        asked = {item["subset"]: item["asked_tokens"] for item in ask(corpus.folder)["subsets"]}
        if fill:
            assert asked == {"code": total - 200, "prose": 200}
        else:
            assert sum(asked.values()) in (total, total - 1) and asked["prose"] < 20


def test_a_chunk_adds_up(build: Build, ask: Ask, show: Ask) -> None:
    """Catches a part of a chunk left out of its summary."""
    corpus = build()
    info = corpus.manifest.chunks[3]
    facts = ask(corpus.folder, "--chunk", "chunk_003")
    for name, tokens in info.tokens_per_subset.items():
        assert sum(part["tokens"] for part in facts["parts"] if part["subset"] == name) == tokens
    assert {part["fim"] for part in facts["parts"]} == {"none"}
    passes = [
        part["repeat"]
        for chunk in range(CHUNKS)
        for part in ask(corpus.folder, "--chunk", chunk)["parts"]
    ]
    assert set(passes) == {0, 1}
    assert info.sha256 in show(corpus.folder, "--chunk", "3")


def test_the_nearest_chunk_is_that_of_the_same_number() -> None:
    """Catches the first of many names that are equally like the one that was asked for."""
    names = [f"chunk_{i:03d}" for i in range(360)] + ["held_out"]
    for wanted, near in (
        ("chunk_0", 0),
        ("chunk_10", 10),
        ("chunk_7", 7),
        ("chnk_359", 359),
        ("chunk_0012", 12),
    ):
        assert _nearest(wanted, names) == [f"chunk_{near:03d}"]
    assert (_nearest("heldout", names), _nearest("zzz", names)) == (["held_out"], [])


# Documents


def test_a_document_is_found_by_each_of_its_names(build: Build, ask: Ask) -> None:
    """Catches a use of a document that is not found, and one found that is another's."""
    corpus = build()
    everything = [
        {"chunk": info.name, "row": row, **piece}
        for info in corpus.manifest.chunks
        for row, pieces in pieces_of(corpus.manifest, info, range(ROWS)).items()
        for piece in pieces
    ]

    def expected(**wanted: str) -> list[Any]:
        found = [
            item for item in everything if all(item[key] == value for key, value in wanted.items())
        ]
        return sorted(
            (item["chunk"], item["row"], item["start"], item["length"], item["repeat"])
            for item in found
        )

    for words, wanted in (
        (["a.py:f"], {"document": "a.py:f"}),
        (["src/a.py:a.py"], {"source": "src/a.py", "document": "a.py"}),
        (["src/a.py:a.py:f"], {"source": "src/a.py", "document": "a.py:f"}),
        (["web/p.jsonl"], {"source": "web/p.jsonl"}),
        (["héllo", "--subset", "prose", "--source", "web/p.jsonl"], {"document": "héllo"}),
    ):
        positions = ask(corpus.folder, "--document", *words)["places"]
        message = sorted(
            (p["chunk"], p["row"], p["start"], p["length"], p["repeat"]) for p in positions
        )
        assert message == expected(**wanted) and message
        reading = [(p["source"], p["document"], p["repeat"], p["offset"]) for p in positions]
        assert reading == sorted(reading)


def test_a_document_not_found_is_answered_with_the_nearest(build: Build, refuse: Ask) -> None:
    """Catches an empty answer, which would read as "never used"."""
    corpus = build()
    assert "similar names: line-1" in refuse(corpus.folder, "--document", "lime-11")
    assert "there are code, prose" in refuse(corpus.folder, "--document", "a.py", "--subset", "cod")
    assert "in subset prose" in refuse(corpus.folder, "--document", "a.py", "--subset", "prose")
    assert "no document" in refuse(corpus.folder, "--document", "zzzzzz")


# Runs


def test_every_step_reads_the_rows_of_the_order(build: Build, ask: Ask, tmp_path: Path) -> None:
    """Catches steps counted from elsewhere, and an order that is not the run's."""
    corpus = build()
    names = ["chunk_002", "chunk_000", "chunk_003"]
    run = tmp_path / "runs" / "ordered"
    ledger = _run_tasks(corpus, run, names)
    ledger.append(chunk_started("chunk_002", 0, 1))

    for step in (1, 2, 3):
        _metrics(
            run,
            1,
            step,
            names[(step - 1) // 2],
            [(step - 1) % 2 * BATCH, (step - 1) % 2 * BATCH + BATCH],
        )

    order = ChunkOrder(tuple(names), (ROWS,) * 3, BATCH)
    for step in range(1, 7):
        facts = ask("--run", run, "--step", step)
        rows = order.rows_of(step)
        assert (facts["chunk"], facts["rows"]) == (
            order.position(step).name,
            [rows.start, rows.stop],
        )
        assert facts["state"] == ("trained" if step <= 3 else "to come")
        assert [sample["row"] for sample in facts["samples"]] == list(rows)
        info = corpus.manifest.chunk(facts["chunk"])
        for sample in facts["samples"]:
            pieces = [
                {k: v for k, v in p.items() if k not in ("ids", "text")} for p in sample["pieces"]
            ]
            assert (
                pieces
                == pieces_of(corpus.manifest, info, range(sample["row"], sample["row"] + 1))[
                    sample["row"]
                ]
            )
        assert [i for i, sample in enumerate(facts["samples"]) if "text_shown" in sample] == [0]
        assert sum(facts["tokens_per_subset"].values()) == BATCH * LENGTH

    chosen = ask("--run", run, "--step", 4, "--row", 5)["samples"]
    assert chosen == ask("--run", run, "--step", 4, "--sample", 2)["samples"]
    assert [sample["row"] for sample in chosen if "text_shown" in sample] == [5]
    states = [(item["chunk"], item["state"]) for item in ask("--run", run)["order"]]
    assert states == [
        ("chunk_002", "trained"),
        ("chunk_000", "under way"),
        ("chunk_003", "to come"),
    ]


def test_only_the_sample_that_was_asked_for_is_shown(
    build: Build, ask: Ask, show: Ask, tmp_path: Path
) -> None:
    """Catches a sample that is buried under the tables of all the others, and a step made smaller
    than it is.
    """
    corpus = build()
    run = tmp_path / "runs" / "one"
    _run_tasks(corpus, run)
    step = ("--run", run, "--step", 2)
    assert [sample["row"] for sample in ask(*step)["samples"]] == [3, 4, 5]

    def rows_shown(*words: object) -> list[str]:
        lines = show(*step, *words).split("\n\n")[1].splitlines()[1:]
        # A sample's number and row stand in the line of its first piece only.
        return [" ".join(line.split()[:2]) for line in lines if "-" not in line.split()[0]]

    rest = ["... and"]

    assert (
        rows_shown()
        == rows_shown("--all")
        == rows_shown("--sample", 1, "--all")
        == ["0 3", "1 4", "2 5"]
    )

    assert rows_shown("--sample", 1) == rows_shown("--row", 4) == ["1 4", *rest]
    assert rows_shown("--rows", "4-5") == ["1 4", "2 5", *rest]
    shown = show(*step, "--sample", 1)
    assert "rows 3 to 5 (3 samples" in shown and "... and 2 samples more; --all shows them" in shown
    pieces = ask(*step, "--sample", 1)["samples"][1]["pieces"]
    assert len(shown.split("\n\n")[1].splitlines()) == 1 + len(pieces) + 1


def test_a_document_is_told_with_its_steps(
    build: Build, ask: Ask, show: Ask, tmp_path: Path
) -> None:
    """Catches a use called trained that was never read: to come, beyond the last full step, outside
    the order.
    """
    corpus = build()
    run = tmp_path / "runs" / "partial"
    _run_tasks(corpus, run, ["chunk_001", "chunk_000"])
    _metrics(run, 1, 1, "chunk_001", [0, 3])
    facts = ask("--run", run, "--document", "web/p.jsonl")
    seen = set()

    for index in facts["places"]:
        expected: tuple[int | None, str]
        if index["chunk"] in ("chunk_002", "chunk_003"):
            expected = (None, "not in the order")
        elif index["row"] == ROWS - 1:
            expected = (None, "never read")
        else:
            step = 1 + index["row"] // BATCH + (2 if index["chunk"] == "chunk_000" else 0)
            expected = (step, "trained" if step == 1 else "to come")
        assert (index["step"], index["state"]) == expected
        seen.add(expected[1])

    assert seen == {"not in the order", "never read", "trained", "to come"}
    assert "1 of 4 steps done" in show("--run", run, "--document", "web/p.jsonl")
    assert ask("--run", run, "--chunk", 1, "--row", 0)["rows"][0]["use"] == {
        "step": 1,
        "state": "trained",
    }


def test_held_out_rows_are_never_called_trained(
    build: Build, ask: Ask, show: Ask, refuse: Ask, tmp_path: Path
) -> None:
    """Catches validation data told as training data, and counted as such."""
    corpus = build()
    content = json.loads(corpus.manifest.path.read_text())
    content["held_out"] = {**content["chunks"].pop(), "name": "held_out"}
    corpus.manifest.path.write_text(json.dumps(content))
    corpus = replace(corpus, manifest=read_manifest(corpus.folder))
    run = tmp_path / "runs" / "held"
    _run_tasks(corpus, run)
    _metrics(run, 1, 6, "chunk_002", [3, 6])
    positions = ask("--run", run, "--document", "web/p.jsonl")["places"]
    assert {index["state"] for index in positions if index["chunk"] == "held_out"} == {"held out"}
    assert all(index["held_out"] == (index["chunk"] == "held_out") for index in positions)
    assert ask("--run", run, "--chunk", "held_out", "--row", 0)["rows"][0]["use"] == {
        "step": None,
        "state": "held out",
    }
    assert "never trained on" in show(corpus.folder, "--chunk", "held_out")
    account = ask(corpus.folder)
    assert account["tokens"] == (CHUNKS - 1) * ROWS * LENGTH and account["held_out"]["rows"] == ROWS
    assert "chunk_000, chunk_001, chunk_002 and held_out" in refuse(corpus.folder, "--chunk", 3)


def test_a_deferred_chunk_is_read_last(build: Build, ask: Ask, show: Ask, tmp_path: Path) -> None:
    """Catches an order from the config alone: the run went back, deferred a chunk, and read another
    in its place.
    """
    corpus = build()
    run = tmp_path / "runs" / "deferred"
    ledger = _run_tasks(corpus, run)
    names = [info.name for info in corpus.manifest.chunks]
    ledger.append(chunk_started("chunk_000", 0, 1))
    _checkpoint(corpus, run, names, 2)
    ledger.append(event(CheckpointSaved, attempt=1, checkpoint="ckpt_001", step=2))
    ledger.append(chunk_started("chunk_001", 1, 3))
    for step, chunk, rows in ((1, 0, [0, 3]), (2, 0, [3, 6]), (3, 1, [0, 3]), (4, 1, [3, 6])):
        _metrics(run, 1, step, names[chunk], rows)
    ledger.append(ChunkDeferred(attempt=1, chunk="chunk_001", step=2, order_index=3))
    before = ask("--run", run, "--step", 3)
    assert (before["chunk"], before["state"]) == ("chunk_002", "to come")
    assert [attempt["chunk"] for attempt in before["attempts"]] == ["chunk_001"]
    ledger.append(event(Resumed, attempt=2, step=2, checkpoint="ckpt_001"))
    ledger.append(chunk_started("chunk_002", 1, 3, attempt=2))
    _metrics(run, 2, 3, "chunk_002", [0, 3])
    now = ask("--run", run, "--step", 3)
    assert (now["chunk"], now["state"]) == ("chunk_002", "trained")
    assert [(a["attempt"], a["chunk"]) for a in now["attempts"]] == [
        (1, "chunk_001"),
        (2, "chunk_002"),
    ]
    assert "attempt 1 read chunk_001" in show("--run", run, "--step", 3)
    assert ask("--run", run, "--step", 4)["state"] == "to come"

    assert [item["chunk"] for item in ask("--run", run)["order"]] == [
        "chunk_000",
        "chunk_002",
        "chunk_003",
        "chunk_001",
    ]

    assert ask("--run", run, "--chunk", 1)["use"]["first_step"] == 7
    alone = ask("--run", run, "--checkpoint", 1, "--step", 3)
    assert (alone["chunk"], alone["state"]) == ("chunk_001", "to come"), (
        "by that checkpoint's record alone"
    )


def test_a_checkpoint_tells_what_it_consumed(
    build: Build, ask: Ask, refuse: Ask, tmp_path: Path
) -> None:
    """Catches chunks counted that came later, and a record that does not fit the data."""
    corpus = build()
    run = tmp_path / "runs" / "saved"
    order = ["chunk_003", "chunk_001", "chunk_000"]
    _run_tasks(corpus, run, order)
    for step in (0, 2, 4):
        _checkpoint(corpus, run, order, step)
    facts = ask("--run", run, "--checkpoint", 2)
    assert [(i["chunk"], i["sha256"]) for i in facts["order"]] == [
        (name, corpus.manifest.chunk(name).sha256) for name in order[:2]
    ]
    assert (facts["consumed"], facts["consumed_tokens"]) == (2, 4 * BATCH * LENGTH)
    for item in facts["subsets"]:
        assert item["tokens"] == sum(
            corpus.manifest.chunk(n).tokens_per_subset[item["subset"]] for n in order[:2]
        )

    assert ask("--run", run, "--checkpoint", "ckpt_000")["order"] == []
    assert "it has ckpt_000, ckpt_001, ckpt_002" in refuse("--run", run, "--checkpoint", 7)
    path = run / "checkpoints" / "ckpt_001" / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(seal({**content, "consumed_tokens": 5})))
    assert "5 tokens consumed at step 2" in refuse("--run", run, "--checkpoint", 1)
    content["chunks"]["order"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(seal(content)))
    assert "chunk_003 is not the chunk of that run" in refuse("--run", run, "--checkpoint", 1)


def test_the_record_is_believed_over_an_edited_config(
    build: Build, ask: Ask, refuse: Ask, tmp_path: Path
) -> None:
    """Catches an answer from a config that was changed after the run."""
    corpus = build()
    run = tmp_path / "runs" / "edited"
    ledger = _run_tasks(corpus, run, ["chunk_001", "chunk_000"])
    ledger.append(chunk_started("chunk_001", 0, 1))
    _metrics(run, 1, 1, "chunk_001", [0, 3])
    config = (run / "config.yaml").read_text()
    tree = yaml.safe_load(config)
    tree["data"]["order"].reverse()
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    assert "position 0 of the order was chunk_001 from step 1" in refuse("--run", run, "--step", 1)
    (run / "config.yaml").write_text(config.replace("global_sequences: 3", "global_sequences: 2"))
    assert "rows [0, 3]" in refuse("--run", run, "--step", 1)
    (run / "config.yaml").write_text(config)
    _checkpoint(corpus, run, ["chunk_001", "chunk_000"], 0)
    (run / "config.yaml").unlink()
    assert ask("--run", run, "--step", 1)["chunk"] == "chunk_001", (
        "a checkpoint holds the order too"
    )


def test_other_data_than_the_run_recorded_is_refused(
    build: Build, ask: Ask, refuse: Ask, tmp_path: Path
) -> None:
    """Catches the most convincing wrong answer: the right question to another data set."""
    corpus = build()
    run = tmp_path / "runs" / "moved"
    _run_tasks(corpus, run)
    moved = tmp_path / "elsewhere"
    corpus.folder.rename(moved)
    assert "cannot be read" in refuse("--run", run, "--step", 1)
    assert ask(moved, "--run", run, "--step", 1)["chunk"] == "chunk_000"
    path = moved / "manifest.json"
    path.write_text(path.read_text() + " ")
    assert f"{corpus.manifest.sha256[:12]}" in refuse(moved, "--run", run, "--step", 1)


def test_a_relative_manifest_is_looked_for_above_the_run(
    build: Build, ask: Ask, tmp_path: Path
) -> None:
    """Catches a run that can be asked from one directory only."""
    corpus = build()
    run = tmp_path / "runs" / "relative"
    _run_tasks(corpus, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["manifest"] = "data/manifest.json"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert ask("--run", run)["manifest"] == str(corpus.manifest.path)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4), st.data())
def test_use_is_the_inverse_of_the_order(rows: list[int], batch: int, data: st.DataObject) -> None:
    """Catches a row told at a step that does not read it."""
    rows = [max(n, batch) for n in rows]
    order = ChunkOrder(tuple(f"chunk_{i:03d}" for i in range(len(rows))), tuple(rows), batch)
    history = History(order, data.draw(st.integers(0, order.total_steps)))
    reads = {
        (order.position(s).name, r): s
        for s in range(1, order.total_steps + 1)
        for r in order.rows_of(s)
    }

    for name, count in zip(order.names, rows, strict=True):
        for row in range(count):
            step, state = history.use(name, row)
            assert step == reads.get((name, row))
            assert state == (
                "never read"
                if step is None
                else "trained"
                if step <= history.done_step
                else "to come"
            )


def test_how_far_a_run_came_is_that_of_its_newest_attempt() -> None:
    """Catches steps called trained that were undone by going back."""
    ledger: list[Event] = [event(Started, attempt=1)]
    assert steps_done(entries(*ledger), None) == 0
    assert steps_done(entries(*ledger), StepRecord(7, 1)) == 7
    ledger += [event(StepSkipped, step=6), event(StepSkipped, step=3)]
    assert steps_skipped(entries(*ledger)) == {3, 6}
    ledger += [event(CheckpointSaved, step=9)]
    # A checkpoint of an earlier attempt, recorded by the next start, is no progress of that one.
    assert steps_done(entries(*ledger, event(CheckpointSaved, step=12, recovered=True)), None) == 9
    ledger += [event(Resumed, attempt=2, step=4)]
    assert steps_done(entries(*ledger), StepRecord(9, 1)) == 4
    assert steps_skipped(entries(*ledger)) == {3}
    assert steps_done(entries(*ledger, chunk_started("chunk_001", 1, 6)), None) == 5
    assert steps_done(entries(*ledger), StepRecord(5, 2)) == 5


def test_a_deferral_undoes_the_steps_after_it() -> None:
    """Catches steps and skips of the order before that are counted in the order after."""
    ledger = entries(
        event(Started, attempt=1),
        event(StepSkipped, attempt=1, step=2),
        event(StepSkipped, attempt=1, step=6),
        ChunkDeferred(attempt=1, chunk="chunk_001", step=4, order_index=3),
    )
    assert steps_done(ledger, StepRecord(9, 1)) == 4 and steps_skipped(ledger) == {2}
    assert steps_done(ledger, StepRecord(5, 2)) == 5


def test_a_skipped_step_is_not_called_trained(
    build: Build, ask: Ask, show: Ask, tmp_path: Path
) -> None:
    """Catches data said to have trained the model when its update was thrown away."""
    corpus = build()
    run = tmp_path / "runs" / "skipped"
    ledger = _run_tasks(corpus, run)
    ledger.append(event(StepSkipped, attempt=1, step=2, rows=(3, 6)))
    _metrics(run, 1, 2, "chunk_000", [3, 6], applied=False)
    assert ask("--run", run, "--step", 2)["state"] == "skipped"
    assert ask("--run", run, "--chunk", 0, "--row", 4)["rows"][0]["use"] == {
        "step": 2,
        "state": "skipped",
    }


# Mistakes


def test_mistakes_are_one_line(build: Build, refuse: Ask, tmp_path: Path) -> None:
    """Catches tracebacks, and messages that do not say what there is."""
    corpus = build()
    run = tmp_path / "runs" / "r"
    _run_tasks(corpus, run)
    data = corpus.folder
    assert "chunk_000 to chunk_003" in refuse(data, "--chunk", 4)
    assert "nearest is chunk_002" in refuse(data, "--chunk", "chunk_0002")
    assert "nearest is chunk_000" in refuse(data, "--chunk", "chunk_0")
    assert "it has rows 0 to 6" in refuse(data, "--chunk", 0, "--row", 7)
    assert "rows 5 to 9" in refuse(data, "--chunk", 0, "--rows", "5-9")
    assert "steps 1 to 8" in refuse("--run", run, "--step", 9)
    assert "steps 1 to 8" in refuse("--run", run, "--step", 0)
    assert "samples 0 to 2" in refuse("--run", run, "--step", 1, "--sample", 3)
    assert "rows 0 to 2 of chunk_000" in refuse("--run", run, "--step", 1, "--row", 3)
    assert "cannot be read" in refuse(tmp_path / "nothing")
    assert "not a directory" in refuse("--run", tmp_path / "nothing")
    assert "it has none" in refuse("--run", run, "--checkpoint", 1)

    for words, output in (
        ([], "give DATA"),
        ([data, "--step", 1], "--step needs --run"),
        ([data, "--checkpoint", 1], "--checkpoint needs --run"),
        ([data, "--row", 1], "--row needs --chunk"),
        ([data, "--chunk", 1, "--sample", 1], "--sample needs --step"),
        ([data, "--chunk", 1, "--document", "x"], "different queries"),
        ([data, "--chunk", 1, "--subset", "x"], "need --document"),
        ([data, "--chunk", 1, "--rows", "5-2"], "must go upwards"),
        ([data, "--chunk", 1, "--row", "-2"], "--row"),
        (["--run", run, "--chunk", 1, "--checkpoint", 1], "--checkpoint goes with"),
    ):
        assert output in refuse(*words)


@pytest.mark.parametrize("fault", ["missing", "cut", "empty", "other", "gap", "none"])
def test_damaged_provenance_is_one_line(build: Build, refuse: Ask, fault: str) -> None:
    """Catches a traceback of the Parquet library, and an answer from what is left."""
    corpus = build()
    path = corpus.folder / "chunk_001.parquet"

    match fault:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-40])
        case "empty":
            path.write_bytes(b"")
        case "other":
            parquet.write_table(pyarrow.table({"x": [1]}), path)
        case "gap":
            lines = parquet.read_table(path).to_pylist()
            lines = [line for line in lines if line["row"] != 3 or line["start"] == 0]
            write_pieces(path, _columns(lines), 3)
        case "none":
            content = json.loads(corpus.manifest.path.read_text())
            del content["chunks"][1]["provenance"]
            corpus.manifest.path.write_text(json.dumps(content))

    assert "chunk_001" in refuse(corpus.folder, "--chunk", 1, "--row", 3)
    if fault != "gap":
        output = refuse(corpus.folder, "--document", "a.py")
        assert "chunk_001" in output


def test_damaged_records_are_one_line(build: Build, refuse: Ask, tmp_path: Path) -> None:
    """Catches a run answered for from a broken record."""
    corpus = build()
    run = tmp_path / "runs" / "r"
    _run_tasks(corpus, run)
    (run / "metrics.jsonl").write_text('{"step": 1, broken\n')
    assert "metrics.jsonl: a line is damaged" in refuse("--run", run)
    (run / "metrics.jsonl").write_text('{"step": 1, "attempt"')
    config = (run / "config.yaml").read_text()

    for content, output in (
        ("data: [", "has no usable"),
        ("data: {}", "has no usable"),
        ("", "has no usable"),
    ):
        (run / "config.yaml").write_text(content)
        assert output in refuse("--run", run)

    (run / "config.yaml").unlink()
    assert "there is no checkpoint" in refuse("--run", run)
    (run / "config.yaml").write_text(config)

    # A checkpoint whose hash is right answers before the config, and may say anything.
    _checkpoint(corpus, run, ["chunk_000"], 2)
    manifest = run / "checkpoints" / "ckpt_001" / "manifest.json"
    facts = json.loads(manifest.read_text())
    for tree in ({}, {"data": [], "batch": 1}, {"data": {"manifest": 1}}):
        manifest.write_text(json.dumps(seal({**facts, "config": tree})))
        assert "ckpt_001 has no usable data.manifest" in refuse("--run", run)
    shutil.rmtree(run / "checkpoints")
    ledger = run / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"seq": 0', '"seq": 1'))
    assert "ledger.jsonl" in refuse("--run", run)
    ledger.write_text("")
    assert "has not started" in refuse("--run", run)


# The command line


def test_it_loads_no_torch_and_ends_quietly_in_a_pipe(build: Build) -> None:
    """Catches seconds of imports, and a traceback behind `| head`."""
    corpus = build()
    program = (
        f"import runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = {str(TOOL.parent)!r}\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        'except SystemExit as done: sys.stderr.write(f\'left {done.code} {"torch" in '
        "sys.modules}')"
    )

    words = [str(TOOL), str(corpus.folder), "--chunk", "0", "--row", "0"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )
    assert done.stderr == "left 0 False"
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    assert reader.stdin is not None and reader.wait() == 0

    piped = subprocess.run(
        [sys.executable, str(TOOL), str(corpus.folder)],
        stdout=reader.stdin,
        stderr=subprocess.PIPE,
        check=False,
    )

    assert (piped.returncode, piped.stderr) == (0, b"")

    latin = subprocess.run(
        [sys.executable, str(TOOL), str(corpus.folder), "--document", "héllo"],
        env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin"},
        capture_output=True,
        check=False,
    )

    assert (latin.returncode, latin.stderr) == (0, b"") and b"h\\xe9llo" in latin.stdout


def test_names_cannot_move_the_cursor() -> None:
    """Catches a document's name that rewrites the table around it, and columns of nothing."""
    assert clean("a\x1b[2J\n\tb\x7f\u202e") == "a\\x1b[2J\\n\\tb\\x7f\\u202e" and clean(None) == "-"
    assert table(["subset", "n", "fim"], [["a", "1", "-"], ["bcd", "1,000", "-"]]) == [
        "subset      n",
        "a           1",
        "bcd     1,000",
    ]


def test_long_answers_are_cut_unless_all_is_asked(
    build: Build, show: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches lines that silently go missing."""
    corpus = build()
    words = (corpus.folder, "--document", "web/p.jsonl")
    count = len(find_document(corpus.manifest, "web/p.jsonl"))
    monkeypatch.setattr(tool.View, "lines", 10)
    assert f"... and {count - 10} pieces more; --all shows them" in show(*words)
    whole = show(*words, "--all")
    assert "more" not in whole and whole.count("chunk_0") == count


def test_a_manifest_is_read_from_its_folder_or_itself(build: Build, ask: Ask) -> None:
    """Catches two answers for one data set."""
    corpus = build()
    assert ask(corpus.folder) == ask(corpus.manifest.path)
    assert isinstance(read_manifest(corpus.folder).chunks[0], ChunkInfo)
