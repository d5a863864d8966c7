"""`tools/trace.py`: texts, tokens and items against documents that are known here."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from k2train.checkpoint.manifest import seal
from k2train.data.manifest import Manifest
from k2train.data.tokenizer import EOS_ID, Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.record.events import CheckpointSaved, StageTransition, Started
from k2train.record.ledger import Ledger
from tests.support.command_line import load_tool
from tests.support.data_folder import add_chunk, finish
from tests.support.events import event

pytest.importorskip("pydivsufsort", reason="the extra `trace` is not installed")

tool = load_tool("trace")
ROWS, LENGTH, BATCH = 6, 32, 3
LIST = "river stone lamp orchard winter engine ribbon captain letter morning silver garden hammer"
WORDS = LIST.split()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        [" ".join(np.random.default_rng(i).permutation(WORDS)) for i in range(40)], 290
    )


def document(seed: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, 60)) + f" number {seed}."


def beginning(tokenizer: Tokenizer, seed: int) -> str:
    """Nearly all that a row has of a document."""
    return tokenizer.decode(tokenizer.encode(document(seed))[: LENGTH - 2])


def make_data(folder: Path, tokenizer: Tokenizer, first: int) -> Manifest:
    """Two chunks: every row is the beginning of a document of its own, `first` and later ones."""
    folder.mkdir()
    infos = []
    for chunk in range(2):
        seeds = [first + chunk * ROWS + row for row in range(ROWS)]
        ids = [[*tokenizer.encode(document(seed)), EOS_ID][:LENGTH] for seed in seeds]
        same = {"start": 0, "length": LENGTH, "subset": "web", "source": "file", "offset": 0}
        pieces = {key: [value] * ROWS for key, value in same.items()}
        pieces |= {"row": list(range(ROWS)), "document": [f"d{seed}" for seed in seeds]}
        name, vocab = f"chunk_{chunk:03d}", tokenizer.vocab_size
        infos.append(add_chunk(folder, name, ids, vocab, {"web": ROWS * LENGTH}, pieces=pieces))
    tokenizer.save(folder / "tokenizer.model")
    facts = {"tokenizer": {"file": "tokenizer.model", "specials": list(tokenizer.specials)}}
    return finish(folder, infos, LENGTH, tokenizer.vocab_size, tokenizer.sha256, facts)


def make_run(folder: Path, manifest: Manifest, done: int) -> Ledger:
    """A run of four steps, of which `done` are in its metrics, with a checkpoint after each."""
    folder.mkdir(parents=True)
    order = [info.name for info in manifest.chunks]
    config = {
        "data": {"manifest": str(manifest.path), "order": order, "sequence_length": LENGTH},
        "batch": {"global_sequences": BATCH},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append(event(Started, attempt=1, data_manifest_sha256=manifest.sha256))
    for step in range(done + 1):
        name = f"ckpt_{step // 2:03d}" + (f"_step_{step:06d}" if step % 2 else "")
        entries = [{"name": i.name, "sha256": i.sha256} for i in manifest.chunks]
        facts = {
            "format": 1,
            "name": name,
            "step": step,
            "adam_steps": step,
            "consumed_tokens": step * BATCH * LENGTH,
            "chunks": {"consumed": step // 2, "step_in_chunk": step % 2, "order": entries},
            "config": config,
            "data": {"manifest": str(manifest.path), "manifest_sha256": manifest.sha256},
            "tensors": {},
            "files": {},
        }
        path = folder / "checkpoints" / name
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(json.dumps(seal(facts)))
        ledger.append(event(CheckpointSaved, checkpoint=name, attempt=1, step=step))
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(1, done + 1):
            chunk, first = f"chunk_{(step - 1) // 2:03d}", (step - 1) % 2 * BATCH
            row = {"step": step, "attempt": 1, "chunk": chunk, "loss": 5.0 - step}
            stream.write(json.dumps({**row, "rows": [first, first + BATCH]}) + "\n")
    return ledger


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Run `second` started from the second step of `first`; documents from 0, and from 100."""
    folder = tmp_path_factory.mktemp("trace")
    first = make_data(folder / "data1", tokenizer, 0)
    second = make_data(folder / "data2", tokenizer, 100)
    make_run(folder / "runs" / "first", first, 3)
    ledger = make_run(folder / "runs" / "second", second, 3)
    parent = str(folder / "runs" / "first" / "checkpoints" / "ckpt_001")
    ledger.append(event(StageTransition, attempt=1, parent=parent, parent_step=2))
    return folder


