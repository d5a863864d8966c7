"""`tools/convert_hf.py`: both directions as commands, mistakes as one line with exit code 2."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from k2train.checkpoint.manifest import manifest_text, seal
from k2train.data.tokenizer import Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from tests.hf.conftest import tokenizer, trained  # noqa: F401
from tests.support.command_line import load_tool
from tests.support.hugging_face import tensors_of

tool = load_tool("convert_hf")
ROOT = Path(__file__).resolve().parents[2]


def line_of(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run the command; its only line on stderr."""
    assert tool.main([str(argument) for argument in arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_out_and_in(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """Catches a command that does not do what it says, or says nothing of its checks."""
    out, run = tmp_path / "out", tmp_path / "run"
    given = ["export", str(trained), str(out), "--tokenizer", "none", "--shard-bytes", "20KB"]
    assert tool.main(given) == 0
    said = capsys.readouterr().out
    assert "ckpt_001: step 5, bf16 from model/" in said
    assert "the same likeliest token at 32 of 32 positions" in said
    assert f"{out}: checked, " in said and "peak memory" in said

    assert tool.main(["import", str(out), "--to", str(run)]) == 0
    said = capsys.readouterr().out
    assert "weights alone; start a run with run.init_from=" in said and "tokenizer.model" in said
    given = ["export", str(run), str(tmp_path / "b"), "--no-check", "--tokenizer", "none"]
    assert tool.main(given) == 0
    assert "not checked (--no-check)" in capsys.readouterr().out
    assert set(tensors_of(tmp_path / "b")) == set(tensors_of(out))


def test_while_the_run_goes_on(
    trained: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a save inside a chunk, one that is not finished, or a damaged newest one taken."""
    run = tmp_path / "run"
    shutil.copytree(trained / "checkpoints", run / "checkpoints")
    newest = run / "checkpoints" / "ckpt_001"
    for name in ("ckpt_002.1.tmp", "ckpt_001_step_000007"):
        shutil.copytree(newest, newest.parent / name)
    file = min((newest / "model").iterdir())
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)

    given = ["export", str(run), str(tmp_path / "out"), "--tokenizer", "none"]
    assert tool.main(given) == 0
    said = capsys.readouterr().out
    assert "refused before: " in said and "ckpt_001" in said
    assert json.loads((tmp_path / "out" / "k2train_export.json").read_text())["step"] == 0


def test_a_run_that_saves_meanwhile(
    trained: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches an export that takes an older checkpoint, or gives up, because the newest one went
    away under it: the run has a newer one by then.
    """
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(trained / "checkpoints", folder)
    right, seen = tool.export, []

    def export(source: Any, *rest: Any) -> Any:
        seen.append(source.path.name)
        if len(seen) == 1:
            content = json.loads((folder / "ckpt_001" / "manifest.json").read_text())
            (folder / "ckpt_001").rename(folder / "ckpt_002")
            content = seal(content | {"name": "ckpt_002"})
            (folder / "ckpt_002" / "manifest.json").write_text(manifest_text(content))
        return right(source, *rest)

    monkeypatch.setattr(tool, "export", export)
    given = ["export", str(folder.parent), str(tmp_path / "out"), "--tokenizer", "none"]
    assert tool.main([*given, "--no-check"]) == 0
    assert seen == ["ckpt_001", "ckpt_002"]
    assert "refused before: " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "k2train_export.json").read_text())["step"] == 5


def test_a_newer_save_is_said(
    trained: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches an export of the start of a run that was stopped inside its first chunk."""
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(trained / "checkpoints" / "ckpt_000", folder / "ckpt_000")
    shutil.copytree(trained / "checkpoints" / "ckpt_000", folder / "ckpt_000_step_000003")
    given = ["export", str(folder.parent), str(tmp_path / "out"), "--tokenizer", "none"]
    assert tool.main([*given, "--no-check"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "ckpt_000_step_000003 is newer, a save inside a chunk: name it" in first


def test_mistakes_are_one_line(
    trained: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, half a folder, and a message without a way out."""
    out = tmp_path / "out"

    def export(*rest: object) -> str:
        return line_of(capsys, 2, "export", *rest)

    assert "neither a checkpoint nor a run directory" in export(tmp_path, out)
    assert "is not in" in export(trained, out) and not out.exists()
    (tmp_path / "x.model").write_text("no model")
    assert "x.model: not a sentencepiece model" in export(
        trained, out, "--tokenizer", tmp_path / "x.model"
    )
    assert "cannot be read" in export(trained, out, "--chat-template", tmp_path / "none.jinja")
    (tmp_path / "there").mkdir()
    assert "exists; name a new folder" in export(trained, tmp_path / "there")
    where = tmp_path / "nothing"
    assert "is no Hugging Face folder" in line_of(
        capsys, 2, "import", where, "--to", tmp_path / "run"
    )
    assert not out.exists() and not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_the_runs(
    trained: Path,  # noqa: F811
    tokenizer: Tokenizer,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a folder whose tokenizer gives other ids than the run was trained on."""
    tokenizer.save(tmp_path / "t.model")
    line = line_of(
        capsys, 2, "export", trained, tmp_path / "out", "--tokenizer", tmp_path / "t.model"
    )
    assert "t.model: is not the tokenizer of" in line and "the checkpoint's abababababab" in line


def test_a_tokenizer_with_more_ids_than_the_model(
    trained: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches ids without a row, where imported data names its tokenizer in words and no hash says
    that it is another one.
    """
    lines = ["the " + "".join(chr(97 + n * k % 26) for k in range(9)) for n in range(400)]
    train_tokenizer(lines, 350).save(tmp_path / "t.model")
    run = tmp_path / "run"
    shutil.copytree(trained / "checkpoints" / "ckpt_000", run / "checkpoints" / "ckpt_000")
    file = run / "checkpoints" / "ckpt_000" / "manifest.json"
    content = json.loads(file.read_text())
    content["data"]["tokenizer_sha256"] = "as theirs"
    file.write_text(manifest_text(seal(content)))
    line = line_of(capsys, 2, "export", run, tmp_path / "out", "--tokenizer", tmp_path / "t.model")
    assert "has 368 ids, its model 361; they do not belong together" in line


def test_k2_65b_is_planned_without_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a plan that leaves out tensors, or takes the memory of the model."""
    # The rate is measured with a small tensor here.
    monkeypatch.setattr("k2train.hf.estimate.MEASURED_BYTES", 2**20)
    config = ROOT / "configs" / "k2_65b" / "stage1.yaml"
    assert tool.main(["export", str(config), str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    # 65,286,184,960 parameters of two bytes.
    assert "723 tensors in 27 files, 130,572,369,920 bytes" in said
    assert "model-00027-of-00027.safetensors" in said and list(tmp_path.iterdir()) == []
