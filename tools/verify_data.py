"""Data folder verification: every byte of every chunk, and the files beside them.

    python tools/verify_data.py MANIFEST [--workers N] [--chunks 3 chunk_007 held_out ...]
    python tools/verify_data.py MANIFEST --against EARLIER_MANIFEST

- MANIFEST is `manifest.json` or its folder.
- One line per chunk as it is done; every problem on stderr. Later chunks are still read.
- With `--against` it compares the texts of two folders instead, all of them; a start of a stage
  compares a sample.
- Memory does not grow with the data. Needs no torch, so it runs where data is stored.

Exit codes: 0 all is whole; 2 anything is not, also when the reader of the output has gone (`|
head`).

Alternatives considered:
- Stopping at the first problem: then it stays unknown which other files must be fetched.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command

from k2train.data.chunk import Manifest, read_manifest
from k2train.data.inspect.provenance import find_chunk
from k2train.data.manifest import MANIFEST_NAME
from k2train.data.text_record import exact_overlap, open_texts
from k2train.data.verify.chunks import Report, verify_chunks
from k2train.data.verify.folder import verify_folder
from k2train.errors import EXIT_DONE, EXIT_USAGE, DataError
from k2train.text import bytes_text, counted

MOST_WORKERS = 4
"""Default limit. More help only where the disk reads faster than that many cores can hash."""
SHORTEST_SECONDS = 0.1
"""A rate over a shorter time means nothing."""


def rate(read_bytes: int, seconds: float) -> str:
    """Format a rate as `, 812.00 MiB/s`; empty where it would mean nothing."""
    speed = read_bytes / max(seconds, SHORTEST_SECONDS)
    return f", {bytes_text(speed)}/s" if seconds >= SHORTEST_SECONDS and speed >= 2**20 else ""


def line_of(report: Report, number: int, count: int) -> str:
    """Describe a chunk and its reading rate on one line."""
    info = report.info
    if report.problems:
        return f"{number}/{count}  {info.name}  {counted(len(report.problems), 'problem')}"

    parts = [
        counted(info.rows, "row"),
        counted(info.tokens, "token"),
        counted(len(info.tokens_per_subset), "subset"),
    ]
    parts.append(counted(report.pieces, "piece") if info.provenance else "no provenance")
    if info.borders:
        parts.append("borders")
    if info.targets is not None:
        parts.append(f"{counted(info.targets, 'target')} of its loss mask")
    return (
        f"{number}/{count}  {info.name}  ok  "
        f"{', '.join(parts)}{rate(report.read_bytes, report.seconds)}"
    )


def run(manifest: Manifest, names: Sequence[str] | None, workers: int) -> int:
    """Verify the named chunks, or the whole folder; return the exit code."""
    infos = list(manifest.all_chunks())
    if names:
        infos = list(
            {info.name: info for info in (find_chunk(manifest, name) for name in names)}.values()
        )

    begun = time.monotonic()
    problems = damaged = tokens = read_bytes = 0

    for number, report in enumerate(verify_chunks(manifest, infos, workers), 1):
        print(line_of(report, number, len(infos)), flush=True)
        for line in report.problems:
            print(line, file=sys.stderr)
        problems += len(report.problems)
        damaged += bool(report.problems)
        tokens += report.info.tokens
        read_bytes += report.read_bytes

    for line in (beside := verify_folder(manifest)):
        print(line, file=sys.stderr)

    seconds = time.monotonic() - begun
    if problems or beside:
        total = counted(problems + len(beside), "problem")
        print(f"{total}, {damaged} of {counted(len(infos), 'chunk')} damaged", file=sys.stderr)
        return EXIT_USAGE

    held_out = ", one held out" if manifest.held_out in infos else ""
    took = f"{seconds:,.1f} s" if seconds >= SHORTEST_SECONDS else f"{1000 * seconds:.0f} ms"
    print(
        f"ok: {counted(len(infos), 'chunk')}{held_out}, {counted(tokens, 'token')}, {read_bytes:,} "
        f"bytes in {took}{rate(read_bytes, seconds)}"
    )
    return EXIT_DONE


def compare(earlier: Manifest, later: Manifest) -> int:
    """Compare all texts of two folders; return the exit code. Raises DataError without a record."""
    records = []
    for manifest in (earlier, later):
        if (record := open_texts(manifest)) is None:
            raise DataError(
                f"{manifest.path}: has no record of its texts: it was made by an older version, or "
                "imported; prepare it again"
            )
        records.append(record)

    overlap = exact_overlap(records[0], records[1])
    line = f"{later.path} shares {overlap.message} with {earlier.path}"
    print(line, file=sys.stderr if overlap.shared else sys.stdout)
    return EXIT_USAGE if overlap.shared else EXIT_DONE


def open_manifest(path: Path) -> Manifest:
    """Read the manifest of the command line.

    Raises DataError; for another kind of file it says so, instead of calling it a damaged manifest.
    """
    other = DataError(
        f"{path}: is not a manifest; give the {MANIFEST_NAME} of a data folder, or the folder "
        "itself"
    )
    named = path.name == MANIFEST_NAME or not path.is_file()
    if not named and not _first_bytes(path).lstrip().startswith(b"{"):
        # A chunk given by mistake has gigabytes, and would be read whole before failing as JSON.
        raise other

    try:
        return read_manifest(path)
    except DataError:
        if not named and b'"chunks"' not in path.read_bytes():
            raise other from None
        raise


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(256)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="verify_data", description="Check a data folder byte for byte.")
    parser.add_argument(
        "manifest", type=Path, metavar="MANIFEST", help="manifest.json or its folder"
    )
    parser.add_argument(
        "--workers", type=int, default=min(MOST_WORKERS, os.cpu_count() or 1), help="chunks at once"
    )
    parser.add_argument(
        "--chunks",
        nargs="+",
        metavar="C",
        help="only these, by number or name: 3 chunk_007 held_out",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="EARLIER",
        help="compare all texts with those of this data folder, and nothing else",
    )
    given = parser.parse_args(arguments)
    if given.workers < 1:
        parser.error(f"--workers ({given.workers}) must be at least 1")
    if given.against is not None:
        return compare(open_manifest(given.against), open_manifest(given.manifest))
    return run(open_manifest(given.manifest), given.chunks, given.workers)


if __name__ == "__main__":
    sys.exit(main())
