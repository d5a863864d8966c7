"""Verification of a release with nothing but its folder. No torch, no run, no network.

- Hashes first, which name every missing, altered and added file; then what the files say of each
  other, which hashes cannot see.
- Nothing of a file whose hash is wrong is believed, but its own checks still run and say more.
- All of it may be hostile. What cannot be checked is a problem of its own line, never a traceback.

Alternatives considered:
- Stopping at the first problem: it stays unknown what else must be fetched again.
- Praise of a signature without a word of its key: a forger signs, too.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.files import sha256_file
from k2train.release.expected import NOBODY, Expected
from k2train.release.index import FORMAT, page_of
from k2train.release.places import INDEX, INDEX_PAGE, NOT_WHOLE, PROOFS, RUN, SUMS
from k2train.release.proofs import problems as proof_problems
from k2train.release.proofs import signer
from k2train.release.sums import GIT, summed_files, sums_problems
from k2train.release.verify_models import Found
from k2train.release.verify_record import verify_stage
from k2train.retry import exists_retried, is_file_retried, is_folder_retried, list_retried
from k2train.safe_json import read_json, read_plain_file

PARTS = {"chunks": "file", "provenance of the chunks": "provenance"}
"""Artefacts that are a file of each chunk, by the key of its name in the data manifest."""


def verify(release: Path, expected: Expected = NOBODY) -> Found:
    """Verify a release; `expected` is what is known of it from elsewhere.

    Raises UserError for a key that is none, UnavailableError where the file system does not answer.
    """
    key = expected.key_id()
    found = Found()
    found.check(SUMS, lambda: _hash_problems(release, expected, found))
    if found.files:
        content = _read_index(release, found)
        found.check(INDEX, lambda: _index_problems(release, content, found))
        found.check(INDEX, lambda: _page_problems(release, content))
        for stage, lines in content.get("checkpoints", {}).items():
            if not _is_inside(stage) or not is_folder_retried(release / stage):
                found.problems.append(f"{INDEX}: names the stage {stage!a:.60}, which is not there")
                continue
            found.check(stage, partial(_verified, release / stage, lines, found))
        found.check(INDEX, lambda: _folder_problems(release, content))
        found.check(PROOFS, lambda: proof_problems(release, key))
        found.check(PROOFS, lambda: _signer_problems(release, key, found))
    found.problems = [_one_line(text, release) for text in dict.fromkeys(found.problems)]
    return found


def _verified(stage: Path, lines: Any, found: Found) -> Iterable[str]:
    verify_stage(stage, lines if isinstance(lines, list) else [], found)
    return ()


def _hash_problems(release: Path, expected: Expected, found: Found) -> Iterator[str]:
    """Compare all files with their hashes, and the list of these with the expected one."""
    if is_file_retried(release / NOT_WHOLE):
        yield f"{NOT_WHOLE}: the release was never finished"
    yield from sums_problems(release)
    # Where it raises, a link or a pipe is in the folder, and nothing below it is read.
    found.files = len(summed_files(release))
    if exists_retried(release / GIT):
        found.notes.append(
            f"{GIT} is not looked at, and no signature covers it: its hooks and settings are "
            "programs; use a copy without it"
        )
    if not is_file_retried(release / SUMS):
        return
    digest = sha256_file(release / SUMS)
    if not expected.sums:
        found.notes.append(
            f"this release is {digest} ({SUMS}): compare it with the publisher's, an older "
            "release of theirs is whole, too (--sums)"
        )
    elif digest != expected.sums:
        yield f"{SUMS}: is {digest}, not the release that --sums names, {expected.sums}"


def _part_problems(place: Path, name: str) -> Iterator[str]:
    """Say which files of chunks are not there; `name` is that of an artefact of the index."""
    if name in PARTS:
        manifest = read_data_manifest(place / "manifest.json")
        for info in manifest.all_chunks():
            file = getattr(info, PARTS[name])
            if file is not None and not is_file_retried(place / file):
                yield f"{place / file}: is missing, {INDEX} says that it is released"


def _folder_problems(release: Path, content: Mapping[str, Any]) -> Iterator[str]:
    """Say which folders are no stages of the index: nothing in them was compared."""
    stages = content.get("checkpoints", {})
    for path in list_retried(release):
        if is_folder_retried(path) and path.name not in (PROOFS, GIT, *stages):
            yield f"{path.name}: is no stage of {INDEX}, so nothing in it was checked"


def _signer_problems(release: Path, key: str | None, found: Found) -> Iterator[str]:
    """Say whose signature it is, and what that proves."""
    found.signer = signer(release)
    if found.signer is None:
        if key is not None:
            yield f"{PROOFS}: nothing is signed by {key}"
        else:
            found.notes.append("not signed: whoever altered it could write all hashes again")
    elif key is None:
        found.notes.append(
            f"signed by key {found.signer}: anybody can make a key; compare it with the "
            "publisher's, from elsewhere (--key, --fingerprint)"
        )


def _one_line(text: str, release: Path) -> str:
    """Name files by their place in the release."""
    return " ".join(text.split()).replace(f"{release}/", "")


def _is_inside(name: Any) -> bool:
    """Whether a name from a file leads nowhere out of the release."""
    parts = Path(str(name)).parts
    return bool(parts) and ".." not in parts and not Path(str(name)).is_absolute()


def _read_index(release: Path, found: Found) -> Mapping[str, Any]:
    try:
        content = read_json(release / INDEX)
        if not isinstance(content, dict) or not isinstance(content.get("checkpoints"), dict):
            raise ValueError("is no index of a release")
        if content.get("format") != FORMAT:
            raise ValueError(
                f"has format {content.get('format')!r:.20}, this version reads {FORMAT}"
            )
    except (OSError, ValueError) as error:
        found.problems.append(f"{INDEX}: {getattr(error, 'strerror', None) or error}")
        return {}
    return content


def _page_problems(release: Path, content: Mapping[str, Any]) -> Iterator[str]:
    """Compare the page for people with the index."""
    try:
        if content and read_plain_file(release / INDEX_PAGE) != page_of(content).encode():
            yield f"{INDEX_PAGE}: does not say what {INDEX} says"
    except OSError as error:
        yield f"{INDEX_PAGE}: cannot be read ({error.strerror})"
    except ValueError as error:
        yield f"{INDEX}: {error}"


def _index_problems(release: Path, content: Mapping[str, Any], found: Found) -> Iterator[str]:
    """Say which artefacts of the index are not there, and which checkpoints it does not know."""
    artefacts = content.get("artefacts", [])
    for one in artefacts if isinstance(artefacts, list) else []:
        place = one.get("place") if isinstance(one, dict) else ""
        if place is None:
            found.gaps += 1
            if not one.get("reason"):
                yield f"{INDEX}: {one.get('name')!a:.60} is a gap without a reason"
        elif not _is_inside(place) or not exists_retried(release / str(place)):
            yield f"{place}: is missing, {INDEX} says that it is released"
        else:
            yield from _part_problems(release / str(place), str(one.get("name")))
    for stage, lines in content.get("checkpoints", {}).items():
        for line in lines if isinstance(lines, list) else []:
            if not isinstance(line, dict):
                yield f"{INDEX}: a line of {stage!a:.60} is no object"
                continue
            name, wanted = str(line.get("checkpoint")), line.get("released")
            place = f"{stage}/{name}" if line.get("kind") == "numbered" else f"{stage}/{RUN}/{name}"
            if wanted and (not _is_inside(place) or not is_folder_retried(release / place)):
                yield f"{place}: is missing, {INDEX} says that it is released"
