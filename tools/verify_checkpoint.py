"""Checkpoint verification: every byte against the manifest, for checkpoints or whole runs.

    python tools/verify_checkpoint.py [--root] CKPT|RUN [...]

- For a run directory every checkpoint is checked; damage is reported by file and tensor.
- `--root` also recomputes the root of the training state from the values, and compares it with the
  manifest's. A state has one root in any layout.
- Needs no torch, so it works on a login node and on a machine that only stores checkpoints.

Exit codes: 0 all are whole; 2 any is not. One line each.

Alternatives considered:
- Stopping at the first bad checkpoint: then it stays unknown which others are good.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command

from k2train.checkpoint.file_digest import verify_root
from k2train.checkpoint.manifest import MANIFEST, list_checkpoints
from k2train.checkpoint.moments import why_without_moments
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import EXIT_DONE, EXIT_USAGE, CheckpointError
from k2train.text import bytes_text, counted


def checkpoints_of(path: Path) -> list[Path]:
    """Return the checkpoint itself, or all of a run directory.

    Raises CheckpointError for neither.
    """
    if (path / MANIFEST).is_file():
        return [path]
    found = list_checkpoints(path / "checkpoints")
    if found:
        return found
    if path.is_dir() and path.parent.name == "checkpoints":
        return [path]
    raise CheckpointError(f"{path} is neither a checkpoint nor a run directory with one")


def line_of(path: Path, with_root: bool = False) -> str:
    """Verify a checkpoint and describe it on one line.

    Raises CheckpointError when it is damaged, or its state has another root.
    """
    manifest = verify_checkpoint(path)
    why = why_without_moments(path, manifest)
    without = f", {why.removeprefix('was ')}" if why else ""

    root = ""
    if with_root:
        found = verify_root(path, manifest)
        root = f", root {found}" if found else ", no root to compare"
    return (
        f"{path}: whole, step {manifest.step}, {counted(manifest.total_files, 'file')}, "
        f"{bytes_text(manifest.total_bytes)}{without}{root}"
    )


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="verify_checkpoint.py", description="Check checkpoints byte for byte.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="CKPT|RUN")
    parser.add_argument(
        "--root", action="store_true", help="recompute the root of the state from the files"
    )
    options = parser.parse_args(arguments)

    code = EXIT_DONE
    for given in options.paths:
        try:
            found = checkpoints_of(given)
        except CheckpointError as error:
            print(error, file=sys.stderr)
            code = EXIT_USAGE
            continue

        for path in found:
            try:
                print(line_of(path, options.root), flush=True)
            except CheckpointError as error:
                print(error, file=sys.stderr)
                code = EXIT_USAGE
    return code


if __name__ == "__main__":
    sys.exit(main())
