"""Prepare training data: make a data folder of chunks from a recipe, or convert K2's chunk files.

    prepare_data.py RECIPE.yaml [dotted.key=value ...] [--force | --estimate] [--account]
    prepare_data.py --from-k2 FOLDER --output FOLDER [--tokenizer MODEL] [--vocab-size N]
                    [--workers N] [--force] [--account]
    prepare_data.py --to-k2 FOLDER MANIFEST

- Does nothing when the folder already is what the recipe and the documents give.
- Resumes an interrupted preparation by the same command.
- Every choice that affects bytes is a key of the recipe, not an option of this command.
- `--account` prints the tables of tokens, documents and samples, as `tools/inspect_data.py` does.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command

from k2train.commands import program_text
from k2train.data.inspect.account import account_facts, held_out_notes
from k2train.data.inspect.left_out import left_out_lines
from k2train.data.inspect.text import View, render
from k2train.data.manifest import Manifest, read_manifest
from k2train.data.prepare.k2_format.export_folder import export_k2
from k2train.data.prepare.k2_format.import_folder import import_k2
from k2train.data.prepare.load_recipe import load_recipe
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.run.estimate import cost, estimate_lines, measure
from k2train.data.prepare.run.pipeline import prepare
from k2train.errors import EXIT_DONE, ConfigError, DataError
from k2train.text import counted, span_text


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; raises ConfigError for options that do not go together."""
    parser = Parser(prog="prepare_data.py", description="Make a data folder of chunks.")
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE.yaml", help="with --to-k2: the manifest to export"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted keys of the recipe, e.g. seed=7"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="start over, and replace a folder made of something else",
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="print what the recipe would cost, from rates measured now",
    )
    parser.add_argument(
        "--account",
        action="store_true",
        help="print the account of the data: tokens, documents and samples of every subset",
    )
    parser.add_argument(
        "--from-k2", type=Path, metavar="FOLDER", help="import chunk_<i>.jsonl files"
    )
    parser.add_argument(
        "--to-k2", type=Path, metavar="FOLDER", help="write a data folder as chunk_<i>.jsonl files"
    )
    parser.add_argument("--output", type=Path, help="with --from-k2: the data folder to make")
    parser.add_argument(
        "--tokenizer", type=Path, help="with --from-k2: the model the ids belong to"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=32032, help="with --from-k2: ids are below it (32032)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="with --from-k2: files imported at once (1)"
    )
    options = parser.parse_intermixed_args(arguments)

    if options.from_k2 is not None and (options.output is None or options.recipe is not None):
        raise ConfigError("--from-k2 FOLDER takes --output FOLDER, and no recipe")
    if options.from_k2 is None and options.recipe is None:
        raise ConfigError(
            "give a recipe, or --from-k2 FOLDER --output FOLDER, or --to-k2 FOLDER MANIFEST "
            "(--help)"
        )
    if options.account and (options.estimate or options.to_k2 is not None):
        raise ConfigError("--account needs a data folder that is made; not --estimate or --to-k2")
    return options


def run(options: argparse.Namespace, progress: Progress) -> None:
    """Import, export, estimate or prepare, and print a summary."""
    if options.from_k2 is not None:
        manifest = import_k2(
            options.from_k2,
            options.output,
            vocab_size=options.vocab_size,
            tokenizer=options.tokenizer,
            workers=options.workers,
            force=options.force,
            progress=progress,
        )
        show(manifest, "imported", options.account)

    elif options.to_k2 is not None:
        files = export_k2(read_manifest(options.recipe), options.to_k2, progress)
        print(f"written: {counted(len(files), 'file')} in {options.to_k2}")

    elif options.estimate:
        recipe = load_recipe(options.recipe, options.overrides)
        rates = measure(recipe, progress)
        print("\n".join(estimate_lines(recipe, rates, cost(recipe, rates))))

    else:
        recipe = load_recipe(options.recipe, options.overrides)
        manifest, made = prepare(recipe, options.force, progress)
        result = "prepared" if made else "already prepared, all hashes checked"
        if made:
            notes = [f"note: {note}" for note in held_out_notes(manifest.facts.account or {})]
            # The account has these notes, too.
            lines = [*left_out_lines(manifest), *([] if options.account else notes)]
            print("".join(f"{line}\n" for line in lines), end="")
        show(manifest, result, options.account, tokenizer=str(recipe.tokenizer.model))


def show(manifest: Manifest, result: str, account: bool, tokenizer: str = "") -> None:
    """Print the summary of a data folder, after its account if asked for."""
    if account:
        print("\n".join(render(account_facts(manifest), View())))
    print("\n".join(summary(manifest, result, tokenizer)))
    if not account:
        folder = shlex.quote(str(manifest.folder))
        print(f"{program_text('inspect_data')} {folder} shows the account")


def summary(manifest: Manifest, result: str, tokenizer: str = "") -> list[str]:
    """Format what was made, and where it is."""
    tokens = sum(info.tokens for info in manifest.chunks)
    rows = sorted({info.rows for info in manifest.chunks})
    held_out = f", {counted(manifest.held_out.rows, 'row')} held out" if manifest.held_out else ""
    return [
        f"{result}: {counted(len(manifest.chunks), 'chunk')} of "
        f"{span_text(rows[0], rows[-1])} rows of {manifest.sequence_length} = {tokens:,} "
        f"tokens{held_out}, vocabulary {manifest.vocab_size:,}",
        f"in {manifest.path} (sha256 {manifest.sha256[:16]})"
        + (f", tokenizer {tokenizer}" if tokenizer else ""),
    ]


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    try:
        run(parse(arguments), Progress(sys.stderr))
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        raise DataError(
            f"{path}{error.strerror or error}; make it writable, or name another output or work"
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("run the same command again to continue") from None
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
