"""Source of a generation: checkpoint, architecture and tokenizer, found without torch.

- A run stands for its newest checkpoint, also while it goes on: what is half saved has another
  name.
- Shape and context come from the config in the checkpoint's manifest.
- The tokenizer must have the hash that the checkpoint's data had. It is found beside the data, or
  given.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import ValidationError

from k2train.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    list_checkpoints,
    read_manifest,
)
from k2train.config.schema import ModelConfig
from k2train.data.inspect.account import find_tokenizer
from k2train.data.load_tokenizer import load_tokenizer
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.data.tokenizer import DummyPrefix, Tokenizer
from k2train.errors import CheckpointError, DataError, RunError
from k2train.json_record import first_mistake
from k2train.model.architecture import Architecture
from k2train.retry import exists_retried, is_folder_retried

_PREFIXES: tuple[DummyPrefix, ...] = ("drop", "keep")


@dataclass(frozen=True)
class Source:
    """A checkpoint to generate from."""

    path: Path
    manifest: CheckpointManifest
    architecture: Architecture
    context_tokens: int
    """Sequence length of training: positions beyond it were never seen."""
    precision: str
    tokenizer: Tokenizer

    @classmethod
    def find(cls, path: Path, tokenizer: Path | None = None) -> "Source":
        """Find the checkpoint that `path` names, a checkpoint or a run, and what belongs to it.

        Raises CheckpointError, RunError and DataError.
        """
        path = find_checkpoint(path)
        manifest = read_manifest(path)
        architecture = architecture_of(path, manifest)
        found = tokenizer_of(path, manifest, tokenizer)
        if found.vocab_size > architecture.vocab_size:
            raise DataError(
                f"the tokenizer of {path} has {found.vocab_size} ids, its model "
                f"{architecture.vocab_size}; they do not belong together"
            )
        context = manifest.data.sequence_length or _section(manifest, "data").get("sequence_length")
        if not isinstance(context, int) or context < 2:
            raise CheckpointError(f"{path}: its manifest does not say data.sequence_length")
        precision = str(manifest.config.get("precision", "bf16"))
        return cls(path, manifest, architecture, context, precision, found)


def find_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest checkpoint of the run there.

    Raises RunError.
    """
    if exists_retried(path / MANIFEST):
        return path
    if not is_folder_retried(path):
        raise RunError(f"{path}: is not a folder; give a checkpoint, or the directory of a run")
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise RunError(
            f"{path}: is neither a checkpoint (no {MANIFEST}) nor a run with checkpoints; give "
            "RUN/checkpoints/ckpt_NNN or RUN"
        )
    return found[-1]


def architecture_of(path: Path, manifest: CheckpointManifest) -> Architecture:
    """Return the architecture in the config of a checkpoint. Raises CheckpointError."""
    try:
        model = ModelConfig.model_validate(_section(manifest, "model"))
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: the model section of its config: {first_mistake(error)}"
        ) from None
    # The keys of the section are the fields of the architecture, by the same names.
    return Architecture(**{one.name: getattr(model, one.name) for one in fields(Architecture)})


def _section(manifest: CheckpointManifest, name: str) -> dict[str, object]:
    section = manifest.config.get(name)
    return section if isinstance(section, dict) else {}


def tokenizer_of(path: Path, manifest: CheckpointManifest, given: Path | None) -> Tokenizer:
    """Return the tokenizer of a checkpoint's data: `given`, or the one beside the data.

    Raises DataError when it is not there, or another one.
    """
    wanted = manifest.data.tokenizer_sha256
    if given is not None:
        found = _given_tokenizer(given, path, manifest)
    else:
        folder = _data_folder(path, manifest)
        tokenizer = None if folder is None else find_tokenizer(read_data_manifest(folder), None)
        if tokenizer is None:
            raise DataError(
                f"{path}: the tokenizer of its data ({manifest.data.manifest}) is not there; give "
                "it as --tokenizer FILE"
            )
        found = tokenizer

    if wanted is not None and re.fullmatch("[0-9a-f]{64}", wanted) and found.sha256 != wanted:
        raise DataError(
            f"{given or manifest.data.manifest}: is not the tokenizer of {path}: its sha256 is "
            f"{found.sha256[:12]}, the checkpoint's {wanted[:12]}; give the right one as "
            "--tokenizer FILE"
        )
    return found


def _given_tokenizer(given: Path, path: Path, manifest: CheckpointManifest) -> Tokenizer:
    """Load a given tokenizer, read in the way that has the checkpoint's hash, if one has."""
    specials: list[Sequence[str] | None] = [None, ()]
    folder = _data_folder(path, manifest)
    if folder is not None and (recorded := read_data_manifest(folder).facts.tokenizer) is not None:
        specials.insert(0, recorded.specials)
    ways = [load_tokenizer(given, names, way) for names in specials for way in _PREFIXES]
    right = [way for way in ways if way.sha256 == manifest.data.tokenizer_sha256]
    return (right or ways)[0]


def _data_folder(path: Path, manifest: CheckpointManifest) -> Path | None:
    """Folder of the checkpoint's data, where it was; None if it is not there."""
    if manifest.data.manifest is None:
        return None
    named = Path(manifest.data.manifest)
    # RUNS/NAME/checkpoints/ckpt_NNN: a path in a config is often relative to what holds RUNS.
    near = [named, *([] if named.is_absolute() else [path.resolve().parents[3] / named])]
    return next((one for one in near if exists_retried(one)), None)
