"""Merged checkpoints: a weighted sum of several checkpoints, as a checkpoint of its own.

    python tools/merge.py RUN --checkpoints 3-8 --weights mean
    python tools/merge.py RUN --checkpoints 5,6,7 --weights linear --to FOLDER
    python tools/merge.py RUN --checkpoints 6,7,OTHER/checkpoints/ckpt_007 --weights 0.25,0.25,0.5

- Checkpoints are named or numbered; a range takes the numbered ones between its ends; anything with
  a slash is a path, of any run and layout with the same model and tokenizer.
- `mean`: equal weights. `linear`: proportional to 1 to n, later ones heavier. Or a number for each;
  `--normalize` divides them by their sum, `--negative` permits numbers below 0.
- Written to RUN/merged, and recorded in the run's ledger; while the run trains, in a ledger inside
  the merged checkpoint.
- It starts a run (`run.init_from`), and can be evaluated, exported and generated from. It has no
  moments, and cannot be continued.

Exit codes: 0 done; 1 the disk refused; 2 a mistake, or a checkpoint that is not whole. One line.
"""

import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command

from k2train.checkpoint.selection import selected
from k2train.errors import EXIT_DONE
from k2train.merge.weights import Weights
from k2train.processes import peak_resident_bytes
from k2train.text import bytes_text, counted, duration


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="merge.py", description="Merge checkpoints into one.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    parser.add_argument("--checkpoints", required=True, metavar="A,B,...", help="also 3-8, paths")
    parser.add_argument("--weights", required=True, metavar="mean|linear|W,W,...")
    parser.add_argument("--normalize", action="store_true", help="divide W by their sum")
    parser.add_argument("--negative", action="store_true", help="permit W below 0")
    parser.add_argument("--to", type=Path, metavar="DIR", help="the new checkpoint")
    given = parser.parse_args(arguments)

    weights = Weights.parse(given.weights, given.normalize, given.negative)
    items = selected(given.run, given.checkpoints)
    paths = [path for item in items for path in item]
    weights.of(len(paths))

    began = time.monotonic()
    # Mistakes in names and numbers are found before torch is there.
    program = importlib.import_module("k2train.merge.program")
    done = program.merge_checkpoints(given.run, paths, weights, given.to, _show)
    for part in done.parents:
        values = "fp32 master weights" if part.values == "master" else "weights alone, no masters"
        print(f"{part.path}: step {part.step}, weight {part.weight:.6g}, {values}")
    peak = peak_resident_bytes()
    print(
        f"{done.path}: {counted(done.tensors, 'tensor')}, {bytes_text(done.num_bytes)}, root "
        f"{done.root[:16]}, {duration(time.monotonic() - began)}, peak memory {bytes_text(peak)}"
    )
    where = "its manifest alone, outside the run" if done.ledger is None else done.ledger
    print(f"recorded in {where}; start a run with run.init_from={done.path}")
    return EXIT_DONE


def _show(text: str) -> None:
    """Show progress on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text}\033[K")


if __name__ == "__main__":
    sys.exit(main())
