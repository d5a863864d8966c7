"""Data folder verification beyond the chunks: recipe, account, tokenizer and stray files.

- A fact is checked only where it is recorded: older and imported folders record less.
- The hash of the recipe and the sums of the account are recomputed here from their definitions.

Alternatives considered:
- Using the preparation's own code: it needs all of its packages, and could only agree with itself.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

from k2train.data.load_tokenizer import load_tokenizer
from k2train.data.manifest import Manifest
from k2train.data.manifest_facts import SubsetFacts
from k2train.data.source_record import SOURCES_NAME
from k2train.data.text_record import TEXTS_NAME
from k2train.errors import DataError, UnavailableError
from k2train.files import sha256_file
from k2train.retry import list_retried

Item = Mapping[str, int | float]
"""One subset's account: numbers by what they count."""

AGAIN = "fetch it again, or prepare the data anew"
REJECTED_NAME = "rejected.jsonl"
HASH_DIGITS = 16

_CHUNK_FILE = re.compile(r"(chunk_.*|held_out)\.((borders|mask)\.npy|npy|parquet)|held_out\..*")
_COUNTS = re.compile(r".*_(tokens|documents|samples)|documents_read|passes|rejected")
_LAID_OUT = ("used_tokens", "unused_tokens", "tail_tokens")
_DOCUMENTS = ("short", "not_chosen", "outside", "duplicate", "training", "held_out")
_LATER_DOCUMENTS = ("empty", "filtered", "seen", "held_out_copy")
"""Kinds of documents that older accounts do not have."""


def verify_folder(manifest: Manifest) -> list[str]:
    """Check sources, rejected documents, tokenizer, facts and stray files; one line per problem."""
    problems, facts = [], manifest.facts
    for name, recorded in (
        (SOURCES_NAME, facts.sources_sha256),
        (REJECTED_NAME, facts.rejected_sha256),
        (TEXTS_NAME, facts.texts.sha256 if facts.texts else None),
    ):
        if recorded is not None and (problem := hash_problem(manifest.folder / name, recorded)):
            problems.append(f"{name} {problem}")

    parts: tuple[Callable[[Manifest], Iterable[str]], ...]
    parts = (_tokenizer_problems, _recipe_problems, _account_problems, _stray_files)
    return [*problems, *(line for part in parts for line in part(manifest))]


def hash_problem(path: Path, expected: str) -> str:
    """Describe how a file differs from its expected SHA-256; empty when it does not."""
    try:
        actual = sha256_file(path)
    except OSError as error:
        return f"({path}): cannot be read ({error.strerror}); {AGAIN}"
    except UnavailableError as error:
        return f"({path}): cannot be read for now ({error})"

    if actual == expected:
        return ""
    return "({}): sha256 is {}, the manifest says {}; {}".format(
        path, *differing(actual, expected), AGAIN
    )


def differing(first: str, second: str) -> tuple[str, str]:
    """Shorten two hashes to 16 digits, or to as many as distinguish them."""
    pairs = enumerate(zip_longest(first, second), 1)
    count = max(HASH_DIGITS, next((number for number, (a, b) in pairs if a != b), 0))
    return first[:count], second[:count]


def _tokenizer_problems(manifest: Manifest) -> Iterable[str]:
    recorded = manifest.facts.tokenizer
    if recorded is None:
        return []

    path = manifest.folder / recorded.file
    if path.name != recorded.file:
        return [
            f"{manifest.path}: facts.tokenizer: file {recorded.file!r} is outside the folder of "
            "the manifest"
        ]

    try:
        tokenizer = load_tokenizer(path, recorded.specials, recorded.prefix)
    except (DataError, UnavailableError) as error:
        return [f"{error}; {AGAIN}"]

    problems = []
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        here, there = differing(tokenizer.sha256, manifest.tokenizer_sha256)
        problems.append(
            f"{path}: model and specials have the hash {here}, the manifest says {there}; {AGAIN}"
        )
    if tokenizer.vocab_size > manifest.vocab_size:
        problems.append(
            f"{path}: has {tokenizer.vocab_size} ids, vocab_size of the manifest is "
            f"{manifest.vocab_size}"
        )
    return problems


