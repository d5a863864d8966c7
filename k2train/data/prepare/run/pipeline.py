"""Preparation of a data folder from a recipe and documents: check, group into tasks, run, publish.

- Every choice is made by a key. The same recipe over the same documents gives the same bytes,
  whichever process runs the tasks and however often it is killed.
- A repeated preparation finds that out from hashes and does nothing.
- Alternatives considered: modification times as the test of freshness; they change when nothing
  does, and do not change when a disk loses a block.
"""

import hashlib
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from k2train.data.load_tokenizer import TOKENIZER_FILES
from k2train.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from k2train.data.prepare.allocate.text_flags import seen_texts
from k2train.data.prepare.encode.fill_in_middle import require_specials
from k2train.data.prepare.encode.vocabulary import obtain_tokenizer
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.run.executor import LOCK_NAME, exclusive, run_phases
from k2train.data.prepare.run.publish import damaged, finish, is_data_folder
from k2train.data.prepare.source import Source
from k2train.data.prepare.sources.changes import changed_sources, sources_identity
from k2train.data.prepare.sources.listing import encode_tasks, list_sources
from k2train.data.prepare.sources.recognize import check_formats
from k2train.data.prepare.sources.rejected import REJECTED_NAME
from k2train.data.prepare.workspace import (
    CONTEXT_NAME,
    EncodeTask,
    Workspace,
    listing_sha256,
    read_json,
)
from k2train.data.source_record import SOURCES_NAME, SourceFile, read_sources
from k2train.data.text_record import TEXTS_NAME
from k2train.data.tokenizer import Tokenizer
from k2train.errors import DataError
from k2train.retry import exists_retried, is_file_retried, is_folder_retried, list_retried

# Part of the identity of a preparation: increase it when the same recipe would give other bytes.
PREPARATION_VERSION = 3

OTHER_FILES = {LOCK_NAME, MANIFEST_NAME, SOURCES_NAME, REJECTED_NAME, *TOKENIZER_FILES, TEXTS_NAME}
WORK_PARTS = {
    REJECTED_NAME,
    CONTEXT_NAME,
    LOCK_NAME,
    "sources.jsonl",
    *TOKENIZER_FILES,
    "runs",
    "plan",
    "chunks",
    "failures",
    "logs",
}

Listing = dict[str, list[Source]]


def prepare(
    recipe: Recipe, force: bool = False, progress: Progress | None = None
) -> tuple[Manifest, bool]:
    """Prepare the data folder, or verify a finished one: its manifest, and whether it was made now.

    Resumes an interrupted preparation. Raises DataError when the folder holds something else, when
    an earlier start read other documents (unless `force` is given), and when documents are too few.
    """
    progress = progress or Progress(None)
    # A mistake in `seen` is told before anything is read or written.
    seen_texts(recipe)
    before = None if force else _finished(recipe)
    listing = list_sources(recipe)
    if before is not None:
        _verify_finished(before, recipe, listing)
        _remove_work(recipe)
        return before, False

    target = target_of(recipe)
    _check_folders(recipe, target)
    seen_texts(recipe, verify=True)
    check_formats(recipe, listing)
    tokenizer = obtain_tokenizer(recipe, listing, progress)
    if any(s.fill_in_the_middle.psm or s.fill_in_the_middle.spm for s in recipe.subsets.values()):
        require_specials(tokenizer)
    for folder in (recipe.work_folder, target):
        folder.mkdir(parents=True, exist_ok=True)

    # Both, since two recipes may name one output and different work folders.
    with exclusive(recipe.work_folder), exclusive(target):
        if not force and _finished(recipe) is not None:
            raise DataError(
                f"{recipe.output}: was prepared by another "
                "process just now; start again to check it"
            )

        workspace = _workspace(recipe, target, tokenizer, listing, force, progress)
        run_phases(workspace, recipe.executor, progress)
        records = [
            read_json(workspace.encode_record(number)) for number in range(len(workspace.tasks))
        ]
        manifest = finish(workspace, sources_identity(records), PREPARATION_VERSION)
        shutil.rmtree(workspace.folder, ignore_errors=True)

    _remove_work(recipe)
    return manifest, True


