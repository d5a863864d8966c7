"""The tokenizer that a checkpoint was trained with: found where its manifest says, or given.

- A checkpoint names the data folder that its run read, which holds the tokenizer. A checkpoint that
  was imported carries its own.
- A given file is read in the way that has the checkpoint's hash, if one has: a file does not say
  which special tokens a recipe put behind it.
- Imported data may name its tokenizer in words. Then there is no hash to compare.

Alternatives considered:
- A copy of the tokenizer in every checkpoint: the hash in the manifest says the same.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.data.inspect.account import find_tokenizer
from k2train.data.json_tokenizer import ControlTokens, JsonTokenizer
from k2train.data.load_tokenizer import load_tokenizer, tokenizer_file
from k2train.data.manifest import MANIFEST_NAME, read_manifest
from k2train.data.tokenizer import MODEL_NAME, DummyPrefix, Tokenizer
from k2train.errors import DataError
from k2train.retry import exists_retried, is_file_retried, is_folder_retried, retried
from k2train.safe_json import read_json

FACTS = "tokenizer.json"
"""In an imported checkpoint: special tokens and prefix, beside the model's own file."""
JSON_MODEL = "training_tokenizer.json"
"""A `tokenizer.json` as training has read it, byte for byte, where another has that name."""
_PREFIXES: tuple[DummyPrefix, ...] = ("drop", "keep")


@dataclass(frozen=True)
class Trained:
    """What a checkpoint at `path` says of its tokenizer: its hash, and where its data was."""

    path: Path
    sha256: str | None
    data_manifest: str | None

    @property
    def data_folder(self) -> Path | None:
        """Manifest of the data, where it was; None if it is not there."""
        if self.data_manifest is None:
            return None
        named = Path(self.data_manifest)
        near = [named]
        # RUNS/NAME/checkpoints/ckpt_NNN: a path in a config is often relative to what holds RUNS.
        if not named.is_absolute() and len(self.path.resolve().parents) > 3:
            near.append(self.path.resolve().parents[3] / named)
        return next((one for one in near if exists_retried(one)), None)

    def find(self, given: Path | None = None) -> Tokenizer | None:
        """Return the tokenizer: `given`, a file or a data folder, or its own; None without one.

        Raises DataError when it cannot be read, or is another one.
        """
        found = self._own() if given is None else self._given(given)
        hashed = self.sha256 is not None and re.fullmatch("[0-9a-f]{64}", self.sha256) is not None
        if found is not None and hashed and found.sha256 != self.sha256:
            raise DataError(
                f"{given or self.data_manifest}: is not the tokenizer of {self.path}: its sha256 "
                f"is {found.sha256[:12]}, the checkpoint's {str(self.sha256)[:12]}; give the right "
                "one as --tokenizer FILE"
            )
        return found

    def _own(self) -> Tokenizer | None:
        if (beside := read_beside(self.path)) is not None:
            return beside
        folder = self.data_folder
        return None if folder is None else find_tokenizer(read_manifest(folder), None)

    def _given(self, given: Path) -> Tokenizer | None:
        if is_folder_retried(given):
            inside = given / MANIFEST_NAME
            given = inside if is_file_retried(inside) else tokenizer_file(given)
        if given.name == MANIFEST_NAME:
            return find_tokenizer(read_manifest(given), None)

        specials: list[Sequence[str] | None] = [None, ()]
        folder = self.data_folder
        if folder is not None and (recorded := read_manifest(folder).facts.tokenizer) is not None:
            specials.insert(0, recorded.specials)
        ways = [load_tokenizer(given, names, way) for names in specials for way in _ways(given)]
        right = [way for way in ways if way.sha256 == self.sha256]
        return (right or ways)[0]


def _ways(given: Path) -> tuple[DummyPrefix, ...]:
    """Prefixes of which each makes another tokenizer of a file."""
    return _PREFIXES[:1] if given.suffix == ".json" else _PREFIXES


def read_beside(path: Path) -> Tokenizer | None:
    """Read the tokenizer that an imported checkpoint carries; None without. Raises DataError."""
    is_json = is_file_retried(path / JSON_MODEL)
    if not is_json and not is_file_retried(path / MODEL_NAME):
        return None
    try:
        facts = read_json(path / FACTS)
        specials = tuple(map(str, facts["specials"]))
        if is_json:
            tokens = ControlTokens(*(facts.get(key) for key in ("bos", "eos", "pad")))
            model = retried((path / JSON_MODEL).read_bytes, path / JSON_MODEL)
            return JsonTokenizer(model, specials, tokens)
        prefix = facts["dummy_prefix"]
    except DataError as error:
        raise DataError(
            f"{path / JSON_MODEL}{str(error).removeprefix('tokenizer.model')}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path / FACTS} cannot be read ({error!r:.100})") from None
    return Tokenizer.load(path / MODEL_NAME, specials, "keep" if prefix == "keep" else "drop")


def write_beside(path: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer into an imported checkpoint, for `read_beside`. Raises OSError."""
    is_json = isinstance(tokenizer, JsonTokenizer)
    facts = {**tokenizer.facts, "dummy_prefix": tokenizer.dummy_prefix}
    (path / (JSON_MODEL if is_json else MODEL_NAME)).write_bytes(tokenizer.model)
    (path / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
