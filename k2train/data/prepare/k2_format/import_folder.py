"""Import of K2's chunk files, `chunk_<i>.jsonl`, as a data folder.

- The ids keep their order, a chunk keeps K2's number, and its lines keep their order.
- A chunk is an independent task. Its `.npy` and `.parquet` are written under temporary names and
  renamed, and a record, written last, marks it done. A killed import is resumed by the same
  command.
- All files are in `<output>.work/` until the last chunk is done, then the folder is renamed to
  `output`.
- `sources.json` is not written. K2 names files of which each stage used other lines, so equal names
  do not mean equal data.
- Alternatives considered: one big task, or one reader for all chunks; K2's stage 1 is 360 files of
  20 GB.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from k2train.data.chunk import ChunkInfo, Manifest, check_files, read_manifest, write_manifest
from k2train.data.load_tokenizer import TOKENIZER_FILES, load_tokenizer, save_tokenizer
from k2train.data.manifest import MANIFEST_NAME
from k2train.data.prepare.k2_format.chunk import (
    IMPORT_VERSION,
    ImportTask,
    finished,
    first_ids,
    import_chunk,
)
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.run.executor import exclusive
from k2train.data.prepare.run.local import Workers
from k2train.data.prepare.run.publish import swap_in, sweep
from k2train.data.prepare.write.provenance import require_pyarrow
from k2train.data.tokenizer import Tokenizer
from k2train.errors import DataError
from k2train.retry import exists_retried, is_file_retried, is_folder_retried, list_retried

AS_PUBLISHED = "as published"
UNKNOWN_TOKENIZER = "unknown: imported without a tokenizer"
"""Replaces the tokenizer's hash when none was given; two such folders count as having the same."""


def import_k2(
    source: Path,
    output: Path,
    *,
    vocab_size: int = 32032,
    tokenizer: Path | None = None,
    tokenizer_sha256: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    force: bool = False,
) -> Manifest:
    """Import the `chunk_<i>.jsonl` (or `.jsonl.zst`) files in `source` as the data folder `output`.

    - The first line decides the sequence length of all samples.
    - `tokenizer` is copied. Without it, or its hash, the manifest records that it is unknown.
    - Files with the names and sizes of an earlier import count as the same. `force` imports them
      again, and replaces a folder of other data.

    Raises DataError with file:line for a broken line.
    """
    require_pyarrow()
    progress = progress or Progress(None)
    files = find_chunks(source)

    given = None if tokenizer is None else _load_tokenizer(tokenizer, vocab_size, tokenizer_sha256)
    tokenizer_hash = given.sha256 if given is not None else tokenizer_sha256 or UNKNOWN_TOKENIZER

    # `imported` identifies this import on the next start.
    facts: dict[str, Any] = {
        "name": output.name,
        "imported": {
            "road": IMPORT_VERSION,
            "files": [{"file": path.name, "bytes": path.stat().st_size} for path in files.values()],
        },
    }
    if given is not None:
        facts["tokenizer"] = {"file": next(iter(given.files)), **given.facts}
        if given.model_has_prefix:
            # The ids are those of the files: nobody here decided how they were encoded.
            facts["tokenizer"]["dummy_prefix"] = AS_PUBLISHED

    work = output.with_name(output.name + ".work") / "k2_import"
    existing = _existing_import(output, facts["imported"], tokenizer_hash, vocab_size, force)
    if existing is None or exists_retried(work):
        with _exclusive_work(work, output):
            # Checked again, since another import may have finished before this one got the lock.
            existing = _existing_import(
                output, facts["imported"], tokenizer_hash, vocab_size, force
            )
            if existing is None:
                infos = _run_tasks(_tasks(files, work, vocab_size), workers, progress)
                if given is not None:
                    save_tokenizer(work / "data", given)
                _complete(work / "data", output, infos, tokenizer_hash, vocab_size, facts)

            _remove(work)

    if existing is not None:
        progress.log(f"{output}: already holds this import")
    return existing or read_manifest(output)


def _load_tokenizer(path: Path, vocab_size: int, sha256: str | None) -> Tokenizer:
    """Load a tokenizer. Raises DataError when it has more ids, or another hash than the given."""
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"vocab_size ({vocab_size}) must be at least that "
            f"of {path} ({tokenizer.vocab_size}): raise it"
        )
    if sha256 not in (None, tokenizer.sha256):
        raise DataError(
            f"{path}: its hash is {tokenizer.sha256[:16]}, tokenizer_sha256 says {sha256!r:.18}"
        )
    return tokenizer


@contextmanager
def _exclusive_work(work: Path, output: Path) -> Iterator[None]:
    """Lock the work folder of an import.

    When the import fails with nothing finished, removes the folder and the parents it created.
    Raises DataError when another import holds it, or when it cannot be created.
    """
    # Parents that this import creates, outermost last.
    created = [folder for folder in output.parents if not exists_retried(folder)]
    with ExitStack() as stack:
        try:
            for name in ("records", "data"):
                (work / name).mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(work))
        except OSError as error:
            raise DataError(
                f"{work}: cannot be created ({error.strerror}); fix this and start again"
            ) from None

        try:
            yield
        finally:
            records = work / "records"
            listed = list_retried(records) if is_folder_retried(records) else []
            if not any(path.suffix == ".json" for path in listed):
                _remove(work)
                for folder in created:
                    with suppress(OSError):
                        folder.rmdir()


