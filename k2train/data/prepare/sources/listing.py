"""Listing of a recipe's sources: the files of each subset, grouped into encode tasks."""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from k2train.data.prepare.recipe import STDLIB_ORIGINS, Recipe, SubsetRecipe, fixed_folder
from k2train.data.prepare.source import Source
from k2train.data.prepare.sources.file_patterns import files_below, matching_paths
from k2train.data.prepare.sources.stdlib import stdlib_sources, topic_sources
from k2train.data.prepare.workspace import EncodeTask
from k2train.data.tokenizer import is_encodable
from k2train.errors import DataError
from k2train.retry import exists_retried, is_folder_retried, stat_retried

# A corpus too small to fill tasks of `task_bytes` is divided into about this many tasks, so that
# several workers are busy.
MIN_TASKS = 32
MIN_TASK_BYTES = 2**18
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""How an address begins: `s3://`, `hf://`, `https://`."""


def list_sources(recipe: Recipe) -> dict[str, list[Source]]:
    """List the sources of each subset, sorted by key.

    Patterns are relative to the working directory. Raises DataError with one line for each pattern
    that matches nothing or only a folder, and for each file that cannot be read. Otherwise raises
    it for a file under two names, or two files under one.
    """
    found: dict[str, list[Source]] = {}
    problems: list[str] = []

    for name, subset in recipe.subsets.items():
        if subset.kind in STDLIB_ORIGINS:
            listed = topic_sources() if subset.kind == "stdlib_topics" else stdlib_sources()
        else:
            listed, mistakes = _file_sources(subset, recipe.origin_of(name))
            problems += [f"subsets.{name}.paths: {mistake}" for mistake in mistakes]
        found[name] = sorted(listed, key=lambda source: source.key)

    if problems:
        raise DataError("\n".join(problems))
    _check_unique_names(found)
    return found


def _file_sources(subset: SubsetRecipe, origin: str) -> tuple[list[Source], list[str]]:
    """The files of a subset, and the problems of its patterns."""
    found: dict[tuple[str, str], Source] = {}
    problems: list[str] = []
    for pattern in subset.paths:
        folder = os.path.abspath(fixed_folder(pattern))
        paths, mistakes = _matches(subset, pattern)
        problems += mistakes
        for path in paths:
            absolute = os.path.abspath(path)
            facts = stat_retried(path)
            if facts is None or not stat.S_ISREG(facts.st_mode) or not os.access(path, os.R_OK):
                problems.append(f"{path} is missing, or cannot be read: fix it or the pattern")
                continue

            # `fixed_folder` takes a file name without a suffix for a folder.
            inside = (
                path.name
                if absolute == folder
                else Path(os.path.relpath(absolute, folder)).as_posix()
            )
            if not is_encodable(inside):
                problems.append(f"{absolute!r} has a name that is not UTF-8: rename it")
                continue

            source = Source(origin, inside, absolute, facts.st_size)
            # A file reached by two paths, as through a link, is one source.
            found.setdefault((source.key, os.path.realpath(path)), source)

    return list(found.values()), problems


def _matches(subset: SubsetRecipe, pattern: str) -> tuple[list[Path], list[str]]:
    """The files that match a pattern, and the problems of the pattern."""
    if REMOTE.match(pattern):
        return [], [remote_problem(pattern)]
    literal = Path(pattern)
    paths = [literal] if exists_retried(literal) else matching_paths(pattern)
    folders = {path: None for path in paths if is_folder_retried(path)}
    found = [path for path in paths if path not in folders]
    for folder in folders:
        if subset.kind == "text":
            # Patterns leave out hidden files, so folders do too.
            found += files_below(folder)
        elif folder == literal:
            suffix = f"{subset.kind}.zst" if subset.kind == "jsonl" else subset.kind
            return [], [
                f"{pattern} is a folder; name its files, as "
                f"{folder}/*.{subset.kind} or {folder}/**/*.{suffix}"
            ]

    return found, [] if found else [f"{pattern} matches no file, seen from {Path.cwd()}"]


def remote_problem(pattern: str) -> str:
    """The line for a pattern that is an address."""
    return f"{pattern} is an address; only local paths are read: copy the files, or mount them"


def _check_unique_names(listed: dict[str, list[Source]]) -> None:
    """Raises DataError for a file under two names, and for two files under one name."""
    paths: dict[str, tuple[str, str]] = {}
    keys: dict[str, tuple[str, str]] = {}
    for name, sources in listed.items():
        for source in (source for source in sources if source.path):
            # Links are resolved, so that no file is used under two names.
            path = os.path.realpath(source.path)
            other, key = paths.setdefault(path, (name, source.key))
            if key != source.key:
                raise DataError(
                    f"subsets.{name}.paths: {source.path} is {source.key} here and "
                    f"{key} in subsets.{other}: one file must have one name; give both "
                    "subsets the same origin, and patterns with one folder in front"
                )

            other, before = keys.setdefault(source.key, (name, path))
            if before != path:
                raise DataError(
                    f"subsets.{name}.paths: {source.path} and {before} "
                    f"(subsets.{other}) are both {source.key}: two files must "
                    "have two names; give them other origins, or one pattern"
                )


def encode_tasks(recipe: Recipe, sources: dict[str, list[Source]]) -> list[EncodeTask]:
    """Group sources into tasks of about `executor.task_bytes`.

    Subsets that read the same documents read them in one task. The grouping depends neither on the
    number of workers, nor does it show in the result.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, subset in recipe.subsets.items():
        # Everything that decides which documents are read, and their names.
        signature = (
            subset.kind,
            recipe.origin_of(name),
            subset.paths,
            subset.text_key,
            subset.id_key,
        )

        groups.setdefault(signature, []).append(name)

    total_bytes = sum(
        source.size_bytes for names in groups.values() for source in sources[names[0]]
    )
    # Small corpora get smaller tasks, so that all workers are busy.
    target_bytes = min(recipe.executor.task_bytes, max(MIN_TASK_BYTES, total_bytes // MIN_TASKS))
    tasks = []

    for names in groups.values():
        tasks += [
            EncodeTask(tuple(names), group)
            for group in _group_sources(sources[names[0]], target_bytes)
        ]

    return tasks


def _group_sources(sources: Sequence[Source], target_bytes: int) -> Iterator[tuple[Source, ...]]:
    """Split consecutive sources into groups of about `target_bytes`."""
    group: list[Source] = []
    group_bytes = 0
    for source in sources:
        if group and group_bytes + source.size_bytes > target_bytes:
            yield tuple(group)
            group, group_bytes = [], 0
        group.append(source)
        group_bytes += source.size_bytes
    if group:
        yield tuple(group)
