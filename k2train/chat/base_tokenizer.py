"""Tokenizer of chat data: that of a run, a data folder or a file, and a template's markers.

- A model learns to chat with the ids it was trained on, so its tokenizer is taken as it is.
- Markers that it has already keep their ids.
"""

from collections.abc import Sequence
from pathlib import Path

from k2train.data.inspect.account import find_tokenizer
from k2train.data.json_tokenizer import JsonTokenizer
from k2train.data.load_tokenizer import load_tokenizer
from k2train.data.manifest import MANIFEST_NAME, read_manifest
from k2train.data.tokenizer import Tokenizer
from k2train.errors import DataError
from k2train.inference.source import Source
from k2train.retry import exists_retried, is_file_retried


def base_tokenizer(path: Path) -> Tokenizer:
    """Find the tokenizer of a run, a checkpoint or a data folder, or read a tokenizer's file.

    Raises DataError, RunError and CheckpointError.
    """
    if is_file_retried(path) and path.name != MANIFEST_NAME:
        return load_tokenizer(path)
    manifest_file = path if path.name == MANIFEST_NAME else path / MANIFEST_NAME
    is_checkpoint = exists_retried(path / "model") or exists_retried(path / "checkpoints")
    if not exists_retried(manifest_file) and not is_checkpoint:
        raise DataError(
            f"--tokenizer: {path} is no run, checkpoint, data folder or tokenizer file; "
            "name one of them"
        )
    if is_checkpoint:
        return Source.find(path).tokenizer
    found = find_tokenizer(read_manifest(manifest_file), None)
    if found is None:
        raise DataError(f"--tokenizer: {path} has no tokenizer beside its data; name its file")
    return found


def with_markers(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """Return the tokenizer with these special tokens behind its own, but for those it has.

    Raises DataError for a name that would be a second token for the same text.
    """
    missing = [name for name in dict.fromkeys(names) if not _has(tokenizer, name)]
    if not missing:
        return tokenizer
    specials = (*tokenizer.specials, *missing)
    if isinstance(tokenizer, JsonTokenizer):
        return JsonTokenizer(tokenizer.model, specials, tokenizer.tokens, tokenizer.dummy_prefix)
    return Tokenizer(tokenizer.model, specials, tokenizer.dummy_prefix)


def _has(tokenizer: Tokenizer, name: str) -> bool:
    try:
        tokenizer.special_id(name)
    except KeyError:
        return False
    return True
