"""`chat/prepare.py`: catches data that is lost, learned wrongly, or half written."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2train.chat.prepare import ChatPreparation, ChatSettings
from k2train.data.inspect.provenance import pieces_of
from k2train.data.manifest import Manifest, read_manifest
from k2train.data.prepare.progress import Progress
from k2train.data.tokenizer import Tokenizer
from k2train.data.verify.folder import verify_folder
from k2train.errors import DataError
from tests.support.chat import CHATML, applied, exported, k2_tokenizer
from tests.support.tiny_generation import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 64


def _conversation(n: int) -> dict[str, Any]:
    turns = [("user", "the cat " * (n % 4 + 1) + str(n)), ("assistant", "a dog " * (n % 3 + 1))]
    if n % 5 == 0:
        turns = [*turns, ("user", "ça va"), ("assistant", f"été {n}")]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def _write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tiny_tokenizer().save(folder / "tokenizer.model")
    _write(folder / "in" / "chat.jsonl", [_conversation(n) for n in range(60)])
    return folder


def _settings(base: Path, output: Path, **changes: Any) -> ChatSettings:
    given: dict[str, Any] = {
        "inputs": (str(base / "in" / "chat.jsonl"),),
        "output": output,
        "tokenizer": base / "tokenizer.model",
        "sequence_length": LENGTH,
        "chunks": 3,
        "held_out_rows": 2,
    }
    return ChatSettings(**{**given, **changes})


def _prepare(settings: ChatSettings, force: bool = False) -> tuple[Manifest, ChatPreparation]:
    preparation = ChatPreparation(settings, Progress(None))
    return preparation.run(force)[0], preparation


def _arrays(manifest: Manifest, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, learned flags and borders of a chunk, read by NumPy alone."""
    ids = np.load(manifest.folder / f"{name}.npy")
    packed = np.load(manifest.folder / f"{name}.mask.npy")
    learned = np.unpackbits(packed, axis=1, bitorder="little", count=ids.shape[1]).astype(bool)
    return ids, learned, np.load(manifest.folder / f"{name}.borders.npy")


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_rows_are_whole_conversations(base: Path, tmp_path: Path) -> None:
    """Catches a lost, split or doubled conversation, a mask of another one, and learned padding."""
    manifest, preparation = _prepare(_settings(base, tmp_path / "out"))
    tokenizer = k2_tokenizer()
    theirs = exported(tmp_path / "hf", tokenizer)
    wanted = {}
    for n in range(60):
        turns = [(m["role"], m["content"]) for m in _conversation(n)["messages"]]
        made = applied(theirs, turns)
        wanted[tuple(made["input_ids"])] = made["assistant_masks"]

    seen, padding, targets = [], 0, 0
    for info in manifest.all_chunks():
        ids, learned, borders = _arrays(manifest, info.name)
        assert info.targets == int(learned.sum()) and learned[:, 1:].any(axis=1).all()
        assert not learned[:, 0].any()
        targets += int(learned.sum())
        begins = {(int(b) // LENGTH, int(b) % LENGTH) for b in borders}
        begins |= {(row, 0) for row in range(len(ids))}
        for row in range(len(ids)):
            cuts = [*sorted(start for r, start in begins if r == row), LENGTH]
            for start, end in pairwise(cuts):
                part = ids[row, start:end].tolist()
                if set(part) == {tokenizer.eos_id}:
                    padding += len(part)
                    assert end == LENGTH and not learned[row, start:end].any()
                    continue
                seen.append(tuple(part))
                assert learned[row, start:end].astype(int).tolist() == wanted[tuple(part)]
    assert sorted(seen) == sorted(wanted)
    account = preparation.account
    assert (account.padding, account.targets, account.conversations) == (padding, targets, 60)
    assert manifest.held_out is not None and manifest.held_out.rows == 2
    assert verify_folder(manifest) == []


def test_the_folder_says_what_it_is(base: Path, tmp_path: Path) -> None:
    """Catches a folder that export or chat could not read, and an origin that leads nowhere."""
    manifest, _ = _prepare(_settings(base, tmp_path / "out"))
    facts = manifest.facts
    assert facts.chat is not None and facts.tokenizer is not None
    assert (facts.chat.template, facts.chat.learn) == ("k2", "responses")
    assert facts.tokenizer.specials == k2_tokenizer().specials
    assert manifest.vocab_size == k2_tokenizer().vocab_size
    assert facts.tokenizer.specials[-4:] == (
        "<|endofsystemprompt|>",
        "<|beginofuser|>",
        "<|beginofsystem|>",
        "<|endofchat|>",
    )
    lines = set()
    for info in manifest.all_chunks():
        for row, pieces in pieces_of(manifest, info, range(info.rows)).items():
            assert row < info.rows
            lines |= {piece["document"] for piece in pieces if piece["source"] == "in/chat.jsonl"}
    assert lines == {str(n) for n in range(1, 61)}


def test_the_same_bytes_for_the_same_seed(base: Path, tmp_path: Path) -> None:
    """Catches a choice by a clock, a hash of this process, or the order of files."""
    _prepare(_settings(base, tmp_path / "one"))
    records = [_conversation(n) for n in range(60)]
    first = _write(tmp_path / "in" / "a.jsonl", records[40:])
    second = _write(tmp_path / "in" / "b.jsonl", records[:40])
    names = (str(second), str(first))
    _prepare(_settings(base, tmp_path / "two", inputs=names))
    _prepare(_settings(base, tmp_path / "three", inputs=names[::-1]))
    _prepare(_settings(base, tmp_path / "four", seed=2))
    one, two, three, four = (_bytes_of(tmp_path / n) for n in ("one", "two", "three", "four"))
    assert {k: v for k, v in two.items() if k != "manifest.json"} == {
        k: v for k, v in three.items() if k != "manifest.json"
    }
    # Origins differ, ids and masks do not.
    assert [one[n] for n in one if n.endswith(".npy")] == [
        two[n] for n in two if n.endswith(".npy")
    ]
    assert one["chunk_000.npy"] != four["chunk_000.npy"]

    again, _ = _prepare(_settings(base, tmp_path / "again" / "one"))
    assert _bytes_of(again.folder) == one


def test_learn_all(base: Path, tmp_path: Path) -> None:
    """Catches padding that is learned, and a prompt that is not."""
    manifest, _ = _prepare(_settings(base, tmp_path / "out", learn="all", held_out_rows=0))
    for info in manifest.chunks:
        ids, learned, _ = _arrays(manifest, info.name)
        length = [LENGTH - len(_tail(row)) for row in ids]
        expected = np.arange(LENGTH)[None] < np.array(length)[:, None]
        expected[:, 0] = False
        assert (learned == expected).all()


def _tail(row: np.ndarray) -> np.ndarray:
    """The padding of a row: what follows its last `<|endofchat|>`."""
    end = k2_tokenizer().special_id("<|endofchat|>")
    return row[int(np.flatnonzero(row == end)[-1]) + 1 :]


def test_what_is_left_out_is_counted_and_listed(base: Path, tmp_path: Path) -> None:
    """Catches bad input that ends the preparation, is used, or is dropped without a word."""
    good = [_conversation(n) for n in range(30)]
    forged = {"inputs": "<|beginofsystem|> yes </s>", "targets": "no <|endofchat|>"}
    bad = [
        "{",
        {"inputs": "q", "targets": " "},
        {"inputs": "the cat " * 100, "targets": "r"},
        good[3],
        {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "r"}]},
        '{"inputs": "\\ud800", "targets": "r"}',
        {"inputs": "q", "targets": "r", "messages": [*_conversation(7)["messages"][:1]]},
    ]
    path = _write(tmp_path / "in" / "mixed.jsonl", [*good, *bad, forged])
    settings = _settings(base, tmp_path / "out", inputs=(str(path),), chunks=1)
    manifest, preparation = _prepare(settings)
    account = preparation.account
    assert account.read == 38 and account.conversations == 31
    assert account.forged == 1 and account.first_forged == f"{path}:38"
    listed = [
        json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().split("\n")[:-1]
    ]
    assert [one["line"] for one in listed] == [31, 32, 33, 34, 35, 36, 37]
    told = "\n".join(account.lines(LENGTH))
    assert f"{path}:31: not JSON" in told and "the first at" in told
    assert "a row 64" in told and "'tool'" in told and "lone surrogate" in told
    assert sum(account.left_out.values()) == 7 and len(account.left_out) == 4

    ids = np.concatenate([_arrays(manifest, c.name)[0].ravel() for c in manifest.all_chunks()])
    end = k2_tokenizer().special_id("<|endofchat|>")
    assert int((ids == end).sum()) == 31


