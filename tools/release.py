"""Release runs: checkpoints, record, data order, evaluation and report in one folder for others.

    python tools/release.py RUN --out DIR [--checkpoints all|newest|0,2,5-8 | --every N]
    python tools/release.py STAGE1 STAGE2 --out DIR --chunks --weights-licence FILE --key FILE

- `ckpt_NNN` folders for transformers, each checked; the run's own checkpoints with the states that
  it kept; the rows of the two steps after each.
- An index of every checkpoint that was ever saved, and of everything promised: a gap is a line.
- Paths, machines and users are redacted from the record, and the index says where.
- The same command goes on after a kill. Until it is whole the folder is DIR.unfinished.

Exit codes: 0 done; 1 a check failed or the disk refused; 2 a mistake, or a run that is not whole.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from command_line import Parser, command, positive

from k2train.commands import program_text, tools_folder
from k2train.errors import EXIT_DONE, RunError
from k2train.release.branches import branches_of, require_git
from k2train.release.choice import Wanted
from k2train.release.places import LICENCES
from k2train.release.proofs import write
from k2train.release.stage import Stage, read_stage, refuse_same_names, require_folder
from k2train.retry import is_file_retried
from k2train.text import bytes_text, counted


def _parser() -> Parser:
    parser = Parser(prog="release.py", description="Release runs as one folder for others.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="stages, first one first")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoints", metavar="A,B-C", help="also all (default), newest")
    which.add_argument("--every", type=positive, metavar="N", help="every Nth, first and newest")
    parser.add_argument("--no-states", action="store_true", help="leave optimizer states out")
    parser.add_argument("--chunks", action="store_true", help="release the chunks themselves")
    parser.add_argument(
        "--data", type=Path, action="append", default=[], metavar="MANIFEST", help="if it has moved"
    )
    parser.add_argument("--tokenizer", metavar="FILE|none", help="if not in the data folder")
    parser.add_argument("--weights-licence", type=Path, metavar="FILE", help="of the weights")
    parser.add_argument("--data-licence", type=Path, metavar="FILE", help="of the data")
    parser.add_argument("--key", type=Path, metavar="FILE", help="private key that signs proofs")
    parser.add_argument("--no-proofs", action="store_true", help="leave the proofs out")
    parser.add_argument("--branches", action="store_true", help="also git, a branch for each one")
    parser.add_argument("--no-check", action="store_true", help="export without comparing")
    return parser


def _licences(weights: Path | None, data: Path | None) -> dict[str, Path]:
    """Return the licence files by what they are for. Raises RunError for one that is not there."""
    found = {"code": tools_folder().parent / LICENCES["code"]}
    if not is_file_retried(found["code"]):
        found = {}
    for what, path in (("weights", weights), ("data", data)):
        if path is not None:
            if not is_file_retried(path):
                raise RunError(f"--{what}-licence: {path} is not a file; name the licence's text")
            found[what] = path
    return found


def _prover(key: Path | None, left_out: bool) -> Callable[[Path, Sequence[Path]], list[str]] | None:
    """Return what writes proofs; None where they are left out. Raises RunError for no key file."""
    if left_out:
        return None
    if key is not None and not is_file_retried(key):
        raise RunError(f"--key: {key} is not a file; name a private key")
    return lambda folder, runs: write(folder, runs, key)


def _say(text: str) -> None:
    print(text, flush=True)


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    given = _parser().parse_args(arguments)
    require_folder(given.out)
    if given.branches:
        require_git(given.out)
    licences = _licences(given.weights_licence, given.data_licence)
    prove = _prover(given.key, given.no_proofs)
    wanted = Wanted(given.checkpoints, given.every or 1, not given.no_states)
    stages: list[Stage] = [read_stage(run, wanted, given.data) for run in given.runs]
    refuse_same_names(stages)

    # Mistakes in names and options are found before torch is there.
    program = importlib.import_module("k2train.release.release")
    checked, branches = not given.no_check, given.branches
    options = program.Options(licences, given.chunks, given.tokenizer, checked, branches)
    done = program.release(stages, given.out, options, prove, _say)

    for one in done.index.gaps:
        where = f"{one.stage}: " if one.stage else ""
        print(f"gap: {where}{one.name}: {one.reason}")
    replaced = counted(done.index.values, "value")
    print(f"redacted: {replaced} in {counted(len(done.index.redacted), 'file')}")
    if done.notes:
        print(f"proofs: {counted(len(done.notes), 'open point')}, listed in them")
    print(
        f"{done.folder}: {counted(done.files, 'file')}, {bytes_text(done.bytes)}; check it with "
        f"{program_text('verify_release')} {done.folder}"
    )
    if branches:
        print(f"{branches_of(given.out)}: git clone -b ckpt_NNN STAGE.git FOLDER")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
