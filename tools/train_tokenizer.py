"""Tokenizer training on text files: an even sample of their texts, then sentencepiece BPE.

    python tools/train_tokenizer.py OUTPUT.model --vocab-size 32000 FILES_OR_GLOBS...
                                    [--text-key text ...] [--max-bytes N]

- Reads .txt, .md, .py, .jsonl and .json (an object a line), each also compressed (gzip, zstd,
  bzip2, xz), and .parquet, with the readers of `prepare_data.py`.
- With several text keys, the first that is text is taken; `meta.body` is a nested one.
- Trains on at most --max-bytes of text, because training needs about 13 times its text in memory.
  Of more, an even sample is taken, equal on every machine and for any order of files.
- Text that cannot be read is counted and left out.

Alternatives considered:
- Readers of its own: a file was read by one command and refused by the other.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path, PurePath

from command_line import Parser, command

from k2train.data.prepare.containers import plain_name
from k2train.data.prepare.encode.training_sample import TrainingSample
from k2train.data.prepare.field_keys import named
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import SubsetRecipe
from k2train.data.prepare.source import Source
from k2train.data.prepare.sources.file_patterns import matching_paths
from k2train.data.prepare.sources.listing import REMOTE, remote_problem
from k2train.data.prepare.sources.recognize import check_files
from k2train.data.tokenizer import Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.errors import EXIT_DONE, DataError, UserError
from k2train.text import counted

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
"""Kind of a file by its suffix, that of its compression left out."""
SUPPORTED = f"{' '.join(KINDS)} (each but .parquet also compressed)"
DEFAULT_MAX_BYTES = 100_000_000


def kind_of(name: str) -> str | None:
    """Kind of a file by its name; None for any other file."""
    return KINDS.get(PurePath(plain_name(name)).suffix.lower())


def files_of(patterns: Sequence[str]) -> list[tuple[str, Path]]:
    """List (name, path) of every file, sorted by name: its path below the common folder.

    Raises DataError for a pattern without files, a folder, an address, an unsupported kind of
    file, and for files that are not what their names say.
    """
    found: set[str] = set()
    for pattern in patterns:
        if REMOTE.match(pattern):
            raise DataError(remote_problem(pattern))
        matches = [Path(pattern)] if os.path.exists(pattern) else matching_paths(pattern)
        files = [match for match in matches if match.is_file()]

        if not files:
            hint = (
                f" but a folder; give a pattern, as {pattern.rstrip('/')}/**/*.txt"
                if matches
                else ""
            )
            raise DataError(f"{pattern}: no file{hint}")

        for file in files:
            if kind_of(file.name) is None:
                raise DataError(f"{file}: unsupported kind of file; supported: {SUPPORTED}")
            found.add(os.path.realpath(file))

    check_files([(path, str(kind_of(path)), "") for path in sorted(found)])
    # Names are relative, so that the order is the same on every machine.
    common = os.path.commonpath([os.path.dirname(path) for path in found])
    return sorted((Path(path).relative_to(common).as_posix(), Path(path)) for path in found)


def read_sample(
    files: Sequence[tuple[str, Path]], keys: Sequence[str], max_bytes: int
) -> TrainingSample:
    """Read every file once and sample its texts.

    Raises DataError for a file that cannot be read, and when no text is found.
    """
    sample = TrainingSample(max_bytes)
    for name, path in Progress(sys.stderr).track("read", files, unit="file"):
        subset = SubsetRecipe.model_validate(
            {"kind": kind_of(name), "paths": [str(path)], "text_key": tuple(keys)}
        )
        sample.read(subset, Source("", name, str(path), path.stat().st_size))

    if sample.blocks and not sample.kept_bytes:
        raise DataError(
            f"--max-bytes ({max_bytes}) is less than any of {counted(sample.blocks, 'block')} of "
            "text: raise it"
        )
    if not sample.kept_bytes:
        raise DataError(
            f"no text to train on in {counted(len(files), 'file')} (--text-key {named(keys)})"
            + "".join(f"; {line}" for line in sample.report()[1:])
        )
    return sample


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str], text_bytes: int) -> float:
    """UTF-8 bytes per token over `texts`."""
    return text_bytes / sum(len(ids) for text in texts for ids in tokenizer.encode_arrays([text]))


def train(given: argparse.Namespace) -> None:
    """Train and save the tokenizer, and print a report. Raises UserError."""
    output: Path = given.output
    if output.exists() and not given.force:
        raise UserError(
            f"{output}: exists; --force replaces it, and data prepared with it then has no "
            "tokenizer"
        )

    begun = time.monotonic()
    files = files_of(given.files)
    sample = read_sample(files, given.text_key, given.max_bytes)
    texts = sample.texts()

    print(
        f"read {counted(len(files), 'file')}, {sample.seen_bytes:,} bytes of text in "
        f"{counted(sample.documents, 'document')}"
    )
    print("\n".join(sample.report()), flush=True)

    try:
        tokenizer = train_tokenizer(texts, given.vocab_size)
        tokenizer.save(output)
    except DataError as error:
        raise DataError(str(error).replace("tokenizer.train.vocab_size", "--vocab-size")) from None
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None

    ratio = bytes_per_token(tokenizer, texts, sample.kept_bytes)
    print(
        f"{output}: {tokenizer.base_size:,} pieces, then {len(tokenizer.specials)} special tokens"
    )
    print(
        f"{ratio:.3f} bytes per token on its training text, {time.monotonic() - begun:.1f} s in all"
    )
    print(
        f"sha256 {tokenizer.sha256} (the pieces and the special tokens: the tokenizer_sha256 of a "
        "manifest)"
    )


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the command line; exits with one line on an error."""
    parser = Parser(prog="train_tokenizer", description="Train a tokenizer on files.")
    add = parser.add_argument
    add("output", metavar="OUTPUT.model", type=Path)
    add(
        "files",
        nargs="+",
        metavar="FILE_OR_GLOB",
        help=f"kinds: {SUPPORTED}; ** matches subfolders; before --text-key",
    )
    add(
        "--vocab-size", type=int, required=True, help="number of pieces, without the special tokens"
    )
    add(
        "--text-key",
        nargs="+",
        action="extend",
        help="keys or columns of the text; the first that exists is used (text)",
    )
    add(
        "--max-bytes",
        type=int,
        default=DEFAULT_MAX_BYTES,
        help="bytes of text to train on; of more, a sample",
    )
    add("--force", action="store_true", help="replace OUTPUT.model")
    given = parser.parse_args(arguments)

    given.text_key = given.text_key or ["text"]
    for name in ("vocab_size", "max_bytes"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} ({getattr(given, name)}) must be at least 1")

    if files := [key for key in given.text_key if os.path.exists(key) and kind_of(key)]:
        parser.error(f"--text-key: {files[0]} is a file; name the files before --text-key")
    return given


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    train(options_of(arguments))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
