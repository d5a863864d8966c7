"""Make a data folder of chunks from a recipe, or from K2's own chunk files, or give it back as those.

    prepare_data.py RECIPE.yaml [dotted.key=value ...] [--force | --estimate]
    prepare_data.py --from-k2 FOLDER --output FOLDER [--tokenizer MODEL] [--vocab-size N] [--workers N] [--force]
    prepare_data.py --to-k2 FOLDER MANIFEST

Nothing is done when the folder is already what the recipe and the documents give, and a preparation that was killed is
gone on with by the same command. All choices that decide bytes are keys of the recipe.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from k2train.data.inspect.account import account_facts
from k2train.data.inspect.text import View, render
from k2train.data.manifest import Manifest, read_manifest
from k2train.data.prepare.k2_format.convert import export_k2, import_k2
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import load_recipe
from k2train.data.prepare.run.estimate import cost, estimate_lines, measure
from k2train.data.prepare.run.pipeline import prepare
from k2train.errors import EXIT_DONE, EXIT_USAGE, ConfigError, UserError
from k2train.text import counted


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare_data.py", description="Make a data folder of chunks."
    )
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE.yaml", help="with --to-k2: the manifest to give back"
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
        "--estimate", action="store_true", help="say what the recipe costs, from rates measured now"
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
    given = parser.parse_intermixed_args(arguments)
    if given.from_k2 is not None and (given.output is None or given.recipe is not None):
        raise ConfigError("--from-k2 FOLDER takes --output FOLDER, and no recipe")
    if given.from_k2 is None and given.recipe is None:
        raise ConfigError(
            "give a recipe, or --from-k2 FOLDER --output FOLDER, or --to-k2 FOLDER MANIFEST (--help)"
        )
    return given


def run(given: argparse.Namespace, progress: Progress) -> None:
    if given.from_k2 is not None:
        manifest = import_k2(
            given.from_k2,
            given.output,
            vocab_size=given.vocab_size,
            tokenizer=given.tokenizer,
            workers=given.workers,
            force=given.force,
            progress=progress,
        )
        print("\n".join(summary(manifest, "imported")))
    elif given.to_k2 is not None:
        files = export_k2(read_manifest(given.recipe), given.to_k2, progress)
        print(f"written: {len(files)} files in {given.to_k2}")
    elif given.estimate:
        recipe = load_recipe(given.recipe, given.overrides)
        rates = measure(recipe, progress)
        print("\n".join(estimate_lines(recipe, rates, cost(recipe, rates))))
    else:
        recipe = load_recipe(given.recipe, given.overrides)
        manifest, made = prepare(recipe, given.force, progress)
        print("\n".join(render(account_facts(manifest), View())))
        print(
            "\n".join(
                summary(manifest, "prepared" if made else "already prepared, all hashes checked")
            )
        )
        print(f"tokenizer {recipe.tokenizer.model}")


def summary(manifest: Manifest, what: str) -> list[str]:
    """What was made, and where it lies."""
    tokens = sum(info.tokens for info in manifest.chunks)
    rows = sorted({info.rows for info in manifest.chunks})
    shown = f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
    return [
        f"{what}: {counted(len(manifest.chunks), 'chunk')} of {shown} rows of {manifest.sequence_length} = {tokens:,} tokens"
        f"{f', {manifest.held_out.rows:,} rows held out' if manifest.held_out else ''}, vocabulary {manifest.vocab_size}",
        f"in {manifest.path} (sha256 {manifest.sha256[:16]})",
    ]


def main(arguments: Sequence[str]) -> int:
    try:
        run(parse(arguments), Progress())
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"{where}{error.strerror or error}; make it writable, or name another output or work",
            file=sys.stderr,
        )
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
