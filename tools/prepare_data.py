"""Make a data folder of chunks from a recipe: `prepare_data.py RECIPE.yaml [dotted.key=value ...] [--force]`.

Nothing is done when the folder is already what the recipe and the documents give. All choices are keys of the recipe;
`--force`, which replaces a folder, is the only flag.
"""

import argparse
import sys
from collections.abc import Sequence

from k2train.data.prepare.build import account_table, prepare
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import load_recipe
from k2train.errors import EXIT_DONE, EXIT_USAGE, UserError


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="prepare_data.py", description="Make a data folder of chunks from a recipe.")
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the recipe, e.g. seed=7")
    parser.add_argument("--force", action="store_true", help="replace a folder prepared from something else")
    given = parser.parse_args(arguments)
    try:
        recipe = load_recipe(given.recipe, given.overrides)
        manifest, made = prepare(recipe, given.force, Progress())
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    tokens = sum(info.tokens for info in manifest.chunks)
    rows = sorted({info.rows for info in manifest.chunks})
    print("\n".join(account_table(manifest)))
    print(
        f"{'prepared' if made else 'already prepared, all hashes checked'}: {len(manifest.chunks)} chunks of "
        f"{' or '.join(map(str, rows))} rows of {manifest.sequence_length} = {tokens:,} tokens"
        f"{f', {manifest.held_out.rows} rows held out' if manifest.held_out else ''}, vocabulary {manifest.vocab_size}"
    )
    print(f"in {manifest.path} (sha256 {manifest.sha256[:16]}), tokenizer {recipe.tokenizer.model}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
