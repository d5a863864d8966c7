"""Check checkpoints byte for byte against their manifests: `python tools/verify_checkpoint.py CKPT|RUN [...]`.

Of a run directory every checkpoint is checked. One line each; exit code 0 when all are whole, 2 when any is not. Needs no
torch, so it works on a login node and on a machine that only stores checkpoints. Stopping at the first bad one is
refused: who asks wants to know which are good.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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


def line_of(path: Path) -> str:
    """What a whole checkpoint is. Raises CheckpointError when it is not whole."""
    manifest = verify_checkpoint(path)
    total_bytes = sum(int(facts["bytes"]) for facts in manifest["files"].values())
    thinned = ", thinned to its weights" if is_thinned(path) else ""
    return f"{path}: whole, step {manifest['step']}, {len(manifest['files'])} files, {total_bytes} bytes{thinned}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="verify_checkpoint.py", description="Check checkpoints byte for byte.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="CKPT|RUN")
    code = EXIT_DONE
    for given in parser.parse_args(arguments).paths:
        try:
            found = checkpoints_of(given)
        except CheckpointError as error:
            print(error, file=sys.stderr)
            code = EXIT_USAGE
            continue
        for path in found:
            try:
                print(line_of(path), flush=True)
            except CheckpointError as error:
                print(error, file=sys.stderr)
                code = EXIT_USAGE
    return code


if __name__ == "__main__":
    sys.exit(main())
