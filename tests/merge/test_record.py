"""`merge/record.py`, `merge/verify.py` and the command: who writes the ledger, mistakes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2train.checkpoint.manifest import MANIFEST, read_manifest, seal
from k2train.errors import UserError
from k2train.files import sha256_file
from k2train.record.events import CheckpointsMerged, of_kind
from k2train.record.ledger import read_ledger
from k2train.run_lock.lock import RunLock
from tests.support.command_line import load_tool
from tests.support.tiny_corpus import tree_of as files_of

tool = load_tool("merge")
verify_run = load_tool("verify_run")
verify_checkpoint = load_tool("verify_checkpoint")


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run, in which a merge may write."""
    shutil.copytree(run, tmp_path / "r")
    yield tmp_path / "r"


def merge(run: Path, *arguments: object, code: int = 0) -> None:
    assert tool.main([str(run), *map(str, arguments)]) == code


def refused(capsys: pytest.CaptureFixture[str], run: Path, *arguments: object) -> str:
    """Run the command; its only line on stderr."""
    merge(run, *arguments, code=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_the_ledger_of_the_run_has_it(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a merge without a record, a broken chain, and a run that is called damaged for it."""
    merge(own, "--checkpoints", "2-4", "--weights", "linear")
    path = own / "merged" / "linear3_ckpt_002_ckpt_004"
    said = capsys.readouterr().out
    assert f"{path}: 39 tensors" in said and f"recorded in {own / 'ledger.jsonl'}" in said
    assert f"{own}/checkpoints/ckpt_004: step 20, weight 0.5, fp32 master weights" in said

    (event,) = of_kind(read_ledger(own / "ledger.jsonl"), CheckpointsMerged)
    assert (event.checkpoint, event.weights, event.step) == (f"merged/{path.name}", "linear", 20)
    assert event.manifest_sha256 == sha256_file(path / MANIFEST)
    assert [part.weight for part in event.parents] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    for part in event.parents:
        state = read_manifest(Path(part.path)).state
        assert state is not None and part.root == state.root
        assert part.manifest_sha256 == sha256_file(Path(part.path) / MANIFEST)
    assert not (path / "ledger.jsonl").exists()

    assert verify_run.main([str(own)]) == 0
    assert verify_checkpoint.main(["--root", str(path)]) == 0
    assert f"merged from 3 checkpoints, root {event.root}" in capsys.readouterr().out

    # Again under the same name, and a checkpoint that is merged again.
    assert "exists; a checkpoint is never overwritten" in refused(
        capsys, own, "--checkpoints", "2-4", "--weights", "linear"
    )
    merge(own, "--checkpoints", f"{path},1", "--weights", "mean", "--to", own / "merged" / "twice")
    assert verify_run.main([str(own)]) == 0


def test_while_the_run_trains(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a line in the ledger of a trainer, which it would take for another job's."""
    before = files_of(own)
    with RunLock(own):
        merge(own, "--checkpoints", "3,4", "--weights", "mean")
    path = own / "merged" / "mean2_ckpt_003_ckpt_004"
    assert f"recorded in {path / 'ledger.jsonl'}" in capsys.readouterr().out
    assert (own / "ledger.jsonl").read_bytes() == before["ledger.jsonl"]
    (event,) = of_kind(read_ledger(path / "ledger.jsonl"), CheckpointsMerged)
    assert event.checkpoint == f"merged/{path.name}"
    assert verify_run.main([str(own)]) == 0


def test_what_verify_run_finds(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a merged checkpoint that was damaged, exchanged or taken away without a word."""
    merge(own, "--checkpoints", "3,4", "--weights", "mean")
    path = own / "merged" / "mean2_ckpt_003_ckpt_004"

    def problem() -> str:
        capsys.readouterr()
        assert verify_run.main([str(own)]) == 2
        return capsys.readouterr().err

    file = next((path / "model").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{path}: model/" in problem()
    file.write_bytes(content)
    assert verify_run.main([str(own)]) == 0

    text = json.loads((path / MANIFEST).read_text())
    text["merged"]["parents"][0]["path"] = "elsewhere"
    (path / MANIFEST).write_text(json.dumps(seal(text)))
    assert f"{path / MANIFEST}: is not the one that" in problem()
    shutil.move(path, own / "merged" / "other")
    (own / "merged" / "x.merge.tmp").mkdir()
    capsys.readouterr()
    assert verify_run.main([str(own)]) == 0
    told = capsys.readouterr().out
    assert f"note: {path}: is gone, ledger.jsonl records its merge" in told
    assert f"note: {own / 'merged' / 'other'}: is in no ledger" in told
    assert "x.merge.tmp: was never finished" in told


def test_mistakes(
    base: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, a merge of two models, and anything left behind."""
    before = files_of(own)

    def said(checkpoints: object, weights: str = "mean", *rest: object) -> str:
        return refused(capsys, own, "--checkpoints", checkpoints, "--weights", weights, *rest)

    assert "has no 'ckpt_009'" in said(9)
    assert "--weights has 2 numbers, --checkpoints has 3 checkpoints" in said("2-4", "0.5,0.5")
    assert "has nan" in said("2,3", "nan,1")
    assert "they must sum to 1" in said("2,3", "1,1")

    def edited(name: str, **changes: object) -> Path:
        path = tmp_path / name
        shutil.copytree(own / "checkpoints" / "ckpt_004", path)
        content = json.loads((path / MANIFEST).read_text())
        content["name"] = name
        for key, value in changes.items():
            section, _, inner = key.partition("__")
            (content[section] if section == "data" else content["config"][section])[inner] = value
        (path / MANIFEST).write_text(json.dumps(seal(content)))
        return path

    other = edited("stretched", model__rope_theta=77.0)
    assert "is of another model than" in said(f"3,{other}")
    assert "model.rope_theta 10000.0 and 77.0" in said(f"3,{other}")
    assert "embedding.weight.master has shape" in said(f"3,{edited('wide', model__vocab_size=260)}")
    assert "has tokenizer uuuuuuuu" in said(f"3,{edited('t', data__tokenizer_sha256='u' * 64)}")
    assert "one tokenizer can be merged" in said(f"{tmp_path / 't'},3")

    place = base / "runs" / "r" / "checkpoints" / "ckpt_099"
    assert "would lie among the checkpoints of a run" in said("3,4", "mean", "--to", place)
    assert "exists" in said("3,4", "mean", "--to", own / "checkpoints")
    ledger = own / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"step": 5', b'"step": 6', 1))
    assert f"{ledger}: line" in said("3,4")
    ledger.write_bytes(before["ledger.jsonl"])

    truncated = own / "checkpoints" / "ckpt_003"
    file = next((truncated / "optimizer").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    assert f"ckpt_003: optimizer/{file.name} has {len(content) - 4} bytes" in said("3,4")
    file.write_bytes(content)
    assert files_of(own) == before


def test_it_cannot_be_continued(own: Path, tmp_path: Path) -> None:
    """Catches a run that goes on from a merged checkpoint as if it had moments."""
    from k2train.config.load import Config
    from k2train.train.preflight import prepare_start
    from tests.merge.conftest import tree_of

    to = tmp_path / "runs" / "next" / "checkpoints" / "ckpt_000"
    merge(own, "--checkpoints", "3,4", "--weights", "mean", "--to", to)
    tree = tree_of(tmp_path, "next")
    tree["data"]["manifest"] = str(own.parent / "none")
    manifest = read_manifest(own / "checkpoints" / "ckpt_004").data.manifest
    tree["data"]["manifest"] = str(manifest)
    with pytest.raises(UserError, match="ckpt_000 was merged from 2 checkpoints, without moments"):
        prepare_start(Config.model_validate(tree), 1, False)
