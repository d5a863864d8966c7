"""Model signatures: the program of `model-signing` takes them, and no changed byte passes."""

import base64
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from model_signing._cli import main as model_signing

from k2train.proofs.keys import new_key, public_pem, read_private_key
from k2train.proofs.signature import signature_problem, write_signature


def stock_verify(folder: Path) -> int:
    """Exit code of `model_signing verify key`, with no option but the three that it needs."""
    proofs = folder / "proofs"
    arguments = ["verify", "key", folder, "--signature", proofs / "model.sig"]
    arguments += ["--public_key", proofs / "public_key.pem"]
    return CliRunner().invoke(model_signing, [str(one) for one in arguments]).exit_code


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A signed folder of two files."""
    folder = tmp_path / "small"
    (folder / "proofs").mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(b"weights")
    new_key(tmp_path / "key")
    public = public_pem(read_private_key(tmp_path / "key").public_key())
    (folder / "proofs" / "public_key.pem").write_bytes(public)
    write_signature(folder, tmp_path / "key", folder / "proofs" / "model.sig")
    return folder


def test_model_signing_takes_it(own: Path) -> None:
    """Catches options that a stranger would have to guess, time stamps included."""
    assert stock_verify(own) == 0
    (own / "proofs" / "timestamps").mkdir()
    (own / "proofs" / "timestamps" / "001.tsr").write_bytes(b"made after the signature")
    assert stock_verify(own) == 0
    bundle = json.loads((own / "proofs" / "model.sig").read_text())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).decode()
    assert str(own.parent) not in payload, "the place of the folder was published"


@pytest.mark.parametrize("name", ["ckpt_001/manifest.json", "proofs/bom.cdx.json"])
def test_model_signing_finds_a_changed_byte(own: Path, name: str) -> None:
    """Catches a file that the signature leaves out."""
    content = bytearray((own / name).read_bytes())
    content[len(content) // 2] ^= 1
    (own / name).write_bytes(content)
    assert stock_verify(own) != 0
    problem = signature_problem(own, own / "proofs" / "public_key.pem")
    assert problem == f"signed with other content: {name}"


def test_files_that_come_and_go_are_named(small: Path) -> None:
    """Catches a signature of the files that are there, instead of those that were."""
    key = small / "proofs" / "public_key.pem"
    assert signature_problem(small, key) is None
    (small / "b").write_text("added")
    assert signature_problem(small, key) == "added since: b"
    (small / "b").unlink()
    (small / "a.safetensors").unlink()
    assert signature_problem(small, key) == "missing since: a.safetensors"


def test_every_byte_of_the_signature_counts(small: Path) -> None:
    """Catches bytes that a lenient reader of JSON and base64 passes over."""
    key, path = small / "proofs" / "public_key.pem", small / "proofs" / "model.sig"
    written = path.read_bytes()
    passed = []
    for place in range(len(written)):
        changed = bytearray(written)
        changed[place] ^= 1
        path.write_bytes(changed)
        if signature_problem(small, key) is None:
            passed.append(place)
    assert passed == []
    path.write_bytes(written + b" ")
    assert signature_problem(small, key) == "is not in the form in which it was written"
    path.unlink()
    assert signature_problem(small, key) == "is missing"


def test_another_key_is_refused(small: Path, tmp_path: Path) -> None:
    """Catches a signature that any key proves."""
    new_key(tmp_path / "other")
    other = tmp_path / "other.pem"
    other.write_bytes(public_pem(read_private_key(tmp_path / "other").public_key()))
    problem = signature_problem(small, other)
    assert problem is not None and "Key mismatch" in problem
