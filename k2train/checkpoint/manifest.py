"""Checkpoint directories and manifests: layout on disk, format, search. No torch.

    ckpt_007/manifest.json   step, data position, layout, config, hashes of all other files
    ckpt_007/model/          weights by global name, safetensors shards with their offsets
    ckpt_007/optimizer/      fp32 `NAME.master`, `NAME.exp_avg`, `NAME.exp_avg_sq`
    ckpt_007/thinned.json    marks a removed optimizer directory; names the manifest's hash

- `ckpt_NNN` has consumed NNN whole chunks of this stage. `ckpt_NNN_step_SSSSSS` was saved on
  request in between. A directory named `*.tmp` was never finished and is never read.
- The manifest is written last. No file contains a pickle.
- The manifest also carries the hash of its own content (`self_sha256`). A changed digit would be
  valid JSON and would silently move the run to another step.
- Format 2 adds `shards`: for every file, the hash of its header and of each tensor, taken from
  memory before writing. Damage is therefore named by tensor.
- Format 2 also adds `state`, the root over the whole training state in any layout. Format 1 is
  still read.
- Unknown keys are kept. The hash is that of the JSON as read, not of the parsed types.

Alternatives considered:
- A sidecar file with the manifest's hash: it can be lost or swapped.
- A type for each tensor's entry: a hundred thousand objects take a second to make. The entries stay
  JSON, and their keys are checked in place.
"""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self, TypedDict

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetPydanticSchema,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic_core.core_schema import no_info_plain_validator_function

from k2train.errors import CheckpointError
from k2train.files import write_synced
from k2train.json_record import Count, first_mistake
from k2train.safe_json import read_json, read_plain_file

FORMAT = 2
NAME = re.compile(r"ckpt_(\d{3,})(?:_step_(\d{6,}))?")
MANIFEST = "manifest.json"
THINNED = "thinned.json"
FOLDERS = ("model", "optimizer")

Json = dict[str, Any]
Loss = Annotated[float, PlainSerializer(lambda loss: loss if math.isfinite(loss) else str(loss))]
"""A loss may be NaN, for which JSON has no number: written as `"nan"`."""


class TensorFacts(TypedDict):
    """A whole tensor of the training state."""

    shape: list[int]
    dtype: str


class BlockFacts(TypedDict):
    """A block of a global tensor in a shard file."""

    offsets: list[int]
    shape: list[int]
    sha256: str


def _in_place(problem: Callable[[Json], str]) -> GetPydanticSchema:
    """Validate a large table by its `problem` ("" for none), without copying it."""

    def check(table: Any) -> Any:
        text = problem(table) if isinstance(table, dict) else "is not an object"
        if text:
            raise ValueError(text)
        return table

    return GetPydanticSchema(lambda *_: no_info_plain_validator_function(check))


def _lacking(*keys: str) -> Callable[[Json], str]:
    values = itemgetter(*keys, "shape")

    def problem(table: Json) -> str:
        for name, facts in table.items():
            try:
                if isinstance(values(facts)[-1], list):
                    continue
            except (LookupError, TypeError):
                pass
            return f"lacks {', '.join(keys)} of {name[:100]!a}"
        return ""

    return problem


def _not_texts(table: Json) -> str:
    return "" if set(map(type, table.values())) <= {str} else "holds more than texts"


def _file_name(name: str) -> str:
    # Names come from the file: no path may lead out of the checkpoint.
    parts = PurePosixPath(name).parts
    if (
        not name.isprintable()
        or len(parts) != 2
        or parts[0] not in FOLDERS
        or ".." in parts
        or name != "/".join(parts)
    ):
        raise ValueError(f"names {name[:100]!a}, outside the checkpoint's folders")
    return name


FileName = Annotated[str, AfterValidator(_file_name)]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)


class FileFacts(_Facts):
    """A shard file as a whole."""

    bytes: Count
    sha256: str


class ShardFacts(_Facts):
    """What a shard file holds."""

    header_sha256: str
    tensors: Annotated[dict[str, BlockFacts], _in_place(_lacking("offsets", "sha256", "shape"))]


class StateFacts(_Facts):
    """Layout-independent digests of the training state."""

    root: str
    digests: Annotated[dict[str, str], _in_place(_not_texts)]


class ChunkFacts(_Facts):
    """Name and content of a chunk."""

    name: str
    sha256: str


class DataPosition(_Facts):
    """Position in the data: whole chunks consumed, then steps in the next one."""

    consumed: Count
    step_in_chunk: Count = 0
    order: tuple[ChunkFacts, ...] = ()


class DataFacts(_Facts):
    """The data folder that the run reads."""

    manifest: str | None = None
    manifest_sha256: str | None = None
    tokenizer_sha256: str | None = None
    vocab_size: int | None = None
    sequence_length: int | None = None


