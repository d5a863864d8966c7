"""The tokenizer of a checkpoint, or of a Hugging Face folder: found, and compared by its hash.

- A checkpoint names the data folder that its run read, which holds the tokenizer. A checkpoint that
  was imported carries its own.
- Of a Hugging Face folder the sentencepiece model counts, with the special tokens behind its
  pieces, and whether a text gets a space in front. Without that file nothing can be compared.
"""

import json
from pathlib import Path
from typing import Any

from k2train.checkpoint.manifest import CheckpointManifest
from k2train.data.inspect.account import find_tokenizer
from k2train.data.manifest import MANIFEST_NAME
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.data.tokenizer import K2_SPECIAL_TOKENS, DummyPrefix, Tokenizer
from k2train.errors import CheckpointError, DataError
from k2train.hf.tokenizer_files import FAST, MODEL, SETTINGS, without_rules
from k2train.retry import is_file_retried, is_folder_retried, retried
from k2train.safe_json import read_json

NONE = "none"
"""Name of an export without a tokenizer."""
IMPORTED = "tokenizer.json"
"""In an imported checkpoint: special tokens and prefix, beside `tokenizer.model`."""


def tokenizer_of(path: Path, manifest: CheckpointManifest, given: str | None) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint: `given` (a file, a data folder, `none`), or its own.

    Raises DataError when it is not there, or is not the run's.
    """
    if given == NONE:
        return None
    wanted = manifest.data.tokenizer_sha256
    found = _given(Path(given), wanted) if given is not None else _own(path, manifest)
    if found is None:
        raise DataError(
            f"the tokenizer of {path} is not in {manifest.data.manifest or 'its data folder'}; "
            "name it with --tokenizer, or export without one (--tokenizer none)"
        )
    if wanted is not None and found.sha256 != wanted:
        raise DataError(
            f"{given or 'the tokenizer'} is not that of {path}: its sha256 is "
            f"{found.sha256[:12]}, the run's {wanted[:12]}; name the right one with --tokenizer"
        )
    return found


def _own(path: Path, manifest: CheckpointManifest) -> Tokenizer | None:
    if is_file_retried(path / MODEL):
        return read_beside(path)
    data = manifest.data.manifest
    if data is None or not is_file_retried(Path(data)):
        return None
    return find_tokenizer(read_data_manifest(data), None)


def _given(path: Path, wanted: str | None) -> Tokenizer | None:
    if is_folder_retried(path):
        path = path / MANIFEST_NAME
    if path.name == MANIFEST_NAME:
        return find_tokenizer(read_data_manifest(str(path)), None)
    # A model's file does not say what the run made of it; its hash does.
    prefixes: tuple[DummyPrefix, ...] = ("drop", "keep")
    every = [
        Tokenizer.load(path, specials, prefix)
        for specials in (K2_SPECIAL_TOKENS, ())
        for prefix in prefixes
    ]
    return next((found for found in every if found.sha256 == wanted), every[0])


def read_beside(path: Path) -> Tokenizer:
    """Read the tokenizer of an imported checkpoint. Raises DataError."""
    try:
        facts = read_json(path / IMPORTED)
        specials, prefix = tuple(map(str, facts["specials"])), facts["dummy_prefix"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / IMPORTED} cannot be read ({error!r:.100})") from None
    return Tokenizer.load(path / MODEL, specials, "keep" if prefix == "keep" else "drop")


def write_beside(path: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer into an imported checkpoint, for `read_beside`. Raises OSError."""
    facts = {"specials": list(tokenizer.specials), "dummy_prefix": tokenizer.dummy_prefix}
    (path / MODEL).write_bytes(tokenizer.model)
    (path / IMPORTED).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def tokenizer_of_folder(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a Hugging Face folder; None without a sentencepiece model.

    Raises DataError for files that cannot be read, and for a model that this project cannot use.
    """
    if not is_file_retried(folder / MODEL):
        return None
    file = (folder / MODEL).resolve()
    try:
        model, adds_prefix = without_rules(retried(file.read_bytes, file))
    except OSError as error:
        raise DataError(f"{folder / MODEL} cannot be read ({error.strerror})") from None
    settings = _json(folder / SETTINGS)
    if adds_prefix is None:
        # transformers' LlamaTokenizer puts a space in front unless it is told not to.
        adds_prefix = settings.get("add_prefix_space") is not False
    prefix: DummyPrefix = "keep" if adds_prefix else "drop"
    try:
        base = Tokenizer(model, (), prefix)
        return Tokenizer(model, _specials(folder, settings, base.base_size), prefix)
    except DataError as error:
        raise DataError(f"{folder / MODEL}{str(error).removeprefix('tokenizer.model')}") from None


def _specials(folder: Path, settings: dict[str, Any], base_size: int) -> tuple[str, ...]:
    """Names of the ids behind the pieces, without a gap."""
    named: dict[int, str] = {}
    for name, number in _json(folder / "added_tokens.json").items():
        named[number] = name
    for token in _json(folder / FAST).get("added_tokens") or []:
        named[token["id"]] = token["content"]
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        named[int(number)] = token["content"]
    behind = sorted(number for number in named if number >= base_size)
    if behind != list(range(base_size, base_size + len(behind))):
        raise DataError(
            f"tokenizer.model: has {base_size} pieces, and the special tokens behind them leave "
            f"gaps ({behind[:5]})"
        )
    return tuple(named[number] for number in behind)


def _json(path: Path) -> dict[str, Any]:
    """Read an object; an empty one when the file is not there."""
    if not is_file_retried(path):
        return {}
    try:
        content = read_json(path.resolve())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    return content if isinstance(content, dict) else {}
