"""Keys: openssl reads ours, we read openssl's, and what is no key is one line."""

import subprocess
from pathlib import Path

import pytest

from k2train.errors import UserError
from k2train.proofs.keys import (
    is_signed,
    key_id,
    new_key,
    public_pem,
    read_private_key,
    read_public_key,
    refuse_inside,
    sign,
)


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def curve_key(path: Path, curve: str) -> Path:
    openssl("ecparam", "-name", curve, "-genkey", "-noout", "-out", path)
    return path


@pytest.mark.parametrize(
    ("curve", "digest"),
    [("prime256v1", "sha256"), ("secp384r1", "sha384"), ("secp521r1", "sha512")],
)
def test_openssl_takes_the_signature(tmp_path: Path, curve: str, digest: str) -> None:
    """Catches a hash that is not that of the curve, and a signature in a form of its own."""
    key = read_private_key(curve_key(tmp_path / "k", curve))
    (tmp_path / "p").write_bytes(public_pem(key.public_key()))
    (tmp_path / "m").write_bytes(b"message")
    (tmp_path / "s").write_bytes(sign(key, b"message"))
    openssl("dgst", f"-{digest}", "-verify", tmp_path / "p", "-signature", tmp_path / "s",
            tmp_path / "m")  # fmt: skip
    assert is_signed(key.public_key(), (tmp_path / "s").read_bytes(), b"message")
    assert not is_signed(key.public_key(), (tmp_path / "s").read_bytes(), b"massage")


def test_a_new_key_is_its_owners_alone(tmp_path: Path) -> None:
    """Catches a key that others may read, and one that replaces another."""
    path = tmp_path / "key.pem"
    name = new_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert key_id(read_private_key(path).public_key()) == name
    openssl("ec", "-in", path, "-check", "-noout")
    with pytest.raises(UserError, match="exists"):
        new_key(path)


def test_what_is_no_key_is_one_line(tmp_path: Path) -> None:
    """Catches a traceback, and a message that quotes the file."""
    path = tmp_path / "key"
    with pytest.raises(UserError, match="cannot be read"):
        read_private_key(path)
    path.write_text("secret words")
    with pytest.raises(UserError, match="is no key in PEM") as caught:
        read_private_key(path)
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="is no key in PEM"):
        read_public_key(path)
    with pytest.raises(UserError, match="secp256k1"):
        read_private_key(curve_key(path, "secp256k1"))
    openssl("ec", "-in", path, "-aes128", "-passout", "pass:x", "-out", tmp_path / "locked")
    with pytest.raises(UserError, match="is encrypted"):
        read_private_key(tmp_path / "locked")


def test_a_key_inside_is_refused(tmp_path: Path) -> None:
    """Catches a private key that is published, by whatever name it is reached."""
    (tmp_path / "release").mkdir()
    new_key(tmp_path / "release" / "key")
    (tmp_path / "link").symlink_to(tmp_path / "release" / "key")
    for path in (tmp_path / "release" / "key", tmp_path / "link"):
        with pytest.raises(UserError, match="is inside"):
            refuse_inside(path, tmp_path / "release")
