"""The tokenizer of a checkpoint, or of a Hugging Face folder, and the ids of its control tokens.

- Of a Hugging Face folder the sentencepiece model counts, with the special tokens behind its
  pieces, and whether a text gets a space in front. Without that file it is `tokenizer.json`, with
  the control tokens that the files beside it name.
- A `tokenizer.json` of another kind than byte-level BPE cannot be compared: no data can have it.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from k2train.checkpoint.manifest import CheckpointManifest
from k2train.checkpoint.moments import ORIGIN
from k2train.data.inspect.trained_tokenizer import JSON_MODEL, Trained
from k2train.data.json_tokenizer import JsonTokenizer, control_tokens_beside
from k2train.data.manifest import MANIFEST_NAME
from k2train.data.tokenizer import DummyPrefix, Tokenizer
from k2train.errors import CheckpointError, DataError
from k2train.hf.chat_template import template_of_data
from k2train.hf.config_file import TokenIds
from k2train.hf.tokenizer_files import without_rules
from k2train.hf.tokenizer_settings import FAST, MODEL, SETTINGS
from k2train.retry import is_file_retried, retried
from k2train.safe_json import read_json

_WHERE = MODEL
"""Name of the tokenizer in messages; a reader puts the file's name in its place."""
NONE = "none"
"""Name of an export without a tokenizer."""


def trained_of(path: Path, manifest: CheckpointManifest) -> Trained:
    """Return what a checkpoint says of its tokenizer."""
    return Trained(path, manifest.data.tokenizer_sha256, manifest.data.manifest)


def tokenizer_of(path: Path, manifest: CheckpointManifest, given: str | None) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint: `given` (a file, a data folder, `none`), or its own.

    Raises DataError when it is not there, or is not the run's.
    """
    if given == NONE:
        return None
    found = trained_of(path, manifest).find(None if given is None else Path(given))
    if found is None:
        raise DataError(
            f"the tokenizer of {path} is not in {manifest.data.manifest or 'its data folder'}; "
            "name it with --tokenizer, or export without one (--tokenizer none)"
        )
    rows = manifest.config.get("model", {}).get("vocab_size")
    if isinstance(rows, int) and found.vocab_size > rows:
        raise DataError(
            f"the tokenizer of {path} has {found.vocab_size} ids, its model {rows}; they do not "
            "belong together, name the right one with --tokenizer"
        )
    return found


def template_of(path: Path, manifest: CheckpointManifest, given: str | None) -> str | None:
    """Return the chat template of a checkpoint's data, or of the data folder `given`, if any.

    Raises DataError when it is not the one that the data was made with.
    """
    folder = trained_of(path, manifest).data_folder
    if given is not None and is_file_retried(Path(given) / MANIFEST_NAME):
        folder = Path(given)
    return None if folder is None else template_of_data(folder)


def ids_of(path: Path, manifest: CheckpointManifest, tokenizer: Tokenizer | None) -> TokenIds:
    """Return the ids that begin, end and pad a text: those of `tokenizer`, or the checkpoint's own.

    Without a tokenizer they are those that an imported folder named, or unknown.
    """
    if tokenizer is None:
        with suppress(DataError):
            tokenizer = trained_of(path, manifest).find()
    if tokenizer is not None:
        return TokenIds(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    origin = (manifest.model_extra or {}).get(ORIGIN)
    named = origin.get("token_ids") if isinstance(origin, dict) else None
    return TokenIds.read(named) if isinstance(named, dict) else TokenIds()


def tokenizer_of_folder(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a Hugging Face folder; None without one that can be compared.

    Raises DataError for files that cannot be read, and for a sentencepiece model that this project
    cannot use.
    """
    if is_file_retried(folder / MODEL):
        return _sentencepiece(folder)
    try:
        return _json_tokenizer(folder)
    except UnusableError:
        return None


def why_not_compared(folder: Path) -> str | None:
    """Say in words why the tokenizer of a folder cannot be compared; None when it can be."""
    if is_file_retried(folder / MODEL):
        return None
    try:
        found = _json_tokenizer(folder)
    except UnusableError as error:
        return str(error)
    return f"it has no {MODEL} and no {FAST}" if found is None else None


class UnusableError(DataError):
    """A `tokenizer.json` of a kind that no data of this project can have."""


def _json_tokenizer(folder: Path) -> JsonTokenizer | None:
    """Read the `tokenizer.json` of training, or the folder's own; None without."""
    file = next((folder / n for n in (JSON_MODEL, FAST) if is_file_retried(folder / n)), None)
    if file is None:
        return None
    try:
        model = retried(file.resolve().read_bytes, file)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from None
    tokens = control_tokens_beside(folder / FAST)
    try:
        base = JsonTokenizer(model, (), tokens)
        specials = _specials(folder, _json(folder / SETTINGS), base.base_size)
        return JsonTokenizer(model, specials, tokens)
    except DataError as error:
        raise UnusableError(f"{file}{str(error).removeprefix('tokenizer.model')}") from None


def _sentencepiece(folder: Path) -> Tokenizer:
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
    try:
        for name, number in _json(folder / "added_tokens.json").items():
            named[int(number)] = str(name)
        for token in _json(folder / FAST).get("added_tokens") or []:
            named[int(token["id"])] = str(token["content"])
        for number, token in (settings.get("added_tokens_decoder") or {}).items():
            named[int(number)] = str(token["content"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{_WHERE}: the added tokens beside it are none ({error!r:.100})") from None
    behind = sorted(number for number in named if number >= base_size)
    if behind != list(range(base_size, base_size + len(behind))):
        raise DataError(
            f"{_WHERE}: has {base_size} pieces, and the special tokens behind them leave "
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
