"""Checking proofs: every changed byte, every added and missing file is named."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from k2train.errors import UserError
from k2train.proofs.check import check_proofs, key_of
from k2train.proofs.keys import key_id, new_key, public_pem, read_private_key, read_public_key
from k2train.proofs.sums import SUMS, read_sums, sums_text
from k2train.proofs.write import write_proofs
from tests.proofs.conftest import Made


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, place: int) -> bytes:
    """Change one bit of a file; its content of before."""
    written = path.read_bytes()
    changed = bytearray(written)
    changed[place] ^= 1
    path.write_bytes(changed)
    return written


def test_a_changed_byte_in_any_file_is_found(own: Path) -> None:
    """Catches a file that nothing covers: data, weights, record, proofs and keys."""
    assert check_proofs(own) == []
    for path in files_of(own):
        for place in (0, -1):
            written = flip(path, place)
            problems = check_proofs(own)
            name = path.relative_to(own).as_posix()
            # A list of sums that was changed names another file.
            named = any(name in line for line in problems) or path.name == SUMS
            assert problems and named, (name, place)
            path.write_bytes(written)
    assert check_proofs(own) == []


def test_the_same_without_a_signature(made: Made, tmp_path: Path) -> None:
    """Catches documents that only a signature protects: accidents must be found without one."""
    release = Path(shutil.copytree(made.release, tmp_path / "release"))
    write_proofs(release, [made.run])
    for path in files_of(release):
        written = flip(path, len(path.read_bytes()) // 2)
        assert check_proofs(release), path.name
        path.write_bytes(written)
    assert check_proofs(release) == []
    (release / "new").write_text("new")
    assert check_proofs(release) == ["new: was added, proofs/provenance.json does not name it"]
    (release / "new").unlink()
    (release / "proofs" / "model.sig").write_text("{}")
    assert check_proofs(release) == ["proofs/model.sig: was added"]
    (release / "proofs" / "model.sig").unlink()

    # The key of somebody who signed nothing of it.
    public = public_pem(read_private_key(made.key).public_key())
    (release / "proofs" / "public_key.pem").write_bytes(public)
    sums = read_sums(release / "proofs") | {"public_key.pem": hashlib.sha256(public).hexdigest()}
    (release / "proofs" / SUMS).write_text(sums_text(sums))
    (line,) = check_proofs(release)
    assert line == "proofs/public_key.pem: is beside provenance.json, which is not signed"
    assert key_of(release) is None


def test_a_link_in_the_proofs_is_no_proof(own: Path, tmp_path: Path) -> None:
    """Catches documents that are somebody else's tomorrow."""
    place = own / "proofs"
    shutil.move(place / "bom.cdx.json", tmp_path / "bom")
    (place / "bom.cdx.json").symlink_to(tmp_path / "bom")
    assert any("proofs/bom.cdx.json: is a link" in line for line in check_proofs(own))
    shutil.move(place, tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="proofs is a link, which leads to other proofs"):
        check_proofs(own)


def test_files_that_come_and_go_are_named(own: Path) -> None:
    """Catches a check of what is there, instead of what was published."""
    for name in ("new", "ckpt_001/new", "proofs/new"):
        (own / name).write_text("new")
        assert any(name in line and "added" in line for line in check_proofs(own)), name
        (own / name).unlink()
    for path in files_of(own):
        content = path.read_bytes()
        path.unlink()
        assert any(path.name in line for line in check_proofs(own)), path.name
        path.write_bytes(content)


@pytest.mark.parametrize("document", ["bom.cdx.json", "training_content.md", "croissant.json"])
def test_an_altered_document_with_its_sum_is_found(own: Path, document: str) -> None:
    """Catches a list of sums that is believed: the signature, and the others, disagree."""
    place = own / "proofs"
    flip(place / document, len((place / document).read_bytes()) // 2)
    sums = read_sums(place)
    sums[document] = hashlib.sha256((place / document).read_bytes()).hexdigest()
    (place / SUMS).write_text(sums_text(sums))
    (line, *_) = check_proofs(own)
    assert line == f"proofs/model.sig: signed with other content: proofs/{SUMS}, proofs/{document}"


def test_another_key_signs_something_else(own: Path, made: Made, tmp_path: Path) -> None:
    """Catches a forger who signs an altered release anew: the publisher's key tells."""
    publisher = tmp_path / "publisher.pem"
    shutil.copy(own / "proofs" / "public_key.pem", publisher)
    expected = key_id(read_public_key(publisher))
    assert check_proofs(own, expected) == []
    new_key(tmp_path / "forger")
    (own / "ledger.jsonl").write_text("forged\n")
    write_proofs(own, [made.run], tmp_path / "forger")
    assert check_proofs(own) == []
    assert key_of(own) == key_id(read_private_key(tmp_path / "forger").public_key())
    (line,) = check_proofs(own, expected)
    assert "not by the given one" in line
    write_proofs(own, [made.run])
    (line,) = check_proofs(own, expected)
    assert "nothing is signed" in line


def test_documents_must_agree_with_the_files(made: Made, tmp_path: Path) -> None:
    """Catches a bill and a description that nobody compares with the files."""
    release = Path(shutil.copytree(made.release, tmp_path / "release"))
    write_proofs(release, [made.run])
    place = release / "proofs"
    for document, keys in (
        ("bom.cdx.json", ("components", -1, "hashes", 0)),
        ("croissant.json", ("distribution", 0)),
        ("provenance.json", ("subject", 0, "digest")),
    ):
        written = (place / document).read_bytes()
        content = json.loads(written)
        part = content
        for key in keys:
            part = part[key]
        part["content" if document.startswith("bom") else "sha256"] = "0" * 64
        (place / document).write_text(json.dumps(content))
        problems = check_proofs(release)
        assert any(f"proofs/{document} says 0000000000000000" in line for line in problems)
        (place / document).write_bytes(written)


def test_a_folder_without_proofs_is_a_mistake(made: Made, own: Path) -> None:
    """Catches "ok" where nothing was checked, and a traceback for a lost key."""
    with pytest.raises(UserError, match="has no proofs"):
        check_proofs(made.release)
    (own / "proofs" / "public_key.pem").write_bytes(b"no key")
    assert any("no key" in line for line in check_proofs(own))
    public = public_pem(read_private_key(made.key).public_key())
    (own / "proofs" / "public_key.pem").write_bytes(public)
    assert check_proofs(own) == []
