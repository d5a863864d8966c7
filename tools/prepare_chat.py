"""Prepare chat data: conversations to a data folder with loss masks, for fine-tuning.

    prepare_chat.py INPUT... --to FOLDER --tokenizer RUN_OR_DATA_OR_FILE --sequence-length N
                    [--template k2|FILE.jinja] [--learn responses|all] [--chunks N] [--epochs N]
                    [--held-out ROWS] [--system TEXT] [--special NAME] [--seed S] [--force]

- INPUT is a file or pattern of JSON lines or Parquet, compressed or not, or `stdlib`: questions
  about Python's standard library, for the demo.
- Does nothing when the folder already is what would be made.
- What is left out is counted, shown, and listed in FOLDER/rejected.jsonl.

Exit codes: 0 done; 1 the disk refused; 2 a mistake in usage or input. One line.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command, positive

from k2train.chat.prepare import ChatPreparation, ChatSettings
from k2train.data.prepare.progress import Progress
from k2train.errors import EXIT_DONE, ConfigError, DataError, UnavailableError
from k2train.retry import is_passing, reason
from k2train.text import counted


def _parser() -> Parser:
    parser = Parser(prog="prepare_chat.py", description="Make a data folder of conversations.")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, pattern or stdlib")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="of a run, checkpoint, data or a file",
    )
    parser.add_argument(
        "--sequence-length", type=positive, required=True, metavar="N", help="tokens of a row"
    )
    parser.add_argument("--template", default="k2", help="k2 (default), or a file of Jinja")
    parser.add_argument(
        "--learn", choices=("responses", "all"), default="responses", help="tokens to learn"
    )
    parser.add_argument("--chunks", type=positive, default=1, help="chunks to make (1)")
    parser.add_argument(
        "--epochs", type=positive, default=1, help="times that each conversation is used (1)"
    )
    parser.add_argument(
        "--held-out", type=int, default=0, metavar="ROWS", help="rows kept for evaluation (0)"
    )
    parser.add_argument("--system", default="", help="system prompt where there is none")
    parser.add_argument(
        "--special", action="append", default=[], help="control token that the template needs"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the order of conversations (1)")
    parser.add_argument("--force", action="store_true", help="replace a folder of other data")
    return parser


def settings_of(options: argparse.Namespace) -> ChatSettings:
    """Return the settings of a command line; raises ConfigError."""
    if options.held_out < 0:
        raise ConfigError(f"--held-out ({options.held_out}) must be at least 0, which is none")
    if not -(2**63) <= options.seed < 2**63:
        raise ConfigError(f"--seed ({options.seed}) must be a number of 64 bits")
    for name in options.special:
        if not name.strip():
            raise ConfigError(
                f"--special {name!r} is empty; name a control token that the template writes"
            )
    return ChatSettings(
        inputs=tuple(options.inputs),
        output=options.to,
        tokenizer=options.tokenizer,
        sequence_length=options.sequence_length,
        template=options.template,
        learn=options.learn,
        chunks=options.chunks,
        epochs=options.epochs,
        held_out_rows=options.held_out,
        system=options.system,
        specials=tuple(options.special),
        seed=options.seed,
    )


def run(options: argparse.Namespace, progress: Progress) -> None:
    """Prepare, and print what became of the conversations."""
    settings = settings_of(options)
    preparation = ChatPreparation(settings, progress)
    for note in preparation.encoder.notes:
        print(f"note: {note}")
    manifest, made = preparation.run(options.force)
    if made:
        print("\n".join(preparation.account.lines(settings.sequence_length)))
    tokens = sum(info.tokens for info in manifest.chunks)
    print(
        f"{'prepared' if made else 'already prepared, all hashes checked'}: "
        f"{counted(len(manifest.chunks), 'chunk')}, {tokens:,} tokens, vocabulary "
        f"{manifest.vocab_size:,}, in {manifest.path} (sha256 {manifest.sha256[:16]})"
    )


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        run(options, Progress(sys.stderr))
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        if is_passing(error):
            raise UnavailableError(
                f"{path}{reason(error, error.filename or options.to)}; nothing is half done: free "
                "space, or name a folder on another disk with --to"
            ) from None
        raise DataError(
            f"{path}{error.strerror or error}; make it writable, or name another folder with --to"
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing is half done; run the same command again") from None
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
