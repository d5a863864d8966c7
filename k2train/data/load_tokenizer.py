"""Tokenizer of a file, of either kind: a sentencepiece model, or a `tokenizer.json`.

- The content tells the kind: JSON begins with a bracket, a sentencepiece model never does.
- Special tokens that exist only as ids follow the file's own. Without a list they are K2's for a
  sentencepiece model, and none for a tokenizer.json, which has its own.
"""

from collections.abc import Sequence
from pathlib import Path

from k2train.data.json_tokenizer import (
    CONFIG_NAME,
    JSON_NAME,
    JsonTokenizer,
    control_tokens_beside,
)
from k2train.data.tokenizer import K2_SPECIAL_TOKENS, MODEL_NAME, DummyPrefix, Tokenizer
from k2train.errors import DataError
from k2train.files import AtomicFile
from k2train.retry import is_file_retried, retried

TOKENIZER_FILES = (MODEL_NAME, JSON_NAME, CONFIG_NAME)
"""Every file that a tokenizer may have in a folder."""


def default_specials(path: Path) -> tuple[str, ...]:
    """Return the special tokens after a file's own where nothing names any, by the file's name."""
    return () if path.suffix == ".json" else K2_SPECIAL_TOKENS


def load_tokenizer(
    path: Path, specials: Sequence[str] | None = None, dummy_prefix: DummyPrefix = "drop"
) -> Tokenizer:
    """Read a tokenizer of either kind.

    Raises DataError naming the file when it is missing, of no known kind, or not usable.
    """
    try:
        model = retried(path.read_bytes, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read as tokenizer.model ({error.strerror})") from None
    try:
        if model.lstrip()[:1] != b"{":
            names = default_specials(path) if specials is None else specials
            return Tokenizer(model, names, dummy_prefix)
        return JsonTokenizer(model, specials or (), control_tokens_beside(path), dummy_prefix)
    except DataError as error:
        told = str(error)
        # A message about a file beside names that file.
        where = "" if told.startswith(str(path.parent)) else str(path)
        raise DataError(f"{where}{told.removeprefix('tokenizer.model')}") from None


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the files of a tokenizer into a folder, each complete or absent, and the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files.items():
        with AtomicFile(folder / name) as stream:
            stream.write(content)


def tokenizer_file(folder: Path) -> Path:
    """Return the tokenizer that `save_tokenizer` wrote into a folder."""
    json_file = folder / JSON_NAME
    return json_file if is_file_retried(json_file) else folder / MODEL_NAME
