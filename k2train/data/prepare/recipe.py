"""Data recipe: typed, complete, and validated as strictly as the config of a run.

- A recipe and the documents decide every byte of the output. Its hash is therefore the identity of
  the preparation and is kept in the manifest.
- Where the work is done (`executor`, `work`) and where files are (`output`, `paths`) are keys too,
  but no part of the identity.
- Alternatives considered: command-line flags for the same choices; a flag is not kept anywhere.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from k2train.config.messages import Contradiction
from k2train.data.prepare.field_keys import Conditions, TextKeys
from k2train.data.prepare.tokenizer_recipe import Count, Natural, Section, TokenizerRecipe

Share = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[Share, Share]
StdlibKind = Literal["stdlib_code", "stdlib_docstrings", "stdlib_topics"]
FileKind = Literal["jsonl", "parquet", "text"]
STDLIB_ORIGINS = {"stdlib_code": "stdlib", "stdlib_docstrings": "stdlib", "stdlib_topics": "topics"}
WHOLE: Interval = (0.0, 1.0)
MAX_REPEAT = 100


class FillInTheMiddle(Section):
    """Shares of a subset's documents to rearrange for fill-in-the-middle training.

    `psm` is prefix-suffix-middle, `spm` is suffix-prefix-middle.
    """

    psm: Share = 0.0
    spm: Share = 0.0

    @model_validator(mode="after")
    def _at_most_all(self) -> "FillInTheMiddle":
        if self.psm + self.spm > 1:
            raise Contradiction(
                f"psm ({self.psm}) + spm ({self.spm}) must not be above 1", ("psm",), ("spm",)
            )
        return self


class SubsetRecipe(Section):
    """A subset: where its documents are, which of them it takes, and how often.

    - `share`: the interval of [0, 1] of texts, documents or files (`split_by`) that this data
      folder may use. Stages with disjoint shares have no text in common, file or document.
    - `split_by`: what has a place in [0, 1]: the `text` of a document, so that equal texts are on
      one side; the `document` by its name; or its whole file, `source`.
    - `documents`: a part of those documents, drawn by the seed. Subsets over the same files can
      take different ones.
    - `repeat`: how often the documents are laid out, each time in another order; 0.5 is one half.
    - `limit_tokens`: upper limit of the tokens taken from the subset.
    - `fill`: marks the one subset that fills the rows which the others leave. The others are then
      used completely.
    - `origin`: names the files in every stage. Default: the named folder, or the folder in front of
      the first wildcard.
    - `where`: by field (`meta.source`), the values with which a document is taken.
    - `expected_tokens`: tokens of one pass, for `--estimate` without the files.
    """

    kind: Literal[FileKind, StdlibKind]
    paths: tuple[str, ...] = ()
    origin: str | None = None
    text_key: TextKeys = ("text",)
    id_key: str | None = None
    where: Conditions = Field(default={})
    share: Interval = WHOLE
    documents: Interval = WHOLE
    split_by: Literal["source", "document", "text"] = Field(
        default_factory=lambda data: _default_split(data.get("kind", ""))
    )
    repeat: Annotated[float, Field(gt=0, le=MAX_REPEAT)] = 1.0
    fill_in_the_middle: FillInTheMiddle = FillInTheMiddle()
    min_characters: Natural = 1
    drop_duplicates: bool = Field(
        default_factory=lambda data: str(data.get("kind", "")).startswith("stdlib")
    )
    limit_tokens: Count | None = None
    fill: bool = False
    expected_tokens: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "SubsetRecipe":
        """Check rules between the keys of a subset."""
        for name, (low, high) in (("share", self.share), ("documents", self.documents)):
            if not low < high:
                raise Contradiction(
                    f"{name} {[low, high]} must be ascending, as in [0.0, 0.8]", (name,)
                )

        if self.where and self.kind not in ("jsonl", "parquet"):
            raise Contradiction(
                f"where needs documents with fields: kind jsonl or parquet, not {self.kind}",
                ("where",),
                ("kind",),
            )
        if self.kind in STDLIB_ORIGINS:
            if self.paths or self.origin or self.id_key or self.split_by != "source":
                keys = ("paths", "origin", "id_key", "split_by", "kind")
                raise Contradiction(
                    f"kind {self.kind} reads the standard library: "
                    "it takes no paths, origin, id_key or split_by",
                    *((key,) for key in keys if key in self.model_fields_set),
                )
        elif not self.paths:
            raise Contradiction(
                f"paths is missing: kind {self.kind} needs files, such as [corpus/web/*.jsonl.zst]",
                ("paths",),
                ("kind",),
            )

        return self

    @property
    def passes(self) -> int:
        """Number of times the documents are laid out, an incomplete pass included."""
        return int(-(-self.repeat // 1))


def _default_split(kind: str) -> Literal["source", "text"]:
    # Docstrings are held out together with the code they are part of, so by its file.
    return "source" if kind.startswith("stdlib") else "text"


class HeldOutRecipe(Section):
    """Validation rows from documents that no chunk uses: the upper end of each subset's share.

    Holds out `share` of it, or as much as `rows` rows need. With both, `rows` are taken from
    `share`.
    """

    rows: Count | None = None
    share: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "HeldOutRecipe":
        if self.rows is None and self.share is None:
            raise Contradiction("give rows, or a share, or both", ("rows",), ("share",))
        return self


class ExecutorRecipe(Section):
    """Where the tasks run: processes of this machine, SLURM jobs, or a Ray cluster.

    Never changes a byte of the result.

    - `workers`: tasks at once. Default: the cores of this machine; 64 on SLURM and Ray.
    - `task_bytes`: documents read by one task, or one file if that is larger.
    - `run_tokens`: tokens that a task holds in memory.
    - `memory_gb`: memory per core, on SLURM and Ray.
    - `partition`, `time`, `arguments` (further sbatch options by name): SLURM only.
    - `environment`: a shell line that SLURM jobs run first.
    """

    kind: Literal["local", "slurm", "ray"] = "local"
    workers: Count | None = None
    task_bytes: Count = 2**28
    run_tokens: Annotated[int, Field(ge=1024, strict=True)] = 2**25
    partition: str | None = None
    time: str = "04:00:00"
    memory_gb: Count = 4
    arguments: dict[str, str] = Field(default={})
    environment: str | None = None

    @model_validator(mode="after")
    def _slurm_has_a_partition(self) -> "ExecutorRecipe":
        if self.kind == "slurm" and self.partition is None:
            raise Contradiction(
                "partition is missing: kind slurm needs one (sinfo lists them)",
                ("partition",),
                ("kind",),
            )
        return self


class Recipe(Section):
    """The recipe of one data folder.

    `seen` are manifests of other data folders, as of the stage before: no text of theirs is used.

    Without `rows_per_chunk` every sample is used, and chunks differ by one row at most. A subset
    with a larger share of broken documents than `max_rejected_share` stops the preparation.
    """

    name: str = Field(min_length=1)
    output: Path
    work: Path | None = None
    seed: Natural
    sequence_length: Annotated[int, Field(ge=2, strict=True)]
    chunks: Count
    rows_per_chunk: Count | None = None
    tokenizer: TokenizerRecipe
    subsets: dict[str, SubsetRecipe] = Field(min_length=1)
    held_out: HeldOutRecipe | None = None
    seen: tuple[Path, ...] = ()
    document_borders: bool = False
    max_rejected_share: Share = 0.01
    executor: ExecutorRecipe = ExecutorRecipe()

    @model_validator(mode="after")
    def _subsets_agree(self) -> "Recipe":
        """Check rules between subsets: one `fill`, and equal splits within an origin."""
        # At most one subset takes the remaining rows, and only when their number is given.
        fills = [name for name, subset in self.subsets.items() if subset.fill]
        if len(fills) > 1:
            raise Contradiction(
                f"only one subset may have fill: true, {', '.join(fills)} have it",
                *(("subsets", name, "fill") for name in fills),
            )
        if fills and self.rows_per_chunk is None:
            raise Contradiction(
                f"subsets.{fills[0]}.fill needs rows_per_chunk: "
                "without it every subset is used whole",
                ("rows_per_chunk",),
                ("subsets", fills[0], "fill"),
            )

        # Subsets of one origin must split it alike: else one could train on what another holds out.
        first_name_of: dict[str, str] = {}
        for name, subset in self.subsets.items():
            other = first_name_of.setdefault(self.origin_of(name), name)
            first_subset = self.subsets[other]
            if (first_subset.share, first_subset.split_by) != (subset.share, subset.split_by):
                raise Contradiction(
                    self._split_conflict(name, other), *_split_keys(name), *_split_keys(other)
                )
            if first_subset.drop_duplicates != subset.drop_duplicates:
                raise Contradiction(
                    f"subsets.{name}.drop_duplicates ({subset.drop_duplicates}) must "
                    f"equal that of subsets.{other} ({first_subset.drop_duplicates}): "
                    f"both have the origin {self.origin_of(name)!r}, and a text that "
                    "is left out of one could be held out, and trained on in the other",
                    *(("subsets", subset_name, "drop_duplicates") for subset_name in (name, other)),
                )

        return self

    def _split_conflict(self, name: str, other: str) -> str:
        """Error message for two subsets of one origin that split it differently."""
        this, that = self.subsets[name], self.subsets[other]
        cuts = (
            f"subsets.{name}.share {list(this.share)} by {this.split_by} must "
            f"equal subsets.{other}.share {list(that.share)} by {that.split_by}"
        )
        if this.paths == that.paths:
            return f"{cuts}: both read the same files, and a file must be on one side of the split"

        if this.origin or that.origin:
            return (
                f"{cuts}: both have the origin {self.origin_of(name)!r}; "
                "if their files are not the same, name another"
            )

        return (
            f"{cuts}: both have the origin {self.origin_of(name)!r}, the folder in front of "
            f"their files; if these are not the same, name another: subsets.{name}.origin"
        )

    def origin_of(self, name: str) -> str:
        """Name of a subset's files in every stage, independent of where they are stored."""
        subset = self.subsets[name]
        if subset.kind in STDLIB_ORIGINS:
            return STDLIB_ORIGINS[subset.kind]
        # Not resolved: the name of a link is the same on every machine, its target is not.
        return subset.origin or Path(os.path.abspath(fixed_folder(subset.paths[0]))).name or name

    @property
    def identity(self) -> dict[str, Any]:
        """All keys that decide the bytes of the output.

        Excludes where the output, the documents and the tokenizer's model are stored.
        """
        # The texts of `seen` are recorded by their hashes, see `run.publish`.
        excluded = {"output", "work", "executor", "max_rejected_share", "seen"}
        content = self.model_dump(mode="json", exclude=excluded)
        del content["tokenizer"]["model"]
        if self.tokenizer.dummy_prefix == "drop":
            del content["tokenizer"]["dummy_prefix"]
        for name, subset in content["subsets"].items():
            del subset["paths"], subset["expected_tokens"]
            # Keys that came later are no part of it by their default, so old folders stay valid.
            if not subset["where"]:
                del subset["where"]
            subset["origin"] = self.origin_of(name)
        # The order of the subsets decides rows and the allocation of odd samples. The hash sorts
        # its keys, so the order is an entry of its own.
        content["subset_order"] = list(self.subsets)
        return content

    @property
    def sha256(self) -> str:
        """Identity of the recipe: hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def work_folder(self) -> Path:
        """Folder for intermediate files; default: the output's name with `.work` added."""
        return self.work or self.output.with_name(self.output.name + ".work")


def _split_keys(name: str) -> tuple[tuple[str, ...], ...]:
    return ("subsets", name, "share"), ("subsets", name, "split_by")


def fixed_folder(pattern: str) -> Path:
    """Folder of a pattern in front of its first wildcard; without one, the folder that it names.

    Decided by the name alone, since a file's name must not depend on what is on the disk. A path
    with a suffix is a file, unless a slash follows.
    """
    path = Path(pattern)
    fixed = next((i for i, part in enumerate(path.parts) if any(c in part for c in "*?[")), None)
    if fixed is not None:
        return Path(*path.parts[:fixed])
    return path if pattern.endswith("/") or not path.suffix else path.parent