def _remove_work(recipe: Recipe) -> None:
    """Remove the work folder of this output that a start left when killed after its last rename."""
    work, target = recipe.work_folder, target_of(recipe)
    with suppress(OSError, DataError), exclusive(work):
        for folder in _workspaces(work):
            if Workspace.open(folder).target.resolve() == target.resolve():
                shutil.rmtree(folder, ignore_errors=True)
        if {path.name for path in list_retried(work)} == {LOCK_NAME}:
            shutil.rmtree(work, ignore_errors=True)


def _workspaces(work: Path) -> list[Path]:
    """Folders of unfinished preparations."""
    return [path for path in list_retried(work) if is_file_retried(path / CONTEXT_NAME)]


def target_of(recipe: Recipe) -> Path:
    """The data folder under its temporary name."""
    return recipe.output.with_name(recipe.output.name + ".tmp")


def _check_folders(recipe: Recipe, target: Path) -> None:
    """Raises DataError for folders that hold files which no preparation wrote.

    They would be in the way, or lost.
    """
    if exists_retried(recipe.output) and not is_data_folder(recipe.output):
        raise DataError(
            f"output: {recipe.output} exists and is not a "
            "data folder; name another, or move it away"
        )

    work = recipe.work_folder
    for folder in (recipe.output.resolve(), target.resolve()):
        if work.resolve().is_relative_to(folder) or folder.is_relative_to(work.resolve()):
            raise DataError(
                f"work: {work} and output: {recipe.output} contain one another; name another work"
            )

    for key, folder, is_known in (("work", work, _is_work), ("output", target, _is_output)):
        if exists_retried(folder) and not is_folder_retried(folder):
            raise DataError(f"{key}: {folder} is not a folder; move it away")
        foreign = (
            next((path for path in list_retried(folder) if not is_known(path)), None)
            if exists_retried(folder)
            else None
        )
        if foreign is not None:
            raise DataError(
                f"{key}: {foreign} was not written by a "
                f"preparation; move it away, or name another {key}"
            )


def _is_work(path: Path) -> bool:
    """Whether a preparation may have written this entry of a work folder."""
    if path.name in (LOCK_NAME, "k2_import"):
        return True
    # Recognized by name and contents, since one killed at its start has no context yet.
    is_identity = re.fullmatch(r"[0-9a-f]{16}", path.name) is not None and is_folder_retried(path)
    return is_identity and all(
        part.name in WORK_PARTS or part.suffix == ".tmp" for part in list_retried(path)
    )


def _is_output(path: Path) -> bool:
    """Whether a preparation may have written this entry of a target folder."""
    parts = r"(chunk_\d+|held_out)(\.borders)?\.(npy|parquet)"
    return (
        path.suffix == ".tmp"
        or path.name in OTHER_FILES
        or re.fullmatch(parts, path.name) is not None
    )


def _finished(recipe: Recipe) -> Manifest | None:
    """Manifest of the finished folder. Raises DataError when it is of another recipe."""
    if not is_file_retried(recipe.output / MANIFEST_NAME):
        return None
    before = read_manifest(recipe.output)
    facts, version = before.facts, "another version of the preparation"
    # Another version may write the same recipe with other keys.
    _check_same(before, version, "road", facts.road, PREPARATION_VERSION)
    _check_same(before, "another recipe", "recipe_sha256", facts.recipe_sha256, recipe.sha256)
    # Older versions recorded them in the order of the recipe.
    seen, now = sorted(set(facts.seen)), list(seen_texts(recipe))
    _check_same(before, "other data in `seen`", "seen", seen, now)
    return before


def _verify_finished(before: Manifest, recipe: Recipe, listing: Listing) -> None:
    """Raises DataError unless the folder matches recipe and documents, to the last byte of both."""
    if exists_retried(recipe.tokenizer.model):
        now = recipe.tokenizer.load().sha256
        _check_same(before, "another tokenizer", "tokenizer_sha256", before.tokenizer_sha256, now)

    if broken := damaged(before):
        raise DataError(
            f"{before.folder}: {', '.join(broken)} missing or "
            "different from the manifest; --force prepares it again"
        )

    if changed := changed_sources(_all_sources(listing), read_sources(before).files):
        raise DataError(
            f"{before.folder} was prepared from other documents (by Python "
            f"{before.facts.python}): {_first_of(changed)} missing, new or "
            "changed since; name another output, or give --force to replace it"
        )

    files, now = "other files, or the same given to other subsets", _listing_sha256(listing)
    _check_same(before, files, "listing_sha256", before.facts.listing_sha256, now)


