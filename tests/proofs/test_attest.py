"""`tools/attest.py`: from a new key to a check, and mistakes on one line."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.proofs.conftest import Made
from tests.support.command_line import load_tool

tool = load_tool("attest")


@pytest.fixture
def release(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.release, tmp_path / "release"))


def test_from_a_new_key_to_a_check(
    release: Path,
    made: Made,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a command that does not do what its page says, and a problem with exit code 0."""
    key = tmp_path / "key.pem"
    assert tool.main(["--new-key", str(key)]) == 0
    assert tool.main([str(release), "--run", str(made.run), "--key", str(key)]) == 0
    said = capsys.readouterr().out
    assert "signed by key" in said and "training content: 1.1 Provider name" in said
    public = str(release / "proofs" / "public_key.pem")
    checked = [str(release), "--check", "--public-key", public, "--formats"]
    assert tool.main(checked) == 0
    assert ": ok, signed by key" in capsys.readouterr().out

    (release / "ledger.jsonl").write_text("altered\n")
    assert tool.main([str(release), "--check"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "ledger.jsonl: sha256 is" in captured.err

    assert tool.main([str(release), "--request", str(tmp_path / "q.tsq")]) == 0
    assert (tmp_path / "q.tsq").stat().st_size > 50


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give DIR"),
        (["DIR"], "give one of"),
        (["DIR", "--check", "--key", "k"], "--key needs --run"),
        (["DIR", "--run", "r", "--public-key", "k"], "--public-key needs --check"),
        (["DIR", "--timestamp", "t"], "--timestamp needs --tsa-root"),
        (["DIR", "--run", "r", "--formats"], "--formats needs --check"),
        (["DIR", "--check"], "has no proofs"),
        (["DIR", "--run", "DIR"], "ledger.jsonl"),
        (["DIR", "--timestamp", "t", "--tsa-root", "r"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, usage instead of a sentence, and exit code 1 for a mistake."""
    try:
        code = tool.main([str(tmp_path) if one == "DIR" else one for one in arguments])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert words in captured.err and captured.err.count("\n") == 1


def test_a_missing_package_is_one_line(
    release: Path,
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback where the extra is not installed, and unsigned proofs in its place."""
    for name in ("model_signing", "OpenSSL"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = [str(release), "--run", str(made.run)]
    assert tool.main([*arguments, "--key", str(made.key)]) == 2
    error = capsys.readouterr().err
    assert "pip install 'k2train[release]'" in error and error.count("\n") == 1
    assert not (release / "proofs").exists()
    assert tool.main(arguments) == 0, "unsigned proofs need no package"
