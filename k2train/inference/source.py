"""Source of a generation: checkpoint, architecture and tokenizer, found without torch.

- A run stands for its newest checkpoint that is whole, also while it goes on: what is half saved
  has another name. A checkpoint that is named itself has none to fall back on.
- Shape and context come from the config in the checkpoint's manifest.
- The tokenizer must have the hash that the checkpoint's data had. It is found beside the data, or
  given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from k2train.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    list_checkpoints,
    read_manifest,
)
from k2train.checkpoint.side_files import FileTable
from k2train.checkpoint.verify import check_headers
from k2train.config.schema import ModelConfig
from k2train.data.inspect.trained_tokenizer import Trained
from k2train.data.tokenizer import Tokenizer
from k2train.errors import CheckpointError, DataError, RunError
from k2train.json_record import first_mistake
from k2train.model.architecture import Architecture, ModelSection
from k2train.retry import exists_retried, is_folder_retried


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
    older: tuple[Path, ...] = ()
    """Checkpoints of the same run to fall back on, newest first."""
    refused: tuple[str, ...] = ()
    """Why newer ones of the run were not taken."""

    @classmethod
    def find(cls, path: Path, tokenizer: Path | None = None) -> "Source":
        """Find the checkpoint that `path` names, a checkpoint or a run, and what belongs to it.

        Of a run the newest whose manifest and sizes of files are right; what the files hold is
        checked when they are read. Raises CheckpointError, RunError and DataError.
        """
        path, older, refused = _first_whole(checkpoints_of(path))
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
        return cls(
            path, manifest, architecture, context, precision, found, tuple(older), tuple(refused)
        )

    def fall_back(self, problem: str) -> "Source | None":
        """Return the source of the next older checkpoint, because of a `problem` of this one.

        None where none is left, or the checkpoint was named itself.
        """
        if not self.older:
            return None
        try:
            path, older, refused = _first_whole(self.older)
        except CheckpointError:
            return None
        told = (*self.refused, problem, *refused)
        return replace(
            self, path=path, manifest=read_manifest(path), older=tuple(older), refused=told
        )


def _first_whole(paths: Sequence[Path]) -> tuple[Path, Sequence[Path], list[str]]:
    """Return the first checkpoint that looks whole, those behind it, and what others lack.

    Raises the problem of the first one when none does.
    """
    problems: list[CheckpointError] = []
    for index, path in enumerate(paths):
        try:
            manifest = read_manifest(path)
            if len(paths) > 1:
                check_headers(path, manifest, FileTable(path, manifest).all("model"))
        except CheckpointError as error:
            problems.append(error)
        else:
            return path, paths[index + 1 :], [str(error) for error in problems]
    raise problems[0]


def find_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest checkpoint of the run there.

    Raises RunError.
    """
    return checkpoints_of(path)[0]


def checkpoints_of(path: Path) -> list[Path]:
    """Return `path` alone if it is a checkpoint, else those of the run there, newest first.

    Raises RunError.
    """
    if exists_retried(path / MANIFEST):
        return [path]
    if not is_folder_retried(path):
        raise RunError(f"{path}: is not a folder; give a checkpoint, or the directory of a run")
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise RunError(
            f"{path}: is neither a checkpoint (no {MANIFEST}) nor a run with checkpoints; give "
            "RUN/checkpoints/ckpt_NNN or RUN"
        )
    return found[::-1]


def architecture_of(path: Path, manifest: CheckpointManifest) -> Architecture:
    """Return the architecture in the config of a checkpoint. Raises CheckpointError."""
    try:
        model = ModelConfig.model_validate(_section(manifest, "model"))
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: the model section of its config: {first_mistake(error)}"
        ) from None
    return Architecture.of(ModelSection(model))


def _section(manifest: CheckpointManifest, name: str) -> dict[str, object]:
    section = manifest.config.get(name)
    return section if isinstance(section, dict) else {}


def tokenizer_of(path: Path, manifest: CheckpointManifest, given: Path | None) -> Tokenizer:
    """Return the tokenizer of a checkpoint's data: `given`, or the one beside the data.

    Raises DataError when it is not there, or another one.
    """
    trained = Trained(path, manifest.data.tokenizer_sha256, manifest.data.manifest)
    found = trained.find(given)
    if found is None:
        raise DataError(
            f"{path}: the tokenizer of its data ({manifest.data.manifest}) is not there; give "
            "it as --tokenizer FILE"
        )
    return found
