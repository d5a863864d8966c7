"""A start from a Hugging Face folder (`run.init_from: hf:FOLDER`): imported once, then a parent.

- Before torch, every rank reads the headers of the folder, and compares model and tokenizer with
  the config and the data.
- Rank 0 imports it into the run directory, as `RUN/imported/ckpt_000`, while the others wait. From
  there it is a stage before like any other, with hashes, and stays for the stages after.
- A start that was killed finds what an earlier one has imported.

Alternatives considered:
- Each rank reading its boxes from the folder: a second loader, without hashes.
"""

from dataclasses import replace
from pathlib import Path

from k2train.checkpoint.manifest import manifest_sha256
from k2train.errors import RunError
from k2train.hf.folder import HuggingFaceFolder
from k2train.hf.import_folder import import_folder, is_import_of
from k2train.parallel.agreement import Agreement, DiskRefused
from k2train.parallel.grid import ProcessGrid
from k2train.retry import is_folder_retried
from k2train.train.preflight import Start


def import_parent(start: Start, grid: ProcessGrid) -> Start:
    """Import the folder that a fresh start begins with; unchanged without one. Collective.

    Raises the same error on every rank: RunError when something else is where it belongs or the
    disk is full, CheckpointError when a file cannot be read.
    """
    folder, parent = start.hugging_face, start.parent
    if folder is None or parent is None or start.transition is None:
        return start

    def work() -> None:
        if grid.rank == 0:
            _import_once(folder, parent)

    Agreement(grid).do(work, lambda error: DiskRefused(f"{parent} cannot be imported ({error})"))
    transition = replace(start.transition, parent_manifest_sha256=manifest_sha256(parent))
    return replace(start, transition=transition)


def _import_once(folder: HuggingFaceFolder, path: Path) -> None:
    if not is_folder_retried(path):
        import_folder(folder, path)
    elif not is_import_of(path, folder):
        raise RunError(
            f"{path} was imported from another folder than {folder.path}, or that has changed: "
            "choose another run.name, or remove it"
        )