# The recipe


def _recipe_problems(manifest: Manifest) -> Iterator[str]:
    """Compare the recipe with its hash, and with the manifest's own values."""
    facts, recipe = manifest.facts, manifest.facts.recipe
    if recipe is None:
        return

    # Unset keys are not those of the recipe.
    written = json.dumps(recipe.model_dump(exclude_unset=True), sort_keys=True)
    actual = hashlib.sha256(written.encode()).hexdigest()
    if facts.recipe_sha256 is not None and actual != facts.recipe_sha256:
        here, recorded = differing(actual, facts.recipe_sha256)
        yield (
            f"{manifest.path}: facts.recipe has the hash {here}, facts.recipe_sha256 is "
            f"{recorded}; {AGAIN}"
        )

    for key, own, other in (
        ("name", facts.name, recipe.name),
        ("seed", facts.seed, recipe.seed),
    ):
        if None not in (own, other) and own != other:
            yield f"{manifest.path}: facts.{key} is {own!r}, facts.recipe has {other!r}"

    # Values that recipe and manifest both record.
    for key, number, other in (
        ("sequence_length", manifest.sequence_length, recipe.sequence_length),
        ("chunks", len(manifest.chunks), recipe.chunks),
    ):
        if other not in (None, number):
            yield f"{manifest.path}: facts.recipe has {key} {other!r}, the manifest {number}"

    rows = recipe.rows_per_chunk
    for info in manifest.chunks:
        if rows is not None and info.rows != rows:
            yield (
                f"{manifest.path}: facts.recipe has rows_per_chunk {rows!r}, {info.name} has "
                f"{info.rows} rows"
            )


# The account


def _account_problems(manifest: Manifest) -> Iterator[str]:
    """Compare the preparation's account with the sums over the chunks, and with itself."""
    account = manifest.facts.account
    if account is None:
        return

    sums: dict[str, Counter[str]] = {"used_tokens": Counter(), "held_out_tokens": Counter()}
    for info in manifest.chunks:
        sums["used_tokens"].update(info.tokens_per_subset)
    if manifest.held_out is not None:
        sums["held_out_tokens"].update(manifest.held_out.tokens_per_subset)
    for key, made in sums.items():
        yield from _against_chunks(manifest, account, key, made)

    settings = manifest.facts.recipe.subsets if manifest.facts.recipe else {}
    if settings and set(settings) != set(account):
        yield (
            f"{manifest.path}: facts.account has the subsets {', '.join(sorted(account))}, "
            f"facts.recipe {', '.join(sorted(settings))}"
        )

    for name, item in account.items():
        for problem in _item_problems(item, settings.get(name), manifest.sequence_length):
            yield f"{manifest.path}: account of subset {name}: {problem}"

    yield from _tail_problems(manifest, account)


def _against_chunks(
    manifest: Manifest, account: Mapping[str, Item], key: str, made: Mapping[str, int]
) -> Iterator[str]:
    what = "the held-out chunk has" if key == "held_out_tokens" else "the chunks have"
    for name in sorted({*account, *made}):
        item = account.get(name, {})
        recorded = item.get(key, 0 if name not in account else None)
        if recorded is not None and recorded != made.get(name, 0):
            yield (
                f"{manifest.path}: account of subset {name}: {key} is {recorded}, {what} "
                f"{made.get(name, 0)}"
            )

        samples = item.get("used_samples")
        if (
            key == "used_tokens"
            and samples is not None
            and _is_count(samples)
            and samples * manifest.sequence_length != made.get(name, 0)
        ):
            yield (
                f"{manifest.path}: account of subset {name}: used_samples is {samples} of "
                f"{manifest.sequence_length} tokens, {what} {made.get(name, 0)}"
            )