def _tasks(files: Mapping[int, Path], work: Path, vocab_size: int) -> list[ImportTask]:
    """One import task per chunk file; the first line of the first file decides the length."""
    length = len(first_ids(next(iter(files.values()))))
    folders = work / "data", work / "records"
    return [
        ImportTask(path, f"chunk_{i:03d}", *folders, length, vocab_size)
        for i, path in files.items()
    ]


def _complete(
    target: Path,
    output: Path,
    infos: Sequence[ChunkInfo],
    tokenizer_hash: str,
    vocab_size: int,
    facts: dict[str, Any],
) -> None:
    """Make a data folder of the finished chunks and rename it to `output`."""
    sweep(target, infos, set(TOKENIZER_FILES))
    write_manifest(
        target,
        tokenizer_sha256=tokenizer_hash,
        sequence_length=infos[0].tokens // infos[0].rows,
        vocab_size=vocab_size,
        chunks=infos,
        facts={**facts, "account": _account(infos)},
    )
    swap_in(target, output)


def find_chunks(source: Path) -> dict[int, Path]:
    """Chunk files of a folder by ascending number.

    Raises DataError when there is none, one is missing in between, or one exists twice.
    """
    files: dict[int, Path] = {}
    if not is_folder_retried(source):
        raise DataError(f"{source}: is not a folder; give the one that holds K2's chunk_<i>.jsonl")

    for path in list_retried(source):
        if found := re.fullmatch(r"chunk_(\d+)\.jsonl(\.zst)?", path.name):
            number = int(found[1])
            if number in files:
                raise DataError(
                    f"{source}: {files[number].name} and {path.name} are the same chunk; remove one"
                )
            files[number] = path

    if not files:
        raise DataError(f"{source}: holds no chunk_<i>.jsonl and no chunk_<i>.jsonl.zst")

    numbers = sorted(files)
    if missing := sorted(set(range(numbers[0], numbers[-1])) - set(numbers)):
        listed = ", ".join(f"chunk_{i}" for i in missing[:3]) + (
            ", ..." if len(missing) > 3 else ""
        )
        raise DataError(
            f"{source}: {len(missing)} of chunk_{numbers[0]} to "
            f"chunk_{numbers[-1]} missing ({listed}); fetch them"
        )

    return {number: files[number] for number in numbers}


def _existing_import(
    output: Path, imported: Mapping[str, Any], tokenizer_hash: str, vocab_size: int, force: bool
) -> Manifest | None:
    """Manifest of `output` when it already is this import.

    Raises DataError when it must not be replaced.
    """
    if not exists_retried(output):
        return None
    complete = is_file_retried(output / MANIFEST_NAME)
    if not complete and (not is_folder_retried(output) or any(list_retried(output))):
        raise DataError(
            f"output: {output} exists and is not a data folder; name another, or move it away"
        )
    if force or not complete:
        return None
    before = read_manifest(output)

    # The same files, tokenizer and vocabulary make it the same import.
    same = (before.facts.imported, before.tokenizer_sha256, before.vocab_size)
    if same != (imported, tokenizer_hash, vocab_size):
        raise DataError(
            f"output: {output} holds other data: name another, or give --force to replace it"
        )

    check_files(before)
    return before


def _run_tasks(tasks: Sequence[ImportTask], workers: int, progress: Progress) -> list[ChunkInfo]:
    """Import the chunks that are not finished; returns the info of all, in order."""
    done = {task.name: info for task in tasks if (info := finished(task))}
    remaining = [task for task in tasks if task.name not in done]
    if remaining:
        count = min(workers, len(remaining))
        with Workers(count) as pool:
            infos = (
                map(import_chunk, remaining)
                if count == 1
                else pool.results(partial(import_chunk, task) for task in remaining)
            )
            for info in progress.track("import", infos, total=len(remaining), unit="chunk"):
                done[info.name] = info

    return [done[task.name] for task in tasks]


def _account(infos: Sequence[ChunkInfo]) -> dict[str, dict[str, int]]:
    """Tokens and samples of each subset. K2 does not report leftovers, so they are 0."""
    totals: Counter[str] = Counter()
    for info in infos:
        totals.update(info.tokens_per_subset)
    length = infos[0].tokens // infos[0].rows

    return {
        name: {
            "training_documents": tokens // length,
            "training_tokens": tokens,
            "used_samples": tokens // length,
            "used_tokens": tokens,
            "unused_tokens": 0,
            "tail_tokens": 0,
            "held_out_tokens": 0,
            "held_out_unused_tokens": 0,
        }
        for name, tokens in sorted(totals.items())
    }


def _remove(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    with suppress(OSError):
        work.parent.rmdir()