class SaveFacts(_Facts):
    """What a run says of a checkpoint: all of the manifest but the files."""

    step: Count
    adam_steps: Count
    consumed_tokens: Count
    chunks: DataPosition
    config: Json
    data: DataFacts
    attempt: Count = 0
    loss: Loss | None = None
    held_out_loss: Loss | None = None
    lr: float | None = None
    guard: Json | None = None
    """State of the guards by their names."""
    parent: Json | None = None
    """The stage before, and how this one took over from it."""
    identity: Json | None = None
    """What may not change when the run is resumed."""
    probe: Json | None = None
    """The forward check's answer."""
    layout: Json | None = None
    environment: Json | None = None
    fencing_token: Count | None = None


class CheckpointManifest(SaveFacts):
    """Content of a checkpoint's `manifest.json`."""

    format: Count
    name: str
    saved: str | None = None
    tensors: dict[str, Annotated[dict[str, TensorFacts], _in_place(_lacking("shape"))]]
    files: dict[FileName, FileFacts]
    shards: dict[str, ShardFacts] = {}
    state: StateFacts | None = None
    self_sha256: str

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        # Format 1 describes files only as a whole.
        if self.format > 1 and set(self.shards) != set(self.files):
            raise ValueError("shards are not those of its files")
        return self

    @property
    def total_bytes(self) -> int:
        """Size of all shard files."""
        return sum(file.bytes for file in self.files.values())

    def shapes(self, folder: str) -> dict[str, list[int]]:
        """Return the shape of every tensor of `model` or `optimizer`."""
        return {name: facts["shape"] for name, facts in self.tensors.get(folder, {}).items()}


_dumps = partial(json.dumps, sort_keys=True, default=dict)


def seal(content: Json) -> Json:
    """Add `self_sha256`, the hash of all other content, which `read_manifest` checks."""
    return {**content, "self_sha256": _content_sha256(content)}


def _content_sha256(content: Json) -> str:
    content = {key: value for key, value in content.items() if key != "self_sha256"}
    return sha256(_dumps(content, separators=(",", ":")).encode()).hexdigest()


def manifest_text(content: Json) -> str:
    """Format a manifest with one line per key.

    Full indentation of a large one takes five times as long.
    """
    lines = (f" {json.dumps(key)}: {_dumps(content[key])}" for key in sorted(content))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def checkpoint_name(chunks_consumed: int, step: int | None = None) -> str:
    """Name `ckpt_007`, or `ckpt_007_step_000123` for a save within a chunk at `step`."""
    return f"ckpt_{chunks_consumed:03d}" + ("" if step is None else f"_step_{step:06d}")


def read_manifest(path: Path) -> CheckpointManifest:
    """Read and validate the manifest of checkpoint directory `path`.

    Raises CheckpointError when it is missing, broken or of a newer format.
    """
    # A link under a new name would make an old state pass for a newer one.
    if NAME.fullmatch(path.name) and path.is_symlink():
        raise CheckpointError(
            f"{path}: is a symbolic link; a checkpoint must be a real directory of its run"
        )

    try:
        content = read_json(path / MANIFEST)
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(
            f"{path / MANIFEST}: not valid JSON ({error}); it was changed or damaged"
        ) from None

    if not isinstance(content, dict):
        raise CheckpointError(f"{path / MANIFEST}: not a JSON object")

    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{path}: format {version} is newer than this code reads ({FORMAT}); update k2train"
        )
    if "self_sha256" in content and content["self_sha256"] != _content_sha256(content):
        raise CheckpointError(
            f"{path}: {MANIFEST} does not match its own hash; it was changed or damaged"
        )

    try:
        manifest = CheckpointManifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{path / MANIFEST}: {first_mistake(error)}") from None

    if NAME.fullmatch(path.name) and manifest.name != path.name:
        raise CheckpointError(
            f"{path}: {MANIFEST} belongs to {ascii(manifest.name)[1:-1][:100]}; restore the "
            "directory's name"
        )
    return manifest


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoint directories under `directory`, oldest first.

    Sorted by chunks consumed, then by step.
    """
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        match = NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append(((int(match[1]), int(match[2] or 0)), path))
    return [path for _, path in sorted(found)]


def is_thinned(path: Path) -> bool:
    """Whether the optimizer state was removed on purpose."""
    return (path / THINNED).exists()


def mark_thinned(path: Path, manifest: CheckpointManifest) -> None:
    """Mark the optimizer files of checkpoint `path` as removed. They may be deleted afterwards."""
    write_synced(path / THINNED, _marker(manifest))


def _marker(manifest: CheckpointManifest) -> str:
    return json.dumps({"removed": "optimizer", "manifest_self_sha256": manifest.self_sha256}) + "\n"


def check_marker(path: Path, manifest: CheckpointManifest) -> None:
    """Validate the thinning marker.

    A damaged directory can also show one, and would make a complete checkpoint lose its moments.
    """
    try:
        text = read_plain_file(path / THINNED, max_bytes=4096)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {THINNED} cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None

    # The second form was written before format 2.
    if text not in (_marker(manifest).encode(), b'{"removed": "optimizer"}\n'):
        raise CheckpointError(
            f"{path}: {THINNED} does not belong to this checkpoint; it was changed or damaged"
        )
