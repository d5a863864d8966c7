"""Ownership of a release that is being written: one process, and what it was asked for.

- `NOT_WHOLE` lists what was asked for. A later start that asks for less is refused: files of the
  first one, such as chunks, would be released unasked.

Alternatives considered:
- Removing what is not asked for now: a mistyped option would cost hours of exports.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from k2train.errors import RunError
from k2train.files import NO_LOCKS, write_synced
from k2train.release.places import INDEX, NOT_WHOLE, PROOFS, SUMS
from k2train.retry import is_file_retried, list_retried
from k2train.safe_json import read_json, read_plain_file

NOT_WHOLE_TEXT = (
    "This release is not whole: it is being written, or was stopped. The command that began it "
    "goes on. Asked for:"
)
MODEL = " for transformers"
"""End of the name of a model in the index."""


@contextmanager
def own(temporary: Path, asked: Iterable[str]) -> Iterator[None]:
    """Make the folder, say that it is not whole, and keep others out of it.

    Raises RunError where it holds what is not asked for, or another process writes it; OSError.
    """
    temporary.mkdir(exist_ok=True)
    descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{temporary} is being written by another release: wait for it, or name another "
                "folder"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        _refuse_more(temporary, asked)
        write_synced(temporary / NOT_WHOLE, "\n".join([NOT_WHOLE_TEXT, *sorted(asked), ""]))
        with suppress(FileNotFoundError):
            os.unlink(temporary / SUMS)
        for name in (PROOFS, f"{PROOFS}.tmp"):
            shutil.rmtree(temporary / name, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def _refuse_more(temporary: Path, asked: Iterable[str]) -> None:
    """Raise RunError where an earlier start may have written what is not asked for now."""
    # A kill may leave half of NOT_WHOLE itself.
    if all(path.suffix == ".tmp" for path in list_retried(temporary)):
        return
    try:
        if is_file_retried(temporary / NOT_WHOLE):
            before = read_plain_file(temporary / NOT_WHOLE).decode().splitlines()[1:]
        elif is_file_retried(temporary / SUMS):
            before = sorted(_asked_before_proofs(temporary))
        else:
            raise RunError(
                f"{temporary} has files and no {NOT_WHOLE}, which says what they are of; remove "
                "that folder, then start again"
            )
    except RunError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{temporary} cannot be read ({error}); remove it") from None
    if more := sorted(set(before) - set(asked)):
        raise RunError(
            f"{temporary} was begun with {more[0]}, which is not asked for now: ask for it, too, "
            "or remove that folder"
        )


def _asked_before_proofs(temporary: Path) -> Iterator[str]:
    """Yield what a start was asked for that was killed while it wrote the proofs.

    They cover all files, so `NOT_WHOLE` is gone by then, and the index tells.
    """
    for one in read_json(temporary / INDEX)["artefacts"]:
        name, stage = one["name"], one["stage"]
        if one["place"] is None:
            continue
        if name.endswith(MODEL):
            yield f"{stage}/{name.removesuffix(MODEL)}"
        elif name.startswith("optimizer states of "):
            yield f"optimizer states of {stage}"
        elif name.startswith("licence of "):
            yield f"the {name}"
        elif name == "chunks":
            yield "the chunks (--chunks)"
