"""Read-back of a checkpoint on all ranks: each verifies files of another rank, from the disk.

- Side files are read anew, too: what memory holds of them says nothing about the disk.
"""

from collections.abc import Sequence
from pathlib import Path

from k2train.checkpoint.manifest import read_manifest
from k2train.checkpoint.shards import drop_caches
from k2train.checkpoint.side_files import FileTable, side_name
from k2train.checkpoint.verify import check_folders, has_bad_block, verify_files
from k2train.errors import CheckpointError, UnavailableError
from k2train.parallel.agreement import Agreement
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import TEXT
from k2train.retry import is_passing


def read_back(
    path: Path, folders: Sequence[str], grid: ProcessGrid, agreement: Agreement
) -> tuple[str | None, str | None]:
    """Verify the files of `folders` on all ranks, every piece of them; collective.

    Returns what is wrong, and why somebody could not look; None for nothing.
    """
    text, away = _check_share(path, folders, grid)
    problem = agreement.lowest(None if away else text or None, TEXT)
    hidden = agreement.lowest(text if away else None, TEXT)
    return (None if problem is None else problem[1]), (None if hidden is None else hidden[1])


def _check_share(path: Path, folders: Sequence[str], grid: ProcessGrid) -> tuple[str, bool]:
    """Verify the files that the next rank wrote: what is wrong ("" for nothing), and whether that
    is only that nobody can read them for now.

    On a cluster a rank's own files may still be in its node's memory.
    """
    rank, world_size = grid.rank, grid.layout.world_size
    try:
        manifest = read_manifest(path, fresh=True)
        table = FileTable(path, manifest, fresh=True)
        share = table.shares(folders, (rank + 1) % world_size, world_size)
        # The list of all files is long for a large world: one rank compares it.
        if rank == 0:
            check_folders(path, manifest, table)
        drop_caches(path, [*share, *map(side_name, share)])
        verify_files(path, manifest, share, fresh=True)
    except CheckpointError as error:
        return str(error), False
    except UnavailableError as error:
        return str(error), not has_bad_block(error, path)
    except OSError as error:
        return f"{path} cannot be read back ({error.strerror or error})", is_passing(error)

    return "", False
