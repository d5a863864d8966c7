"""OpenSSF model signature of a folder: made and verified with `model-signing`, with an own key.

- The signature covers every file of the folder, proofs included, but itself and time stamps. Its
  list of what it leaves out is signed, so a stock verifier needs no option for it.
- The bundle must be the one form of its content. A changed byte that a lenient reader of JSON or
  base64 passes over is found, too.
- Offline: the key is a file, and nothing is written to a transparency log.

Alternatives considered:
- Our own list of hashes: only this project could check it.
"""

import base64
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

from k2train.proofs.folder import PROOFS, TIMESTAMPS
from k2train.proofs.optional import package
from k2train.retry import is_file_retried
from k2train.safe_json import parse_json, read_plain_file

SIGNATURE = "model.sig"
BUNDLE_KEYS = {"mediaType", "verificationMaterial", "dsseEnvelope"}
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
LEFT_OUT = (f"{PROOFS}/{SIGNATURE}", f"{PROOFS}/{TIMESTAMPS}")


def require_packages() -> None:
    """Raise UserError where a signature could not be made, before anything is written."""
    # It imports OpenSSL, and does not ask for it.
    with package("model-signing"):
        import OpenSSL  # noqa: F401
        from model_signing import hashing, signing  # noqa: F401


def write_signature(folder: Path, key: Path, target: Path) -> None:
    """Sign all files of a folder with the private key in a file; writes the bundle to `target`.

    `target` must not exist, and must be no file that the signature would cover afterwards.
    Raises UserError for a missing package; OSError.
    """
    with package("model-signing"):
        from model_signing import hashing, signing
    left_out = hashing.Config().set_ignored_paths(
        paths=[Path(name) for name in LEFT_OUT], ignore_git_paths=True
    )
    config = signing.Config().use_elliptic_key_signer(private_key=key)
    config.set_hashing_config(left_out).sign(folder, target)


def signature_problem(folder: Path, public_key: Path) -> str | None:
    """Return what is wrong with the signature of a folder; None for nothing.

    Raises UserError for a missing package; OSError, UnavailableError.
    """
    with package("model-signing"):
        from model_signing import verifying
    path = folder / PROOFS / SIGNATURE
    if not is_file_retried(path):
        return "is missing"
    try:
        _check_form(read_plain_file(path))
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        # The package prints a warning about old signatures.
        with contextlib.redirect_stdout(io.StringIO()):
            verifier.verify(folder, path)
    except OSError:
        raise
    except Exception as error:
        # Its parts have an error of their own each, some without a text.
        return _short(str(error)) or "was not made with this key"
    return None


def _short(text: str) -> str:
    """Shorten a list of mismatches, whose hashes are unreadable, to the names of the files."""
    if "Signature mismatch" not in text:
        return " ".join(text.split())[:600]
    changed = re.findall(r"Hash mismatch for \\?'(.+?)\\?': Expected", text)
    parts = [f"signed with other content: {', '.join(changed)}"] if changed else []
    for kind, words in (("Extra", "added since"), ("Missing", "missing since")):
        if listed := re.search(rf"{kind} files (?:found )?in model \\?'.*?\\?': ([^'\"]*)", text):
            parts.append(f"{words}: {listed[1]}")
    return "; ".join(parts)[:600]


def _check_form(content: bytes) -> None:
    bundle: Any = parse_json(content)
    ours = isinstance(bundle, dict) and bundle.keys() == BUNDLE_KEYS
    if not ours or bundle["mediaType"] != MEDIA_TYPE:
        raise ValueError("is no bundle of a model signature")
    material, envelope = bundle["verificationMaterial"], bundle["dsseEnvelope"]
    if material.keys() - {"tlogEntries"} != {"publicKey"} or material.get("tlogEntries"):
        raise ValueError("names more than a public key")
    (entry,) = envelope["signatures"]
    for text in (envelope["payload"], entry["sig"]):
        if base64.b64encode(base64.b64decode(text, validate=True)).decode() != text:
            raise ValueError("is not in the form in which it was written")
    if json.dumps(bundle, separators=_separators(content)).encode() != content:
        raise ValueError("is not in the form in which it was written")


def _separators(content: bytes) -> tuple[str, str]:
    return (", ", ": ") if b'": ' in content else (",", ":")
