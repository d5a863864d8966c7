"""The record of a run in a release: a directory of a run that every tool of this project reads.

- Ledger, manifests and config are copied as they are, or redacted and sealed anew (`sealed`).
- Checkpoints are copied with the states that the run kept, so that the two steps after them can be
  repeated; each copy is verified.
- Leases, heartbeats and locks name machines, and are left out.

Alternatives considered:
- Links to the run's files: a release must outlive the run's directory.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from k2train.checkpoint.manifest import (
    FACTS,
    MANIFEST,
    THINNED,
    is_thinned,
    list_checkpoints,
    mark_thinned,
    read_manifest,
)
from k2train.checkpoint.verify import folders_of, verify_checkpoint
from k2train.errors import RunError
from k2train.record.events import of_kind
from k2train.record.ledger_head import write_head
from k2train.record.rollback_events import SpikeCheckpoint
from k2train.release.choice import CHECKPOINTS
from k2train.release.places import (
    CONFIG,
    CONTAMINATION,
    EVALUATION,
    GALLERY,
    LEDGER,
    MANIFESTS,
    METRICS,
    ROOTS,
    ROW_LOSSES,
    SCORES,
    SPIKES,
    copy_file,
    files_below,
    write_bytes,
)
from k2train.release.private import Private
from k2train.release.sealed import SealedRecord, digest, seal_record
from k2train.release.stage import Stage
from k2train.retry import is_file_retried, is_folder_retried
from k2train.safe_json import parse_json, read_plain_file

ENERGY = "energy"
PLAIN = (METRICS, SCORES, ROOTS)
REDACTED = {".json", ".yaml"}
"""Kinds of files beside the sealed ones that are redacted; others hold text of documents."""


def copy_run(stage: Stage, place: Path, private: Private, hashes: dict[str, str]) -> SealedRecord:
    """Write the record of a stage to `place`; what is there and whole is kept.

    `hashes` as in `seal_record`. Raises OSError, RunError, CheckpointError.
    """
    beside = _spike_checkpoints(stage)
    manifests = [path / MANIFEST for path in (*_all_checkpoints(stage), *beside)]
    sealed = seal_record(stage.run, manifests, private, hashes)
    if sealed.head.events != len(stage.entries):
        raise RunError(
            f"{stage.run} went on while it was read: its ledger has {sealed.head.events} events, "
            f"had {len(stage.entries)}; start the same command again, best after the run has ended"
        )
    for name in (LEDGER, CONFIG):
        if name in sealed.files:
            write_bytes(place / name, sealed.files[name])
    write_head(place / LEDGER, sealed.head)
    for name in PLAIN:
        if is_file_retried(stage.run / name):
            copy_file(stage.run / name, place / name)

    whole = {*(stage.checkpoints if stage.states else ()), *beside}
    for path in (*_all_checkpoints(stage), *beside):
        name = path.relative_to(stage.run).as_posix()
        content = sealed.files[f"{name}/{MANIFEST}"]
        if path in whole:
            _copy_checkpoint(path, place / name, content)
        else:
            write_bytes(place / MANIFESTS / f"{path.name}.json", content)
    _copy_rest(stage, place, sealed, private, hashes)
    return sealed


def _all_checkpoints(stage: Stage) -> list[Path]:
    return list_checkpoints(stage.run / CHECKPOINTS)


def _spike_checkpoints(stage: Stage) -> list[Path]:
    """Checkpoints that the run kept beside its spikes: branches and twins."""
    names = dict.fromkeys(event.checkpoint for event in of_kind(stage.entries, SpikeCheckpoint))
    return [stage.run / name for name in names if is_folder_retried(stage.run / name)]


def _copy_checkpoint(source: Path, place: Path, manifest: bytes) -> None:
    if is_file_retried(place / MANIFEST) and read_plain_file(place / MANIFEST) == manifest:
        # The manifest is written last: the copy was finished before.
        return
    folders = (*folders_of(source), FACTS)
    for folder in folders:
        for path in files_below(source / folder) if is_folder_retried(source / folder) else ():
            copy_file(path, place / path.relative_to(source))
    write_bytes(place / MANIFEST, manifest)
    if is_thinned(source):
        if read_plain_file(source / MANIFEST) == manifest:
            copy_file(source / THINNED, place / THINNED)
        else:
            mark_thinned(place, read_manifest(place, fresh=True))
    verify_checkpoint(place)


def _rest_of(stage: Stage) -> Iterator[tuple[Path, bool]]:
    """Yield the other files of a run that are released, and whether they are redacted."""
    for folder in (EVALUATION, SPIKES, GALLERY, ENERGY, ROW_LOSSES):
        inside = stage.run / folder
        for path in files_below(inside) if is_folder_retried(inside) else ():
            parts = path.relative_to(stage.run).parts
            if path.suffix == ".tmp" or any(part.startswith("ckpt_") for part in parts[:-1]):
                # Checkpoints beside spikes were copied as such.
                continue
            yield path, folder != GALLERY and path.suffix in REDACTED


def _copy_rest(
    stage: Stage,
    place: Path,
    sealed: SealedRecord,
    private: Private,
    hashes: Mapping[str, str],
) -> None:
    for path, redacted in _rest_of(stage):
        name = path.relative_to(stage.run).as_posix()
        if not redacted:
            copy_file(path, place / name)
            continue
        before = read_plain_file(path)
        after = redacted_text(path, before, private, hashes)
        write_bytes(place / name, after)
        if after != before:
            sealed.originals[name] = digest(before)


def redacted_text(path: Path, before: bytes, private: Private, hashes: Mapping[str, str]) -> bytes:
    """Return a JSON or YAML file without what is private, and with the new hashes.

    The same bytes where there is nothing to change. Raises RunError when it cannot be read.
    """
    try:
        text = before.decode()
        if path.suffix == ".json":
            content = parse_json(text)
            changed = private.value(content)
            if changed != content:
                text = json.dumps(changed, ensure_ascii=False, indent=1) + "\n"
        else:
            text = private.lines(text)
    except ValueError as error:
        raise RunError(f"{path} cannot be read ({error}); make it again") from None
    for old, new in hashes.items():
        text = text.replace(old, new)
    return text.encode()


def contamination_of(stage: Stage) -> Path:
    """Return the place of the contamination report of a run."""
    return stage.run / EVALUATION / CONTAMINATION
