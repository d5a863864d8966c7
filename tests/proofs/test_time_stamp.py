"""Time stamps: openssl is the authority, and openssl checks what is kept."""

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from k2train.errors import UserError
from k2train.proofs.check import check_proofs
from k2train.proofs.sums import SUMS
from k2train.proofs.time_stamp import add_token, checked_time, stamp_problems, write_request
from k2train.proofs.write import write_proofs
from tests.proofs.conftest import Made

CONFIG = """
[ req ]
distinguished_name = name
[ name ]
[ tsa ]
default_tsa = stamps
[ stamps ]
serial = serial
signer_cert = tsa.pem
signer_key = tsa.key
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
ess_cert_id_alg = sha256
[ root ]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign
[ leaf ]
basicConstraints = CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = critical,timeStamping
"""
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority(NamedTuple):
    """A time stamp authority of this machine, in a folder, and its root certificate."""

    folder: Path
    root: Path

    def openssl(self, *arguments: object) -> str:
        done = subprocess.run(
            ["openssl", *map(str, arguments)], cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def answer(self, request: Path, target: Path) -> Path:
        self.openssl("ts", "-reply", "-config", "c", "-queryfile", request, "-out", target)
        return target


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    folder = tmp_path_factory.mktemp("authority")
    (folder / "c").write_text(CONFIG)
    (folder / "serial").write_text("01\n")
    made = Authority(folder, folder / "root.pem")
    made.openssl("req", "-x509", *NEW_KEY, "-keyout", "root.key", "-out", "root.pem",
                 "-subj", "/CN=root", "-config", "c", "-extensions", "root")  # fmt: skip
    made.openssl("req", "-new", *NEW_KEY, "-keyout", "tsa.key", "-out", "tsa.csr",
                 "-subj", "/CN=stamps", "-config", "c")  # fmt: skip
    made.openssl("x509", "-req", "-in", "tsa.csr", "-CA", "root.pem", "-CAkey", "root.key",
                 "-CAcreateserial", "-out", "tsa.pem", "-extfile", "c",
                 "-extensions", "leaf")  # fmt: skip
    return made


@pytest.fixture
def stamped(own: Path, authority: Authority, tmp_path: Path) -> Path:
    """A signed release with a time stamp."""
    write_request(own, tmp_path / "q.tsq")
    add_token(own, authority.answer(tmp_path / "q.tsq", tmp_path / "r.tsr"), authority.root)
    return own


def test_openssl_takes_what_is_kept(stamped: Path, authority: Authority) -> None:
    """Catches a request for other bytes, and a token that only we can read."""
    kept = stamped / "proofs" / "timestamps"
    said = authority.openssl(
        *("ts", "-verify", "-data", stamped / "proofs" / "model.sig"),
        *("-in", kept / "001.tsr", "-CAfile", kept / "001.pem"),
    )
    assert said == "Verification: OK\n"
    subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=kept, check=True)
    assert check_proofs(stamped) == []


def test_every_byte_counts(stamped: Path) -> None:
    """Catches bytes of a token, or of its certificates, that nothing compares."""
    kept = stamped / "proofs" / "timestamps"
    for path in sorted(kept.iterdir()):
        written = path.read_bytes()
        for place in range(0, len(written), 41):
            changed = bytearray(written)
            changed[place] ^= 1
            path.write_bytes(changed)
            assert stamp_problems(stamped), (path.name, place)
        path.write_bytes(written)
    assert stamp_problems(stamped) == []
    (kept / "002.tsr").write_bytes(b"")
    assert any("one half" in line for line in stamp_problems(stamped))


def test_a_token_is_one_of_this_signature(
    stamped: Path, authority: Authority, tmp_path: Path
) -> None:
    """Catches a token that is moved to another signature, or comes from another authority."""
    kept = stamped / "proofs" / "timestamps"
    token, root = (kept / "001.tsr").read_bytes(), (kept / "001.pem").read_bytes()
    signature = (stamped / "proofs" / "model.sig").read_bytes()
    assert checked_time(token, root, signature).year >= 2024
    with pytest.raises(ValueError, match="does not hold"):
        checked_time(token, root, signature + b" ")
    other = authority.openssl("req", "-x509", *NEW_KEY, "-keyout", tmp_path / "k",
                              "-subj", "/CN=root", "-config", "c",
                              "-extensions", "root")  # fmt: skip
    with pytest.raises(ValueError, match="does not hold"):
        checked_time(token, other.encode(), signature)
    leaf = (authority.folder / "tsa.pem").read_bytes()
    for certificates in (b"", leaf):
        with pytest.raises(ValueError, match=r"certificates that are none|without a root"):
            checked_time(token, certificates, signature)


def test_mistakes_are_one_line(
    stamped: Path, made: Made, authority: Authority, tmp_path: Path
) -> None:
    """Catches a token of nothing, a request that would break the signature, and a lost token."""
    root = authority.root
    with pytest.raises(UserError, match="is no RFC 3161"):
        add_token(stamped, root, root)
    with pytest.raises(UserError, match="cannot be read"):
        add_token(stamped, tmp_path / "none", root)
    with pytest.raises(UserError, match="is inside"):
        write_request(stamped, stamped / "q.tsq")
    with pytest.raises(UserError, match="is missing"):
        write_request(made.release, tmp_path / "q")
    with pytest.raises(UserError, match="has time stamps"):
        write_proofs(stamped, [made.run], made.key)
    assert check_proofs(stamped) == []


def test_a_second_token_is_kept_beside_the_first(
    stamped: Path, authority: Authority, tmp_path: Path
) -> None:
    """Catches a token that replaces another, and one that a kill left unfinished and that stays."""
    kept = stamped / "proofs" / "timestamps"
    first = (kept / "001.tsr").read_bytes()
    shutil.copy(kept / "001.pem", kept / "002.pem")
    assert stamp_problems(stamped)
    write_request(stamped, tmp_path / "q")
    add_token(stamped, authority.answer(tmp_path / "q", tmp_path / "r"), authority.root)
    assert (kept / "001.tsr").read_bytes() == first and (kept / "002.tsr").exists()
    assert stamp_problems(stamped) == []
