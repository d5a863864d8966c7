"""RFC 3161 time stamps of a model signature: the request, tokens of an authority, their check.

- A token states that the signature existed at a time, and the signature covers all files.
- The request is a file for an authority, and so is its answer: nothing here uses a network.
- A token lies beside the certificates that it was checked with. A reader who does not trust them
  checks it with their own: `openssl ts -verify -data model.sig -in 001.tsr -CAfile ROOT`.

Alternatives considered:
- A request from here: the choice of an authority, and its terms, are the publisher's.
"""

from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from k2train.errors import UserError
from k2train.files import AtomicFile, write_synced
from k2train.proofs.folder import PROOFS, TIMESTAMPS
from k2train.proofs.optional import package
from k2train.proofs.signature import SIGNATURE
from k2train.proofs.sums import SUMS, read_sums, sum_problems, sums_text
from k2train.retry import exists_retried, is_folder_retried, list_retried
from k2train.safe_json import read_plain_file

MAX_BYTES = 2**20
TOKEN, ROOTS = ".tsr", ".pem"


def _signature(folder: Path) -> bytes:
    path = folder / PROOFS / SIGNATURE
    if not exists_retried(path):
        raise UserError(f"{path} is missing: a time stamp is one of a signature; sign with --key")
    return read_plain_file(path)


def write_request(folder: Path, target: Path) -> None:
    """Write the request for a time stamp of a folder's signature (SHA-512, with a nonce).

    Raises UserError without a signature, and for a target in the folder; OSError.
    """
    if target.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--request: {target} is inside {folder}, which is signed; name another")
    with package("rfc3161-client"):
        from rfc3161_client import TimestampRequestBuilder
    builder = TimestampRequestBuilder().data(_signature(folder))
    request = builder.cert_request(cert_request=True).nonce(nonce=True).build()
    with AtomicFile(target) as stream:
        stream.write(request.as_bytes())


def add_token(folder: Path, token: Path, roots: Path) -> datetime:
    """Check a token against certificates, then put both beside the signature; returns its time.

    Raises UserError for one that does not hold, and OSError.
    """
    try:
        answer, certificates = (read_plain_file(path, MAX_BYTES) for path in (token, roots))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--timestamp: {token} or {roots} cannot be read ({why})") from None
    try:
        time = checked_time(answer, certificates, _signature(folder))
    except ValueError as error:
        raise UserError(f"--timestamp: {token} {error}") from None

    place = folder / PROOFS / TIMESTAMPS
    place.mkdir(exist_ok=True)
    # What no sum names was left by a start that was killed, and is replaced.
    try:
        sums = read_sums(place)
    except ValueError:
        raise UserError(f"{place / SUMS} is damaged; restore it, or remove {place}") from None
    name = f"{len(sums) // 2 + 1:03d}"
    for suffix, content in ((ROOTS, certificates), (TOKEN, answer)):
        with AtomicFile(place / f"{name}{suffix}") as stream:
            stream.write(content)
        sums[f"{name}{suffix}"] = sha256(content).hexdigest()
    write_synced(place / SUMS, sums_text(sums))
    return time


def checked_time(token: bytes, certificates: bytes, message: bytes) -> datetime:
    """Return the time that a token states for a message, checked up to one of the certificates.

    `certificates` is PEM: roots, which sign themselves, and others between. Raises ValueError.
    """
    with package("rfc3161-client"):
        from rfc3161_client import VerifierBuilder, decode_timestamp_response
    try:
        answer = decode_timestamp_response(token)
    except Exception:
        raise ValueError("is no RFC 3161 time stamp response") from None
    builder = VerifierBuilder()
    for certificate, is_root in _read_certificates(certificates):
        add = builder.add_root_certificate if is_root else builder.add_intermediate_certificate
        builder = add(certificate)
    try:
        builder.build().verify_message(answer, message)
        time: datetime = answer.tst_info.gen_time
    except Exception as error:
        raise ValueError(f"does not hold: {' '.join(str(error).split())[:300]}") from None
    return time.astimezone(UTC)


def _read_certificates(content: bytes) -> list[tuple[Any, bool]]:
    """Return (certificate, whether it is a root); a root's own signature must hold."""
    with package("cryptography"):
        from cryptography import x509
    try:
        found = []
        for certificate in x509.load_pem_x509_certificates(content):
            is_root = certificate.subject == certificate.issuer
            if is_root:
                certificate.verify_directly_issued_by(certificate)
            found.append((certificate, is_root))
    except Exception:
        raise ValueError("comes with certificates that are none, or were changed") from None
    if not any(is_root for _, is_root in found):
        raise ValueError("comes without a root certificate")
    return found


def stamp_problems(folder: Path) -> list[str]:
    """Check every time stamp of a folder; one line per problem.

    Raises UserError for a missing package; OSError, UnavailableError.
    """
    place = folder / PROOFS / TIMESTAMPS
    if not is_folder_retried(place):
        return []
    where = f"{PROOFS}/{TIMESTAMPS}"
    problems = sum_problems(place, where)
    names = {path.name for path in list_retried(place)} - {SUMS}
    for name in sorted(names):
        token = Path(name).with_suffix(TOKEN).name
        if not names >= {token, Path(name).with_suffix(ROOTS).name}:
            problems.append(f"{where}/{name}: is no time stamp, or one half of one")
        elif name == token:
            problems += [f"{where}/{name}: {line}" for line in _problems(folder, place / name)]
    return problems


def _problems(folder: Path, token: Path) -> list[str]:
    try:
        answer, certificates = (
            read_plain_file(token.with_suffix(suffix), MAX_BYTES) for suffix in (TOKEN, ROOTS)
        )
        checked_time(answer, certificates, _signature(folder))
    except ValueError as error:
        return [str(error)]
    return []
