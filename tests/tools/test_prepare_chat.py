"""`tools/prepare_chat.py`: catches an option without effect, and a mistake with a traceback."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from k2train.data.manifest import read_manifest
from tests.support.command_line import load_tool
from tests.support.tiny_generation import tiny_tokenizer

prepare_chat = load_tool("prepare_chat")


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """Arguments for 30 conversations, one of them broken."""
    tiny_tokenizer().save(tmp_path / "tokenizer.model")
    records: list[Any] = [{"inputs": f"the cat {n}", "targets": "a dog"} for n in range(30)]
    records[4] = {"inputs": "the cat"}
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    return [
        str(tmp_path / "in.jsonl"),
        *("--to", str(tmp_path / "out")),
        *("--tokenizer", str(tmp_path / "tokenizer.model")),
        *("--sequence-length", "64"),
    ]


def test_what_is_printed(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a summary that does not say what became of the conversations."""
    options = [
        "--chunks",
        "2",
        "--epochs",
        "2",
        "--held-out",
        "1",
        "--system",
        "sat",
        "--seed",
        "3",
    ]
    assert prepare_chat.main([*asked, *options]) == 0
    out = capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out")
    rows = sum(info.rows for info in manifest.chunks)
    assert "read: 30 records, 29 of them used" in out
    assert "in.jsonl:5: has neither messages" in out
    assert f"packed: {rows} rows of 64 tokens, and 1 held out" in out
    assert "prepared: 2 chunks" in out and manifest.sha256[:16] in out
    assert manifest.facts.seed == 3
    assert prepare_chat.main([*asked, *options]) == 0
    assert "already prepared, all hashes checked: 2 chunks" in capsys.readouterr().out
    assert prepare_chat.main([*asked, *options, "--learn", "all"]) == 2
    assert "--force" in capsys.readouterr().err
    assert prepare_chat.main([*asked, *options, "--learn", "all", "--force"]) == 0
    chat = read_manifest(tmp_path / "out").facts.chat
    assert chat is not None and chat.learn == "all"


@pytest.mark.parametrize(
    ("options", "told"),
    (
        (["--held-out", "-1"], "--held-out (-1) must be at least 0"),
        (["--seed", str(2**70)], "--seed"),
        (["--special", " "], "--special ' ' is empty"),
        (["--template", "none.jinja"], "none.jinja cannot be read"),
        (["--chunks", "99"], "too few for --chunks 99"),
    ),
)
def test_mistakes_are_one_line(
    options: list[str], told: str, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, and a message that names no option."""
    assert prepare_chat.main([*asked, *options]) == 2
    err = capsys.readouterr().err.splitlines()
    assert told in err[-1] and not any("Traceback" in line for line in err)


def test_a_start_that_fails_leaves_nothing(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches folders that were made on the way to an output that never came."""
    (tmp_path / "in.jsonl").write_text("\n")
    asked[2] = str(tmp_path / "new" / "a" / "out")
    assert prepare_chat.main(asked) == 2
    assert f"no record in {asked[0]}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_no_mistake(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an exit code that tells launchers not to start the same command again."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_chat.ChatPreparation, "run", full)
    assert prepare_chat.main(asked) == 1
    told = capsys.readouterr().err
    assert "No space left on device" in told and "--to" in told and told.count("\n") == 1
