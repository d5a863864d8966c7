"""Write the proofs of a folder: provenance, bill of materials, data card, summary, signature.

- `proofs/` is made under a temporary name and takes its name when it is complete. The signature
  comes last, because it covers the others.
- One process at a time writes them; a second one is refused.
- All documents are made of the record of the runs and the files of the folder. What they leave
  open is listed in `open.json`.

Alternatives considered:
- Proofs beside the folder: they would be lost at the first copy.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from k2train.errors import RunError, UserError
from k2train.files import AtomicFile, OwnFolder, locked_folder, sync_directory
from k2train.proofs.bom import bill_of_materials
from k2train.proofs.croissant import data_description
from k2train.proofs.envelope import sealed
from k2train.proofs.facts import Stage, read_stages
from k2train.proofs.folder import PROOFS, TIMESTAMPS, CoveredFile, covered_files
from k2train.proofs.keys import public_pem, read_private_key, refuse_inside
from k2train.proofs.signature import SIGNATURE, require_packages, write_signature
from k2train.proofs.statement import provenance_statement
from k2train.proofs.sums import SUMS, sums_text
from k2train.proofs.training_content import content_summary, summary_markdown
from k2train.retry import exists_retried, is_folder_retried

STATEMENT = "provenance.json"
"""The statement without a signature."""
ENVELOPE = "provenance.dsse.json"
BOM = "bom.cdx.json"
CROISSANT = "croissant.json"
SUMMARY, SUMMARY_TEXT = "training_content.json", "training_content.md"
OPEN = "open.json"
PUBLIC_KEY = "public_key.pem"
UNSIGNED = "nothing is signed: no key was given (--key)"

T = TypeVar("T")


def write_proofs(folder: Path, runs: Sequence[Path], key: Path | None = None) -> list[str]:
    """Write `folder/proofs/` about all files of a folder; returns the open points, a line each.

    - `folder` is a release, a run or an export, complete but for its proofs: what is written into
      it afterwards is found as an added file. Proofs of before are replaced.
    - `runs` are the runs that made it, in the order of the stages of the model.
    - `key` is a private key in PEM outside the folder. Without one nothing is signed.

    Raises UserError for a folder without weights, a run that is none, a bad key and a missing
    package; OSError, UnavailableError.
    """
    if not runs:
        raise UserError("give the run, or the runs, that made the folder (--run)")
    if not is_folder_retried(folder):
        raise RunError(f"{folder} is not a folder; give a run, an export or a release")
    signer = None
    if key is not None:
        refuse_inside(key, folder)
        signer = read_private_key(key)
        require_packages()
    place, made = folder / PROOFS, folder / f"{PROOFS}.tmp"
    if exists_retried(place / TIMESTAMPS):
        raise UserError(
            f"{place} has time stamps, and a new signature has none of them; move {TIMESTAMPS}/ "
            "out of it first"
        )
    # Empty while the folder's files are listed, so it is none of them.
    own = _own(made, lambda: OwnFolder(made))
    try:
        # The record first: it is read in a moment, and a large folder is hashed for hours.
        stages = read_stages(list(runs))
        files = covered_files(folder)
        documents, points = _documents(files, stages, signer)

        for name, content in documents.items():
            _write(made / name, content)
        if exists_retried(place):
            os.close(_own(place, lambda: locked_folder(place)))
            shutil.rmtree(place)
        # The lock goes with it, until it is signed.
        made.rename(place)
        sync_directory(folder)

        if key is not None:
            _sign(folder, key)
    finally:
        own.close()
    return points


def _own(place: Path, lock: Callable[[], T]) -> T:
    """Return what `lock` returns. Raises UserError where another process writes the proofs."""
    try:
        return lock()
    except BlockingIOError:
        raise UserError(
            f"{place} is being written by another process: wait for it, then start again"
        ) from None


def _write(path: Path, content: bytes) -> None:
    with AtomicFile(path) as stream:
        stream.write(content)


def _sign(folder: Path, key: Path) -> None:
    target = folder / PROOFS / f"{SIGNATURE}.tmp"
    write_signature(folder, key, target)
    content = target.read_bytes()
    target.unlink()
    _write(folder / PROOFS / SIGNATURE, content)


def _documents(
    files: Sequence[CoveredFile], stages: Sequence[Stage], signer: Any
) -> tuple[dict[str, bytes], list[str]]:
    """Return name -> content of every document, and the open points."""
    statement = provenance_statement(files, stages)
    description = data_description(files, stages)
    summary = content_summary(stages)

    found = {
        BOM: _json(bill_of_materials(files, stages)),
        SUMMARY: _json(summary),
        SUMMARY_TEXT: summary_markdown(summary).encode(),
    }
    if signer is None:
        found[STATEMENT] = _json(statement)
    else:
        found[ENVELOPE] = _json(sealed(statement, signer))
        found[PUBLIC_KEY] = public_pem(signer.public_key())
    if description is not None:
        found[CROISSANT] = _json(description)

    points = list(_open_points(files, stages, description, signer is not None))
    points += [f"training content: {line}" for line in summary["open"]]
    found[OPEN] = _json(points)
    sums = {name: sha256(content).hexdigest() for name, content in found.items()}
    found[SUMS] = sums_text(sums).encode()
    return found, points


def _open_points(
    files: Iterable[CoveredFile], stages: Sequence[Stage], description: Any, is_signed: bool
) -> Iterable[str]:
    if not is_signed:
        yield UNSIGNED
    for stage in stages:
        yield from stage.open
        if stage.config[1]:
            yield f"{stage.name}: withheld of the config: {', '.join(stage.config[1])}"
    if description is not None:
        listed = description["distribution"]
        gone = [one["name"] for one in listed if not one["contentUrl"].startswith("../")]
        if gone:
            yield f"{len(gone)} of {len(listed)} data files are not in the folder, as {gone[0]}"
        yield "licence, date of publication and citation of the data are not on record"


def _json(content: Any) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