Ask = Callable[..., list[Any]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """The JSON objects of an answer."""

    def answer(*words: object) -> list[Any]:
        assert tool.main([*map(str, words), "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line]

    return answer


def rows_of(span: Any) -> list[tuple[Any, ...]]:
    return [
        (row["chunk"], row["row"], row["start"], row["documents"][0]["document"])
        for place in span["places"]
        for row in place["rows"]
    ]


def steps_of(span: Any) -> list[tuple[Any, ...]]:
    keys = ("run", "state", "step", "loss", "checkpoint_before", "checkpoint_after")
    return [
        tuple(one[key] for key in keys)
        for place in span["places"]
        for row in place["rows"]
        for one in row["exposures"]
    ]


def test_a_quotation_from_the_middle_of_a_document(
    base: Path, tmp_path: Path, ask: Ask, tokenizer: Tokenizer
) -> None:
    """Catches a first word that is lost for want of the space before it, bytes that are another
    part of the text, and a step, loss or checkpoint that is off by one.
    """
    quoted = " ".join(beginning(tokenizer, 4).split()[2:-1])
    path = tmp_path / "text.txt"
    path.write_text("zzz " + quoted)
    words = (base / "runs" / "first", "--text", path, "--min-tokens", 12)
    (span,) = ask(*words)
    text = "zzz " + quoted
    assert text.encode()[span["first"] : span["last"]].decode() == " " + quoted
    assert span["text"] == " " + quoted and span["ids"] == tokenizer.encode(" " + quoted)
    start = len(tokenizer.encode(" ".join(document(4).split()[:2])))
    assert rows_of(span) == [("chunk_000", 4, start, "d4")]
    assert span["places"][0]["rows"][0]["documents"][0]["offset"] == start
    assert steps_of(span) == [("first", "trained", 2, 3.0, "ckpt_000_step_000001", "ckpt_001")]

    # Its first word has no space before it here.
    path.write_text(quoted)
    (span,) = ask(*words)
    assert (span["first"], span["last"], rows_of(span)[0][:2]) == (0, len(quoted), ("chunk_000", 4))
    assert span["ids"] == tokenizer.encode(" " + quoted)


def test_stages_before_are_searched_up_to_their_checkpoint(
    base: Path,
    tmp_path: Path,
    ask: Ask,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a stage that is forgotten, and steps after the checkpoint that this run is from."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(beginning(tokenizer, seed) for seed in (1, 7, 101, 111)))
    spans = ask(base / "runs" / "second", "--text", path, "--min-tokens", 25)
    assert [rows_of(span)[0][3] for span in spans] == ["d1", "d7", "d101", "d111"]
    assert [steps_of(span)[0][:3] for span in spans] == [
        ("first", "trained", 1),
        ("first", "after the branch", 3),
        ("second", "trained", 1),
        ("second", "not trained yet", 4),
    ]
    assert tool.main([str(base / "runs" / "second"), "--text", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "first step 1: trained, attempt 1, loss of the step 4.0000" in shown
    assert "second: not trained yet, it belongs to step 4" in shown and "web: file:d111" in shown


def test_tokens_and_standard_input(
    base: Path,
    tmp_path: Path,
    ask: Ask,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a data folder that is asked for a run, and a text that is nowhere told as found."""
    ids = tokenizer.encode(document(9))[4:20]
    (tmp_path / "ids.json").write_text(json.dumps([EOS_ID, *ids]))
    (span,) = ask(base / "data1", "--tokens", tmp_path / "ids.json", "--min-tokens", 12)
    assert (span["first"], span["last"], span["ids"]) == (1, 17, ids)
    assert rows_of(span) == [("chunk_001", 3, 4, "d9")] and steps_of(span) == []

    stdin = io.TextIOWrapper(io.BytesIO(b"nothing of this kind was ever written"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert tool.main([str(base / "data1"), "--stdin"]) == 0
    assert "no span of at least 8 tokens" in capsys.readouterr().out


def test_items_of_an_evaluation(
    base: Path,
    tmp_path: Path,
    ask: Ask,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches an item that is not found, covered tokens that are counted twice or not at all, and
    items that count as trained on though their step is to come.
    """
    known = [beginning(tokenizer, seed) for seed in (0, 100, 110)]
    texts = [known[0], "zzz qqq " * 8 + known[1], known[2], "zzz " * 30]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    words = (base / "runs" / "second", "--items", path, "--key", "question")
    found = ask(*words)
    assert [item["trained"] for item in found] == [True, True, False, False]
    assert [item["steps"] for item in found] == [[1], [1], [], []]
    assert found[0]["covered"] > 0.9 and 0.2 < found[1]["covered"] < 0.7
    assert found[3]["longest"] == 0 == found[3]["covered"]
    assert all(item["longest"] <= item["tokens"] for item in found)

    assert tool.main([*map(str, words)]) == 0
    shown = capsys.readouterr().out
    assert "4 items, spans from 13 tokens" in shown and "no span" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "missing.txt"], "missing.txt: cannot be read"),
        (["--tokens", "bad.json"], "must hold a JSON list of token ids"),
        (["--items", "items.jsonl", "--key", "answer"], "line 1 has no text under 'answer'"),
        (["--items", "bad.json"], "line 1 is not JSON"),
        ([], "one of the arguments --text --tokens --stdin --items is required"),
    ],
)
def test_a_mistake_is_one_line(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    """Catches a traceback, and a mistake that is told after the index was built."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "items.jsonl").write_text('{"text": "a"}\n')
    try:
        code = tool.main([str(base / "data1"), *words])
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    assert code == 2 and shown.out == "" and shown.err.count("\n") == 1 and message in shown.err


def test_the_index_is_built_ahead(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an index that is built again by the search, or elsewhere than where it is wanted."""
    words = ["index", str(base / "runs" / "second"), "--folder", str(tmp_path / "index")]
    assert tool.main(words) == 0
    shown = capsys.readouterr()
    assert shown.out.count("384 tokens in 2 parts") == 2 and "indexing chunk_001" in shown.err
    assert tool.main([*words, "--check"]) == 0
    assert "indexing" not in capsys.readouterr().err
    assert len(list((tmp_path / "index").iterdir())) == 2
