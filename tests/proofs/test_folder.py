"""Files that proofs cover."""

import os
from pathlib import Path

import pytest

from k2train.errors import RunError
from k2train.files import sha256_file
from k2train.proofs.folder import CoveredFile, checkpoint_files, covered_files


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_every_file_but_proofs_and_git_is_covered(tmp_path: Path) -> None:
    """Catches a hidden or nested file that nothing covers, and proofs that cover themselves."""
    write(tmp_path, "a", ".hidden", "b/proofs/c", "b/.git", "proofs/d", ".git/e", ".gitattributes")
    files = covered_files(tmp_path)
    assert [file.name for file in files] == [".hidden", "a", "b/.git", "b/proofs/c"]
    assert all(file.sha256 == sha256_file(tmp_path / file.name) for file in files)
    assert [file.bytes for file in files] == [7, 1, 6, 10]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.safetensors", "config.json", "x/notes"], ["config.json", "model.safetensors"]),
        (
            ["c/ckpt_001/model/s.safetensors", "c/ckpt_001/manifest.json", "ledger.jsonl"],
            ["c/ckpt_001/manifest.json", "c/ckpt_001/model/s.safetensors"],
        ),
        (["ckpt_001/model.safetensors", "ckpt_0012/x"], ["ckpt_001/model.safetensors"]),
    ],
)
def test_checkpoints_are_where_weights_are(names: list[str], found: list[str]) -> None:
    """Catches a ledger that passes for a checkpoint, and a manifest that does not.

    Everything in and below a folder with weights belongs to it, so an export is one as a whole.
    """
    listed = [CoveredFile(name, 1, "0" * 64) for name in sorted(names)]
    expected = found if "x/notes" not in names else [*found, "x/notes"]
    assert [file.name for file in checkpoint_files(listed)] == expected


def test_what_cannot_be_covered_is_refused(tmp_path: Path) -> None:
    """Catches a link whose target changes unseen, a published key, and a folder without weights."""
    with pytest.raises(RunError, match="is not a folder"):
        covered_files(tmp_path / "none")
    with pytest.raises(RunError, match="no weights"):
        checkpoint_files([CoveredFile("ledger.jsonl", 1, "0" * 64)])
    (tmp_path / "a").write_text("-----BEGIN EC PRIVATE KEY-----\n")
    with pytest.raises(RunError, match="holds a private key"):
        covered_files(tmp_path)
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunError, match="no plain file"):
        covered_files(tmp_path)
    (tmp_path / "pipe").unlink()
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(RunError, match="symbolic link"):
        covered_files(tmp_path)
