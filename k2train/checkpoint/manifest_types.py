"""Types of a checkpoint's manifest and side files: frozen pydantic models of formats 1 to 3.

- Unknown keys are kept.
- Large tables stay JSON, and their keys are checked in place: a hundred thousand objects take a
  second to make.

Alternatives considered:
- A type for each tensor's entry: slow, and each entry is read once.
"""

from collections.abc import Callable
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Annotated, Any, NotRequired, Self, TypedDict

from pydantic import AfterValidator, Field, GetPydanticSchema, model_validator
from pydantic_core.core_schema import no_info_plain_validator_function

from k2train.checkpoint.run_facts import (
    ChunkFacts,
    Facts,
    ForwardAnswer,
    HeldOutFacts,
    Json,
    LayoutFacts,
    Loss,
    MergeFacts,
    ParentFacts,
    ProductFacts,
    Rate,
    RunIdentity,
)
from k2train.json_record import Count, Positive

FOLDERS = ("model", "optimizer")
"""Folders of shard files."""
FACTS = "facts"
"""Folder of the side files that describe them, from format 3 on."""
MAX_PIECE_BYTES = 2**30


class TensorFacts(TypedDict):
    """A whole tensor of the training state."""

    shape: list[int]
    dtype: str


class BlockFacts(TypedDict):
    """A block of a global tensor in a shard file: format 2 has one hash, format 3 one a piece."""

    offsets: list[int]
    shape: list[int]
    sha256: NotRequired[str]
    xxh3_128: NotRequired[list[str]]


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


def _not_tensors(table: Json) -> str:
    kinds = {type(facts.get("dtype")) for facts in table.values() if isinstance(facts, dict)}
    return _lacking("shape")(table) or ("" if kinds <= {str} else "has a dtype that is no text")


TensorTable = Annotated[dict[str, TensorFacts], _in_place(_not_tensors)]
"""Facts of whole tensors by their names."""


def _not_texts(table: Json) -> str:
    return "" if set(map(type, table.values())) <= {str} else "holds more than texts"


def _inside(folders: tuple[str, ...]) -> Callable[[str], str]:
    """Check of a file's name: directly in one of the `folders`."""

    def check(name: str) -> str:
        # Names come from the file: no path may lead out of the checkpoint.
        parts = PurePosixPath(name).parts
        if (
            not name.isprintable()
            or len(parts) != 2
            or parts[0] not in folders
            or ".." in parts
            or name != "/".join(parts)
        ):
            raise ValueError(f"names {name[:100]!a}, outside the checkpoint's folders")
        return name

    return check


FileName = Annotated[str, AfterValidator(_inside(FOLDERS))]
SideName = Annotated[str, AfterValidator(_inside((FACTS,)))]


def _a_buffer(size: int) -> int:
    # A piece of which only a part is wanted is read into memory whole.
    if size > MAX_PIECE_BYTES:
        raise ValueError(f"must be at most {MAX_PIECE_BYTES}")
    return size


class FileFacts(Facts):
    """A shard file as a whole; from format 3 on with the hash of its side file."""

    bytes: Count
    sha256: str
    facts_sha256: str | None = None


class FileTableFacts(Facts):
    """Content of a side file that holds the facts of many shard files."""

    files: dict[FileName, FileFacts]


class FileGroup(Facts):
    """A side file that holds the facts of `files` shard files of one folder, in their order."""

    folder: str
    files: Positive
    bytes: Count
    """Size of these shard files together."""
    sha256: str


class ShardFacts(Facts):
    """What a shard file holds, in format 2."""

    header_sha256: str
    tensors: Annotated[dict[str, BlockFacts], _in_place(_lacking("offsets", "sha256", "shape"))]


