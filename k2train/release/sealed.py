"""The sealed part of a run's record: ledger and manifests, copied, or redacted and sealed anew.

- Without anything private the copies are the files, byte for byte.
- Otherwise ledger, manifests and config are written again with the values replaced. Whatever names
  the hash of one of them gets the new hash, in the order in which the run wrote them, so the
  chain, the heads and the manifests' own hashes fit again and every tool reads the record.
- The hash of each original is kept in the index. What cannot be checked any more is said there.

Alternatives considered:
- A ledger with blackened lines: its chain breaks at each, and no tool reads it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from k2train.checkpoint.manifest import manifest_text, seal
from k2train.errors import CheckpointError, RunError
from k2train.record.jsonl import encode_line, parse_line, read_lines
from k2train.record.ledger import read_ledger
from k2train.record.ledger_head import LedgerHead
from k2train.record.line_check import CHECK_KEY, with_check
from k2train.release.places import CONFIG, LEDGER
from k2train.release.private import Private
from k2train.retry import is_file_retried
from k2train.safe_json import parse_json, read_plain_file


@dataclass
class SealedRecord:
    """Contents of the sealed files of a run, by their names in its directory."""

    files: dict[str, bytes] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)
    """Names of the files that were redacted -> SHA-256 of the original."""
    head: LedgerHead = field(default_factory=lambda: LedgerHead(0, ""))


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return sha256(content).hexdigest()


def seal_record(
    run: Path, manifests: Iterable[Path], private: Private, hashes: dict[str, str]
) -> SealedRecord:
    """Read and, where needed, redact the sealed files of a run; `manifests` lie below it.

    `hashes` has the new hash of each file that was redacted before, by its old one, and gets those
    of this run. Raises RunError, CheckpointError.
    """
    # Refuses a broken chain.
    read_ledger(run / LEDGER)
    lines, _ = read_lines(run / LEDGER)
    sealed = SealedRecord()
    if is_file_retried(run / CONFIG):
        _add_plain(sealed, run, CONFIG, private, hashes)

    waiting = sorted(((_events(path), path) for path in manifests), reverse=True)
    written: list[bytes] = []
    heads: list[str] = []
    for number, line in enumerate(lines):
        # A manifest names the ledger as it was at the save; a later line names the manifest.
        while waiting and waiting[-1][0] <= number:
            _add_manifest(sealed, run, waiting.pop()[1], private, hashes, heads)
        row = parse_line(run / LEDGER, number + 1, line)
        changed = _mapped(private.value(row), hashes)
        changed["previous"] = heads[-1] if heads else ""
        if changed == row:
            written.append(line + b"\n")
        else:
            checked = changed.pop(CHECK_KEY, None) is not None
            encoded = encode_line(changed)
            written.append(with_check(encoded) if checked else encoded)
        heads.append(digest(written[-1][:-1]))
    for _, path in reversed(waiting):
        _add_manifest(sealed, run, path, private, hashes, heads)

    _add(sealed, LEDGER, b"".join(line + b"\n" for line in lines), b"".join(written), hashes)
    sealed.head = LedgerHead(len(heads), heads[-1] if heads else "")
    return sealed


def _add(
    sealed: SealedRecord, name: str, before: bytes, after: bytes, hashes: dict[str, str]
) -> None:
    sealed.files[name] = after
    if after != before:
        sealed.originals[name] = hashes_from = digest(before)
        hashes[hashes_from] = digest(after)


def _add_plain(
    sealed: SealedRecord, run: Path, name: str, private: Private, hashes: dict[str, str]
) -> None:
    try:
        before = read_plain_file(run / name)
        text = before.decode()
    except (OSError, ValueError) as error:
        raise RunError(f"{run / name} cannot be read ({error})") from None
    _add(sealed, name, before, private.lines(text).encode(), hashes)


def _read_manifest(path: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        content = read_plain_file(path)
        found = parse_json(content)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content, found


def _events(path: Path) -> int:
    """Number of events that the ledger had when a manifest was written; 0 if it does not say."""
    head = _read_manifest(path)[1].get("ledger")
    events = head.get("events") if isinstance(head, dict) else None
    return events if type(events) is int else 0


def _add_manifest(
    sealed: SealedRecord,
    run: Path,
    path: Path,
    private: Private,
    hashes: dict[str, str],
    heads: list[str],
) -> None:
    before, content = _read_manifest(path)
    changed = _mapped(private.value(content), hashes)
    head = changed.get("ledger")
    if isinstance(head, dict) and 0 < head.get("events", 0) <= len(heads):
        changed["ledger"] = {**head, "sha256": heads[head["events"] - 1]}
    after = before
    if changed != content:
        del changed["self_sha256"]
        after = manifest_text(seal(changed)).encode()
    _add(sealed, path.relative_to(run).as_posix(), before, after, hashes)


def _mapped(value: Any, hashes: Mapping[str, str]) -> Any:
    """Return a JSON value with the old hashes in it replaced by the new ones."""
    if isinstance(value, str):
        return hashes.get(value, value)
    if isinstance(value, dict):
        return {key: _mapped(item, hashes) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, hashes) for item in value]
    return value