def _is_count(value: int | float | None) -> bool:
    return isinstance(value, int) and value >= 0


def _item_problems(item: Item, wanted: SubsetFacts | None, sequence_length: int) -> Iterator[str]:
    """Contradictions of one subset's account with itself or its recipe; sums only if complete."""
    wrong = [key for key, value in item.items() if _COUNTS.fullmatch(key) and not _is_count(value)]

    repeat = item.get("repeat", 1)
    if repeat <= 0:
        yield f"repeat is {repeat!r}, must be a number above 0"
        return
    if wrong:
        yield f"{wrong[0]} is {item[wrong[0]]!r}, must be a whole number from 0"
        return

    if wanted is not None and "repeat" in item and wanted.repeat != repeat:
        yield f"repeat is {repeat}, facts.recipe has {wanted.repeat!r}"

    # 0.7 is seven tenths as written in the recipe, not the nearest binary fraction.
    exact = Fraction(repr(repeat))
    if "repeat" in item and "passes" in item and item["passes"] != math.ceil(exact):
        yield f"passes is {item['passes']}, repeat {repeat} makes {math.ceil(exact)}"
    if {"asked_tokens", "training_tokens"} <= item.keys():
        asked = math.floor(exact * item["training_tokens"])
        if item["asked_tokens"] != asked:
            yield (
                f"asked_tokens is {item['asked_tokens']}, {repeat} of {item['training_tokens']} "
                f"tokens are {asked}"
            )
        if "tail_tokens" in item and item["tail_tokens"] != item["asked_tokens"] % sequence_length:
            rest = item["asked_tokens"] % sequence_length
            yield (
                f"tail_tokens is {item['tail_tokens']}, asked_tokens leave {rest} beside rows "
                f"of {sequence_length}"
            )
    yield from _sums(item)


def _sums(item: Item) -> Iterator[str]:
    if {"training_tokens", *_LAID_OUT} <= item.keys():
        # Every token of every pass is used, unused, in the tail, or left by the repeat.
        laid_out = item.get("passes", 1) * item["training_tokens"]
        total = sum(item[key] for key in _LAID_OUT) + item.get("left_by_repeat_tokens", 0)
        if total != laid_out:
            yield (
                f"tokens do not add up: used, unused, tail and left_by_repeat are {total}, "
                f"{item.get('passes', 1)} x {item['training_tokens']} training_tokens are "
                f"{laid_out}"
            )

    known = [kind for kind in _LATER_DOCUMENTS if f"{kind}_documents" in item]
    if {"documents_read", *(f"{kind}_documents" for kind in _DOCUMENTS)} <= item.keys():
        # Every document that was read is of one kind.
        total = sum(item[f"{kind}_documents"] for kind in (*_DOCUMENTS, *known))
        if item["documents_read"] != total:
            yield (
                f"documents do not add up: documents_read is {item['documents_read']}, "
                f"{', '.join((*_DOCUMENTS, *known))} are {total}"
            )


def _tail_problems(manifest: Manifest, account: Mapping[str, Item]) -> Iterator[str]:
    recorded = manifest.facts.dropped_tail_tokens
    if recorded is None:
        return

    tails = {name: item["tail_tokens"] for name, item in account.items() if "tail_tokens" in item}
    for name in sorted({*recorded, *tails}):
        if recorded.get(name) != tails.get(name):
            yield (
                f"{manifest.path}: facts.dropped_tail_tokens of subset {name} is "
                f"{recorded.get(name)}, its account has tail_tokens {tails.get(name)}"
            )


# The folder


def _stray_files(manifest: Manifest) -> Iterator[str]:
    """Files in the folder that look like chunks of this data but are not in the manifest."""
    infos = manifest.all_chunks()
    known = {file for info in infos for file in info.files()}
    for path in list_retried(manifest.folder):
        if _CHUNK_FILE.fullmatch(path.name) and path.name not in known:
            yield (
                f"{path}: looks like a chunk's and is not in {manifest.path.name}; move it out "
                "of the folder"
            )