class PieceFacts(Facts):
    """What a shard file holds, in format 3: the content of its side file.

    Every block is hashed in pieces of `piece_bytes`, counted from its begin; the last is shorter.
    """

    header_sha256: str
    piece_bytes: Annotated[Positive, AfterValidator(_a_buffer)]
    tensors: Annotated[dict[str, BlockFacts], _in_place(_lacking("offsets", "xxh3_128", "shape"))]


class StateFacts(Facts):
    """Layout-independent digests of the training state."""

    root: str
    digests: Annotated[dict[str, str], _in_place(_not_texts)]


class DataPosition(Facts):
    """Position in the data: whole chunks consumed, then steps in the next one."""

    consumed: Count
    step_in_chunk: Count = 0
    order: tuple[ChunkFacts, ...] = ()

    def begun(self) -> tuple[ChunkFacts, ...]:
        """Chunks that were trained on: those consumed, and the one that is being read."""
        return self.order[: self.consumed + (self.step_in_chunk > 0)]


class DataFacts(Facts):
    """The data folder that the run reads.

    `content_sha256` is that of data made again under other versions, too.
    """

    manifest: str | None = None
    manifest_sha256: str | None = None
    content_sha256: str | None = None
    tokenizer_sha256: str | None = None
    vocab_size: Count | None = None
    sequence_length: Count | None = None


class LedgerFacts(Facts):
    """Head of the run's ledger at the save: number of events, and sha256 of the last line."""

    events: Count
    sha256: str


class SaveFacts(Facts):
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
    held_out: tuple[HeldOutFacts, ...] | None = None
    """Every set that was scored; absent in checkpoints of older versions."""
    asked: str | None = None
    """Who asked for this save and wants it kept: a file SAVE, a signal; absent if nobody did."""
    lr: Rate | None = None
    guard: Json | None = None
    """State of the guards by their names."""
    parent: ParentFacts | None = None
    """The stage before, and how this one took over from it."""
    identity: RunIdentity | None = None
    """What may not change when the run is resumed."""
    probe: ForwardAnswer | None = None
    """The forward check's answer."""
    layout: LayoutFacts | None = None
    environment: Json | None = None
    fencing_token: Count | None = None
    ledger: LedgerFacts | None = None
    """Absent in checkpoints of older versions."""
    products: ProductFacts | None = None
    """Which library computed which product; absent where nothing was measured."""
    merged: MergeFacts | None = None
    """What a merged checkpoint was made of; it has master weights and no moments."""


class CheckpointManifest(SaveFacts):
    """Content of a checkpoint's `manifest.json`."""

    format: Count
    name: str
    saved: str | None = None
    tensors: dict[str, TensorTable]
    files: dict[FileName, FileFacts] = Field(default_factory=dict)
    """All shard files by name; none where `groups` hold them."""
    groups: dict[SideName, FileGroup] = Field(default_factory=dict)
    """Side files with the facts of many shard files, by name."""
    shards: dict[str, ShardFacts] = Field(default_factory=dict)
    """What the files hold, in format 2."""
    state: StateFacts | None = None
    self_sha256: str

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        # Format 1 describes files only as a whole.
        if self.format == 2 and set(self.shards) != set(self.files):
            raise ValueError("shards are not those of its files")
        if self.format > 2 and not all(facts.facts_sha256 for facts in self.files.values()):
            raise ValueError("files lack the hash of their side files")
        if "files" not in self.model_fields_set and not self.groups:
            raise ValueError("names no files")
        return self

    @property
    def total_bytes(self) -> int:
        """Size of all shard files."""
        sizes = [facts.bytes for facts in self.files.values()]
        return sum(sizes) + sum(group.bytes for group in self.groups.values())

    @property
    def total_files(self) -> int:
        """Number of shard files."""
        return len(self.files) + sum(group.files for group in self.groups.values())

    def shapes(self, folder: str) -> dict[str, list[int]]:
        """Return the shape of every tensor of `model` or `optimizer`."""
        return {name: facts["shape"] for name, facts in self.tensors.get(folder, {}).items()}