def _listing_sha256(listing: Listing) -> str:
    return listing_sha256(
        {(name, source.key) for name, sources in listing.items() for source in sources}
    )


def _all_sources(listing: Listing) -> list[Source]:
    return list({source.key: source for listed in listing.values() for source in listed}.values())


def _first_of(names: Sequence[str]) -> str:
    """The first name, and the number of further ones."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _check_same(before: Manifest, what: str, key: str, found: object, wanted: object) -> None:
    """Raises DataError when a finished folder was prepared from something else."""
    if found != wanted:
        raise DataError(
            f"{before.folder} was prepared from {what} "
            f"({key} {str(found)[:12]}, now {str(wanted)[:12]}): "
            "name another output, or give --force to replace it"
        )


def _workspace(
    recipe: Recipe,
    target: Path,
    tokenizer: Tokenizer,
    listing: Listing,
    force: bool,
    progress: Progress,
) -> Workspace:
    """The work folder of this preparation, resumed or new.

    Removes what other preparations of this output left.
    """
    # The folder is named by everything that decides the bytes.
    seen = "".join(f" {digest}" for digest in seen_texts(recipe))
    identity = hashlib.sha256(
        f"{recipe.sha256} {tokenizer.sha256} {PREPARATION_VERSION}{seen}".encode()
    ).hexdigest()[:16]
    # Tasks may run in another folder.
    recipe = recipe.model_copy(update={"seen": tuple(path.resolve() for path in recipe.seen)})

    folder = recipe.work_folder / identity
    resumes = is_file_retried(folder / CONTEXT_NAME) and not force

    # Remove other preparations of this output, and this one when it starts over.
    for other in _workspaces(recipe.work_folder):
        same_output = Workspace.open(other).target.resolve() == target.resolve()
        if same_output and (other != folder or not resumes):
            progress.log(
                f"remove {other}: " + ("started over" if other == folder else "of another recipe")
            )
            shutil.rmtree(other)

    if not resumes:
        for path in list_retried(target):
            if path.name != LOCK_NAME:
                shutil.rmtree(path) if is_folder_retried(path) else path.unlink()
        return Workspace.create(folder, target, recipe, tokenizer, encode_tasks(recipe, listing))

    workspace = Workspace.open(folder)
    _check_sources(workspace, listing)
    progress.log(f"resuming the preparation in {folder}")
    # The tasks keep their numbers. What does not decide bytes, such as the executor and the paths
    # of files, may have changed.
    now = {source.key: source for source in _all_sources(listing)}
    tasks = [
        EncodeTask(task.subsets, tuple(now[s.key] for s in task.sources))
        for task in workspace.tasks
    ]

    return Workspace.create(folder, target, recipe, tokenizer, tasks)


def _check_sources(workspace: Workspace, listing: Listing) -> None:
    """Raises DataError when a source differs from what the earlier start listed or read."""
    listed = [source for task in workspace.tasks for source in task.sources]
    before = {source.key: source.size_bytes for source in listed}
    now = {source.key: source.size_bytes for source in _all_sources(listing)}

    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if not changed and workspace.listing_sha256 != _listing_sha256(listing):
        raise DataError(
            f"{workspace.folder}: was started with the files assigned to other "
            "subsets; restore the recipe's paths, or give --force to start over"
        )

    if not changed:
        read = [
            record
            for n in range(len(workspace.tasks))
            if (record := read_json(workspace.encode_record(n)))
        ]
        known = {
            source["key"]: SourceFile.model_validate(source)
            for record in read
            for source in record["sources"]
        }
        changed = changed_sources(
            [source for source in _all_sources(listing) if source.key in known], known
        )

    if changed:
        raise DataError(
            f"{_first_of(changed)}: missing, new or changed since this "
            f"preparation began in {workspace.folder}; restore the "
            "files or the recipe's paths, or give --force to start over"
        )
