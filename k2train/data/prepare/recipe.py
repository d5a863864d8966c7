"""The recipe of a data folder: typed, complete, and checked as strictly as the config of a run.

A recipe and the documents decide every byte of the output, so its hash is the identity of the preparation and is kept
in the manifest. Command-line flags for the same choices were refused: a flag is not kept anywhere. Where the work is
done (`executor`, `work`) and where things lie (`output`, `paths`) are keys too, but no part of the identity.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from k2train.config_text import Mistake, dotted, read_source
from k2train.data.prepare.tokenizer import K2_SPECIAL_TOKENS
from k2train.errors import ConfigError

Count = Annotated[int, Field(ge=1, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Place = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[Place, Place]
StdlibKind = Literal["stdlib_code", "stdlib_docstrings", "stdlib_topics"]
FileKind = Literal["jsonl", "parquet", "text"]
STDLIB_ORIGINS = {"stdlib_code": "stdlib", "stdlib_docstrings": "stdlib", "stdlib_topics": "topics"}
WHOLE: Interval = (0.0, 1.0)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainTokenizer(_Section):
    """How to train the tokenizer when its model file is absent; `vocab_size` does not count the special tokens.

    A corpus larger than `max_bytes` is sampled by document, since training holds its text in memory.
    """

    vocab_size: Count = 4096
    max_bytes: Count = 2**26


class TokenizerRecipe(_Section):
    """A sentencepiece model; trained on all documents of the subsets, whatever their shares, when `train` is given.

    `specials` follow its pieces as ids; they exist only as ids and never come out of text.
    """

    model: Path
    train: TrainTokenizer | None = None
    specials: tuple[str, ...] = K2_SPECIAL_TOKENS

    @model_validator(mode="after")
    def _distinct(self) -> "TokenizerRecipe":
        if len(set(self.specials)) != len(self.specials):
            raise ValueError("specials names a token twice")
        return self


class FillInTheMiddle(_Section):
    """Shares of a subset's documents that are rearranged: prefix-suffix-middle, suffix-prefix-middle."""

    psm: Place = 0.0
    spm: Place = 0.0

    @model_validator(mode="after")
    def _at_most_all(self) -> "FillInTheMiddle":
        if self.psm + self.spm > 1:
            raise ValueError(f"psm ({self.psm}) + spm ({self.spm}) must not be above 1")
        return self


