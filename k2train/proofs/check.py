"""Check the proofs of a folder with nothing but the folder: signatures, hashes, added files.

- Every file of the folder must be one that the provenance names, with its hash, and the reverse.
- The bill of materials and the data description must agree with the files that they name.
- The summary as Markdown must be what its JSON says.

A signature only proves that one key made it. Whose key it is, a reader learns elsewhere: compare
its identifier, or give the publisher's key.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from k2train.errors import UserError
from k2train.proofs.bom import bom_digests
from k2train.proofs.croissant import described_digests
from k2train.proofs.envelope import opened
from k2train.proofs.folder import PROOFS, TIMESTAMPS, CoveredFile, covered_files
from k2train.proofs.keys import key_id, read_public_key
from k2train.proofs.signature import SIGNATURE, signature_problem
from k2train.proofs.statement import covered_digests, lacking_subjects
from k2train.proofs.sums import sum_problems
from k2train.proofs.time_stamp import stamp_problems
from k2train.proofs.training_content import summary_markdown
from k2train.proofs.write import (
    BOM,
    CROISSANT,
    ENVELOPE,
    PUBLIC_KEY,
    STATEMENT,
    SUMMARY,
    SUMMARY_TEXT,
)
from k2train.retry import is_file_retried, is_folder_retried, is_link_retried
from k2train.safe_json import parse_json, read_plain_file

Digests = dict[str, str]


def check_proofs(folder: Path, expected: str | None = None) -> list[str]:
    """Check all proofs of a folder; one line per problem, empty where all hold.

    `expected` is the identifier of the publisher's key, from elsewhere; without it the key in the
    folder is believed. Raises UserError for a folder without proofs, and for a missing package;
    OSError, UnavailableError.
    """
    place = folder / PROOFS
    if is_link_retried(place):
        raise UserError(f"{place} is a link, which leads to other proofs; copy them into {folder}")
    if not is_folder_retried(place):
        raise UserError(f"{folder} has no proofs ({place.name}/); write them with --run")

    signed = not is_file_retried(place / STATEMENT)
    problems = sum_problems(place, PROOFS, (SIGNATURE, TIMESTAMPS) if signed else ())
    if signed:
        # What a signature says of a changed key or document would only repeat this.
        problems += _key_problems(place, expected)
        if not problems:
            if problem := signature_problem(folder, place / PUBLIC_KEY):
                problems.append(f"{PROOFS}/{SIGNATURE}: {problem}")
            problems += stamp_problems(folder)
    else:
        problems += _unsigned_problems(place, expected, problems)

    covered = covered_files(folder)
    problems += _content_problems(place, covered, ENVELOPE if signed else STATEMENT)
    return problems


def key_of(folder: Path) -> str | None:
    """Return the identifier of the key that a folder names as its signer; None without one.

    It is only a claim: `check_proofs` says whether that key signed anything.
    """
    place = folder / PROOFS
    if is_file_retried(place / STATEMENT) or not is_file_retried(place / PUBLIC_KEY):
        return None
    return key_id(read_public_key(place / PUBLIC_KEY))


def _unsigned_problems(place: Path, expected: str | None, known: Sequence[str]) -> Iterator[str]:
    if expected is not None:
        yield f"{PROOFS}: nothing is signed, so the key proves nothing"
    for name in (PUBLIC_KEY, ENVELOPE, SIGNATURE):
        # A reader who sees the publisher's key there would take it for the signer's.
        if is_file_retried(place / name) and not any(name in line for line in known):
            yield f"{PROOFS}/{name}: is beside {STATEMENT}, which is not signed"


def _key_problems(place: Path, expected: str | None) -> list[str]:
    named = place / PUBLIC_KEY
    try:
        own = key_id(read_public_key(named))
    except UserError:
        return [f"{PROOFS}/{PUBLIC_KEY}: is missing, or no key"]
    if expected in (None, own):
        return []
    return [f"{PROOFS}: signed by key {own}, not by the given one, {expected}"]


def _content_problems(place: Path, there: Sequence[CoveredFile], statement: str) -> Iterator[str]:
    files = {file.name: file.sha256 for file in there}

    def provenance(content: Any) -> Digests:
        if statement == ENVELOPE:
            content = opened(content, read_public_key(place / PUBLIC_KEY))
        named = covered_digests(content)
        if lacking := lacking_subjects(content, there):
            raise ValueError(f"does not name {lacking[0]} as a subject")
        return named

    covered: Digests | None = None
    readers: Mapping[str, Callable[[Any], Digests]] = {
        statement: provenance,
        BOM: bom_digests,
        CROISSANT: described_digests,
    }
    for name, read in readers.items():
        if name == CROISSANT and not is_file_retried(place / name):
            # A run whose data is gone has none.
            continue
        try:
            named = read(parse_json(read_plain_file(place / name)))
        except (OSError, ValueError) as error:
            yield f"{PROOFS}/{name}: {error}"
            continue
        covered = named if name == statement else covered
        yield from _differences(name, named, files)

    if covered is not None:
        for name in sorted(files.keys() - covered.keys()):
            yield f"{name}: was added, {PROOFS}/{statement} does not name it"
    yield from _summary_problems(place)


def _differences(document: str, named: Digests, files: Digests) -> Iterator[str]:
    for name, digest in sorted(named.items()):
        if name not in files:
            yield f"{name}: is missing, {PROOFS}/{document} names it"
        elif files[name] != digest:
            yield f"{name}: sha256 is {files[name][:16]}, {PROOFS}/{document} says {digest[:16]}"


def _summary_problems(place: Path) -> Iterator[str]:
    try:
        text = summary_markdown(parse_json(read_plain_file(place / SUMMARY)))
        same = read_plain_file(place / SUMMARY_TEXT) == text.encode()
    except (OSError, ValueError) as error:
        yield f"{PROOFS}/{SUMMARY}: {error}"
        return
    if not same:
        yield f"{PROOFS}/{SUMMARY_TEXT}: is not what {SUMMARY} says"
