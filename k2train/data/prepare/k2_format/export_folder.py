"""Export of a data folder as K2's chunk files, `chunk_<i>.jsonl`."""

import os
import re
import shutil
from pathlib import Path

from k2train.data.chunk import ChunkInfo, Manifest
from k2train.data.prepare.k2_format.chunk import export_chunk
from k2train.data.prepare.k2_format.provenance import count_pieces
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.write.provenance import require_pyarrow
from k2train.errors import DataError
from k2train.files import sync_directory, write_synced
from k2train.retry import exists_retried, is_file_retried, is_folder_retried, list_retried
from k2train.text import counted


def export_k2(
    manifest: Manifest, destination: Path, progress: Progress | None = None
) -> list[Path]:
    """Write `chunk_<i>.jsonl` for each training chunk.

    - An imported folder gives back the lines it was imported from.
    - A row of several documents gets source and name of the first; see `ProvenanceReader`.
    - Every chunk is verified byte for byte before it is written.
    - The folder appears only when it is complete. The next export of the same data reuses what a
      killed one finished.
    - The held-out chunk is not exported, since K2 has none. `progress` logs what such files cannot
      hold.

    Raises DataError for a damaged chunk, missing provenance, a chunk without a number, and a
    destination that is not empty.
    """
    require_pyarrow()
    progress = progress or Progress(None)

    files: dict[str, ChunkInfo] = {}
    for info in manifest.chunks:
        found = re.fullmatch(r"chunk_(\d+)", info.name)
        if found is None or info.provenance is None:
            problem = (
                "its name has no number: chunk_<i>" if found is None else "it has no provenance"
            )
            raise DataError(f"{manifest.path}: {info.name} cannot be exported: {problem}")
        files[f"chunk_{int(found[1])}.jsonl"] = info

    if exists_retried(destination) and (
        not is_folder_retried(destination) or any(list_retried(destination))
    ):
        raise DataError(
            f"{destination}: exists already, and an export never overwrites; name another folder"
        )

    temporary = destination.with_name(destination.name + ".tmp")
    mark = temporary / "of_manifest"
    # Files of a killed export are reused for the same manifest only.
    if exists_retried(temporary) and not (
        is_file_retried(mark) and mark.read_text("ascii") == manifest.sha256
    ):
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True, exist_ok=True)
    write_synced(mark, manifest.sha256)
    remaining = [
        (name, info) for name, info in files.items() if not is_file_retried(temporary / name)
    ]
    for name, info in progress.track("export", remaining, unit="chunk"):
        export_chunk(manifest, info, temporary / name)
    for path in list_retried(temporary):
        if path.name not in files:
            path.unlink()

    os.replace(temporary, destination)
    sync_directory(destination.parent)
    if missing := _not_exported(manifest):
        progress.log(f"not exported: {', '.join(missing)}")

    return [destination / name for name in files]


def _not_exported(manifest: Manifest) -> list[str]:
    """Descriptions of data that K2's files cannot hold."""
    pieces = sum(count_pieces(manifest.folder / str(info.provenance)) for info in manifest.chunks)
    inner_pieces = pieces - sum(info.rows for info in manifest.chunks)
    missing = []
    if inner_pieces:
        missing.append(
            f"the sources of {inner_pieces:,} of {pieces:,} pieces "
            "(a line names the document its row begins with)"
        )

    if manifest.held_out is not None:
        missing.append(f"{manifest.held_out.name} ({counted(manifest.held_out.rows, 'row')})")
    if any(info.borders is not None for info in manifest.chunks):
        missing.append("the document borders")
    if manifest.has_masks:
        missing.append("the loss masks")
    return missing