class SubsetRecipe(_Section):
    """A subset: where its documents are, which of them it takes, and how often.

    `share` is the part of what may be split (files, or documents: `split_by`), as an interval of [0, 1], that this data
    folder may use; stages with disjoint shares have nothing in common. `documents` is a part of those documents, drawn
    by the seed, so that subsets over the same files can take different ones. `repeat` is how often the documents are
    laid out, each time in another order; 0.5 is one half. `limit_tokens` caps what comes of it. `fill` marks the one
    subset that takes the rows which the others leave; the others are then used whole. `origin` names the files in every
    stage; left out, it is the folder in front of the first wildcard. `expected_tokens` is what one pass is said to hold,
    for `--estimate`.
    """

    kind: StdlibKind | FileKind
    paths: tuple[str, ...] = ()
    origin: str | None = None
    text_key: str = "text"
    id_key: str | None = None
    share: Interval = WHOLE
    documents: Interval = WHOLE
    split_by: Literal["source", "document"] = Field(default_factory=lambda data: _split_of(data.get("kind", "")))
    repeat: Annotated[float, Field(gt=0, le=100)] = 1.0
    fill_in_the_middle: FillInTheMiddle = FillInTheMiddle()
    min_characters: Natural = 1
    drop_duplicates: bool = Field(default_factory=lambda data: str(data.get("kind", "")).startswith("stdlib"))
    limit_tokens: Count | None = None
    fill: bool = False
    expected_tokens: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "SubsetRecipe":
        for name, (low, high) in (("share", self.share), ("documents", self.documents)):
            if not low < high:
                raise ValueError(f"{name} {[low, high]} must go upwards, as [0.0, 0.8]")
        if self.kind in STDLIB_ORIGINS:
            if self.paths or self.origin or self.id_key or self.split_by == "document":
                raise ValueError(
                    f"kind {self.kind} reads the standard library: paths, origin, id_key, split_by are not for it"
                )
        elif not self.paths:
            raise ValueError(f"paths is missing: kind {self.kind} needs the files, as [corpus/web/*.jsonl.zst]")
        return self

    @property
    def passes(self) -> int:
        """How often the documents are laid out, a begun pass included."""
        return int(-(-self.repeat // 1))


def _split_of(kind: str) -> Literal["source", "document"]:
    return "document" if kind in ("jsonl", "parquet") else "source"


class HeldOutRecipe(_Section):
    """Rows for validation, of documents that no chunk uses: the upper end of each subset's share.

    `share` of it, or as much as `rows` rows need; with both, `rows` are taken from the `share`.
    """

    rows: Count | None = None
    share: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "HeldOutRecipe":
        if self.rows is None and self.share is None:
            raise ValueError("give rows, or a share, or both")
        return self


class ExecutorRecipe(_Section):
    """Who does the tasks: processes of this machine, SLURM jobs, or a Ray cluster. Never changes a byte of the result.

    `workers` at once (left out: the cores of this machine; on SLURM and Ray 64). A task reads `task_bytes` of documents,
    or one file if that is larger, and holds `run_tokens` tokens in memory. `partition`, `time`, `memory_gb` and
    `arguments` (further sbatch options by name) are SLURM's; `environment` is a shell line run first there.
    """

    kind: Literal["local", "slurm", "ray"] = "local"
    workers: Count | None = None
    task_bytes: Count = 2**28
    run_tokens: Annotated[int, Field(ge=1024, strict=True)] = 2**25
    partition: str | None = None
    time: str = "04:00:00"
    memory_gb: Count = 4
    arguments: dict[str, str] = {}
    environment: str | None = None

    @model_validator(mode="after")
    def _slurm_has_a_partition(self) -> "ExecutorRecipe":
        if self.kind == "slurm" and self.partition is None:
            raise ValueError("partition is missing: kind slurm needs one (sinfo lists them)")
        return self


class Recipe(_Section):
    """One data folder. Without `rows_per_chunk` every sample is used and chunks differ by one row at most.

    `max_rejected_share`: a subset of which more documents than that are broken stops the preparation.
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
    document_borders: bool = False
    max_rejected_share: Place = 0.001
    executor: ExecutorRecipe = ExecutorRecipe()

    @model_validator(mode="after")
    def _subsets_agree(self) -> "Recipe":
        fills = [name for name, subset in self.subsets.items() if subset.fill]
        if len(fills) > 1:
            raise ValueError(f"only one subset may have fill: true, {', '.join(fills)} have it")
        if fills and self.rows_per_chunk is None:
            raise ValueError(f"subsets.{fills[0]}.fill needs rows_per_chunk: without it every subset is used whole")
        seen: dict[str, tuple[str, tuple[Interval, str]]] = {}
        for name, subset in self.subsets.items():
            key = self.origin_of(name)
            other, cut = seen.setdefault(key, (name, (subset.share, subset.split_by)))
            if cut != (subset.share, subset.split_by):
                raise ValueError(
                    f"subsets.{name}.share {list(subset.share)} by {subset.split_by} must equal subsets.{other}.share "
                    f"{list(cut[0])} by {cut[1]}: both read the same files, and a file must lie on one side"
                )
        return self

    def origin_of(self, name: str) -> str:
        """What the files of a subset are called in every stage, wherever they lie."""
        subset = self.subsets[name]
        if subset.kind in STDLIB_ORIGINS:
            return STDLIB_ORIGINS[subset.kind]
        return subset.origin or fixed_folder(subset.paths[0]).resolve().name or name

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the bytes: everything but where they, the documents and the tokenizer's model lie."""
        excluded = {"output", "work", "executor", "max_rejected_share"}
        content = self.model_dump(mode="json", exclude=excluded)
        del content["tokenizer"]["model"]
        for name, subset in content["subsets"].items():
            del subset["paths"], subset["expected_tokens"]
            subset["origin"] = self.origin_of(name)
        return content

    @property
    def sha256(self) -> str:
        """Identity of the recipe."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def work_folder(self) -> Path:
        return self.work or self.output.with_name(self.output.name + ".work")


def fixed_folder(pattern: str) -> Path:
    """The folder of a pattern in front of its first wildcard."""
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts) - 1)
    return Path(*parts[:fixed])


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and its `dotted.key=value` overrides. Raises ConfigError with every mistake, one a line."""
    source = read_source(path, overrides)
    mistakes = list(source.mistakes)
    recipe = None
    try:
        recipe = Recipe.model_validate(source.tree)
    except ValidationError as error:
        for item in error.errors():
            # What follows from a broken value is no mistake of its own.
            if item["loc"] not in source.broken and not item["type"].startswith("default_factory"):
                where = f"{dotted(item['loc'])}: " if item["loc"] else ""
                mistakes.append(Mistake(source.origin_of(item["loc"]), where + _explain(dict(item))))
    if mistakes or recipe is None:
        raise ConfigError("\n".join(str(mistake) for mistake in mistakes))
    return recipe


def _explain(error: dict[str, Any]) -> str:
    kind, where = error["type"], error["loc"]
    if kind == "extra_forbidden":
        legal = _keys_beside(where)
        near = difflib.get_close_matches(str(where[-1]), legal, n=1, cutoff=0.5)
        return f"unknown key; nearest is {near[0]}" if near else f"unknown key; legal are {', '.join(legal)}"
    if kind == "missing":
        return "missing; it has no default"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, is {error['input']!r}"


def _keys_beside(where: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[_Section]] = {
        "tokenizer": TokenizerRecipe,
        "subsets": SubsetRecipe,
        "held_out": HeldOutRecipe,
        "train": TrainTokenizer,
        "fill_in_the_middle": FillInTheMiddle,
        "executor": ExecutorRecipe,
    }
    parents = [part for part in where[:-1] if part in sections]
    return list((sections[str(parents[-1])] if parents else Recipe).model_fields)