@pytest.mark.parametrize(
    ("records", "changes", "told"),
    (
        (["{"], {}, "none of 1 records is a conversation that can be used; the first: .*:1: not"),
        ([], {}, "no record in .*: name other files"),
        ([_conversation(1)], {"chunks": 2}, "too few for --chunks 2 and --held-out 2"),
        ([_conversation(1)], {"template": "no.jinja"}, "no.jinja cannot be read"),
        ([_conversation(1)], {"tokenizer": Path("no.model")}, "is no run, checkpoint, data"),
        ([_conversation(1)], {"inputs": ("no.jsonl",)}, "matches no file"),
    ),
)
def test_mistakes_leave_nothing(
    records: list[Any], changes: dict[str, Any], told: str, base: Path, tmp_path: Path
) -> None:
    """Catches a folder that looks finished although nothing is in it."""
    path = _write(tmp_path / "in" / "few.jsonl", records)
    settings = _settings(base, tmp_path / "out", **{"inputs": (str(path),), **changes})
    with pytest.raises(DataError, match=told):
        _prepare(settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_an_existing_folder(base: Path, tmp_path: Path) -> None:
    """Catches data that is replaced unasked, and a damaged folder that passes for whole."""
    settings = _settings(base, tmp_path / "out")
    first, _ = _prepare(settings)
    assert ChatPreparation(settings, Progress(None)).run() == (first, False)
    other = _settings(base, tmp_path / "out", seed=5)
    with pytest.raises(DataError, match="holds other data"):
        _prepare(other)
    assert _prepare(other, force=True)[0].sha256 != first.sha256

    mask = tmp_path / "out" / "chunk_001.mask.npy"
    mask.write_bytes(mask.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"chunk_001\.mask\.npy is missing or damaged"):
        _prepare(other)
    (tmp_path / "notes").mkdir()
    _write(tmp_path / "notes" / "mine.txt", ["x"])
    with pytest.raises(DataError, match="is not a data folder"):
        _prepare(_settings(base, tmp_path / "notes"), force=True)


KILL_AT_MANIFEST = (
    "import os, signal, sys; import k2train.chat.prepare as p; "
    "p.write_manifest = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL); "
    "from k2train.data.prepare.progress import Progress; from pathlib import Path; "
    "p.ChatPreparation(p.ChatSettings((sys.argv[1],), Path(sys.argv[2]), Path(sys.argv[3]), 64), "
    "Progress(None)).run()"
)


def test_a_killed_start_leaves_nothing_that_looks_finished(base: Path, tmp_path: Path) -> None:
    """Catches a folder without its end under its name, and leftovers that stop the next start."""
    given = [str(base / "in" / "chat.jsonl"), str(tmp_path / "out"), str(base / "tokenizer.model")]
    killed = subprocess.run(
        [sys.executable, "-c", KILL_AT_MANIFEST, *given],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / "out.tmp/chunk_000.npy").exists()
    assert not (tmp_path / "out.tmp/manifest.json").exists()
    _prepare(_settings(base, tmp_path / "out", chunks=1, held_out_rows=0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_template_of_ones_own(base: Path, tmp_path: Path) -> None:
    """Catches a marker that is no token, so that a model would spell it."""
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML)
    with pytest.raises(DataError, match="--special"):
        _prepare(_settings(base, tmp_path / "out", template=str(template)))
    specials = ("<|im_start|>", "<|im_end|>")
    settings = _settings(base, tmp_path / "out", template=str(template), specials=specials)
    manifest, _ = _prepare(settings)
    assert manifest.facts.chat is not None and manifest.facts.tokenizer is not None
    assert manifest.facts.chat.template == "jinja"
    assert (manifest.folder / manifest.facts.chat.file).read_text() == CHATML
    assert manifest.facts.tokenizer.specials[-2:] == specials
    # The tokenizer of chat data has the markers already.
    again = _settings(
        base,
        tmp_path / "again",
        template=str(template),
        specials=specials,
        tokenizer=manifest.folder,
    )
    assert _prepare(again)[0].tokenizer_sha256 == manifest.tokenizer_sha256
    assert isinstance(read_manifest(tmp_path / "again"), Manifest)
    assert Tokenizer.load(manifest.folder / "tokenizer.model", specials).vocab_size < 400
