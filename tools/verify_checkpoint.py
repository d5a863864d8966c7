"""Check checkpoints byte for byte against their manifests: `python tools/verify_checkpoint.py [--root] CKPT|RUN [...]`.

Of a run directory every checkpoint is checked; damage is told by file and tensor. `--root` also makes the root of the
training state again from the values, and compares it with the manifest's: a state has one root, whatever the layout.
One line each; exit code 0 when all are whole, 2 when any is not. Needs no torch, so it works on a login node and on a
machine that only stores checkpoints. Stopping at the first bad one is refused: who asks wants to know which are good.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k2train.checkpoint.file_digest import verify_root
from k2train.checkpoint.manifest import MANIFEST, is_thinned, list_checkpoints, verify_checkpoint
from k2train.errors import EXIT_DONE, EXIT_USAGE, CheckpointError


def checkpoints_of(path: Path) -> list[Path]:
    """The checkpoint itself, or all of a run directory. Raises CheckpointError when it is neither."""
    if (path / MANIFEST).is_file():
        return [path]
    found = list_checkpoints(path / "checkpoints")
    if found:
        return found
    if path.is_dir() and path.parent.name == "checkpoints":
        return [path]
    raise CheckpointError(f"{path} is neither a checkpoint nor a run directory with one")


def line_of(path: Path, with_root: bool = False) -> str:
    """What a whole checkpoint is. Raises CheckpointError when it is not whole, or its state's root is another."""
    manifest = verify_checkpoint(path)
    total_bytes = sum(int(facts["bytes"]) for facts in manifest["files"].values())
    thinned = ", thinned to its weights" if is_thinned(path) else ""
    root = ""
    if with_root:
        found = verify_root(path, manifest)
        root = f", root {found}" if found else ", no root to compare"
    return f"{path}: whole, step {manifest['step']}, {len(manifest['files'])} files, {total_bytes} bytes{thinned}{root}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="verify_checkpoint.py", description="Check checkpoints byte for byte."
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="CKPT|RUN")
    parser.add_argument(
        "--root", action="store_true", help="make the root of the state again from the files"
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
