"""Check a data folder byte for byte: `verify_data.py MANIFEST [--workers N] [--chunks chunk_003 ...]`.

MANIFEST is `manifest.json` or its folder. A line a chunk as it is done; every problem is told, on stderr, and the other
chunks are still read. Exit code 0 when all is whole, 2 when anything is not. Memory does not grow with the data. Needs
no torch, so it runs where data is stored. Stopping at the first problem is refused: who asks wants to know what to fetch.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k2train.data.chunk import Manifest, read_manifest
from k2train.data.columns import counted
from k2train.data.verify import Report, verify_chunks, verify_folder
from k2train.errors import EXIT_DONE, EXIT_USAGE, UserError

MOST_WORKERS = 4
"""By default. More at once only help where the disk reads faster than that many cores can hash."""


def line_of(report: Report, number: int, count: int) -> str:
    """What a chunk is, and how fast it was read."""
    info = report.info
    if report.problems:
        return f"{number}/{count}  {info.name}  {counted(len(report.problems), 'problem')}"
    parts = [counted(info.rows, "row"), counted(info.tokens, "token"), counted(len(info.tokens_per_subset), "subset")]
    parts.append(counted(report.pieces, "piece") if info.provenance else "no provenance")
    if info.borders:
        parts.append("borders")
    speed = report.read_bytes / max(report.seconds, 1e-9) / 1e6
    return f"{number}/{count}  {info.name}  ok  {', '.join(parts)}, {speed:,.0f} MB/s"


def run(manifest: Manifest, names: Sequence[str] | None, workers: int) -> int:
    """Check the named chunks, or all of them and what lies beside them; the exit code."""
    infos = [manifest.chunk(name) for name in dict.fromkeys(names)] if names else list(manifest.all_chunks())
    begun = time.monotonic()
    problems = damaged = tokens = read_bytes = 0
    for number, report in enumerate(verify_chunks(manifest, infos, workers), 1):
        print(line_of(report, number, len(infos)), flush=True)
        for line in report.problems:
            print(line, file=sys.stderr, flush=True)
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
    print(
        f"ok: {counted(len(infos), 'chunk')}{held_out}, {tokens:,} tokens, {read_bytes:,} bytes in {seconds:.1f} s, "
        f"{read_bytes / max(seconds, 1e-9) / 1e6:,.0f} MB/s"
    )
    return EXIT_DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="verify_data.py", description="Check a data folder byte for byte.")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="manifest.json or its folder")
    parser.add_argument("--workers", type=int, default=min(MOST_WORKERS, os.cpu_count() or 1), help="chunks at once")
    parser.add_argument("--chunks", nargs="+", metavar="CHUNK", help="only these, e.g. chunk_003 held_out")
    given = parser.parse_args(arguments)
    if given.workers < 1:
        parser.error(f"--workers ({given.workers}) must be at least 1")
    try:
        return run(read_manifest(given.manifest), given.chunks, given.workers)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
