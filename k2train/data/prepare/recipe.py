"""The recipe of a data folder: typed, complete, and checked as strictly as the config of a run.

A recipe and the documents decide every byte of the output, so its hash is the identity of the preparation and is kept
in the manifest. Command-line flags for the same choices were refused: a flag is not kept anywhere.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from k2train.config_text import Mistake, dotted, read_source
from k2train.data.prepare.documents import READERS
from k2train.errors import ConfigError

Count = Annotated[int, Field(ge=1, strict=True)]
Place = Annotated[float, Field(ge=0, le=1)]
Kind = Literal["stdlib_code", "stdlib_docstrings", "stdlib_topics"]
assert set(READERS) == {"stdlib_code", "stdlib_docstrings", "stdlib_topics"}, "every reader is a legal kind"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainTokenizer(_Section):
    """How to train the tokenizer when its model file is absent; `vocab_size` does not count the special tokens."""

    vocab_size: Count = 4096


class TokenizerRecipe(_Section):
    """A sentencepiece model; trained on all documents of the subsets, whatever their shares, when `train` is given."""

    model: Path
    train: TrainTokenizer | None = None


class SubsetRecipe(_Section):
    """A subset. `share` is the part of its sources, as an interval of [0, 1], that this data folder may use.

    `fill` marks the one subset that takes the rows which the others leave; the others are then used whole.
    """

    kind: Kind
    share: tuple[Place, Place] = (0.0, 1.0)
    limit_tokens: Count | None = None
    fill: bool = False

    @model_validator(mode="after")
    def _ascending(self) -> "SubsetRecipe":
        if not self.share[0] < self.share[1]:
            raise ValueError(f"share {list(self.share)} must go upwards, as [0.0, 0.8]")
        return self


class HeldOutRecipe(_Section):
    """Rows for validation, from sources that no chunk uses."""

    rows: Count


class Recipe(_Section):
    """One data folder. Without `rows_per_chunk` every sample is used and chunks differ by one row at most."""

    name: str = Field(min_length=1)
    output: Path
    seed: Annotated[int, Field(ge=0, strict=True)]
    sequence_length: Annotated[int, Field(ge=2, strict=True)]
    chunks: Count
    rows_per_chunk: Count | None = None
    tokenizer: TokenizerRecipe
    subsets: dict[str, SubsetRecipe] = Field(min_length=1)
    held_out: HeldOutRecipe | None = None

    @model_validator(mode="after")
    def _subsets_agree(self) -> "Recipe":
        fills = [name for name, subset in self.subsets.items() if subset.fill]
        if len(fills) > 1:
            raise ValueError(f"only one subset may have fill: true, {', '.join(fills)} have it")
        if fills and self.rows_per_chunk is None:
            raise ValueError(f"subsets.{fills[0]}.fill needs rows_per_chunk: without it every subset is used whole")
        shares: dict[str, tuple[str, tuple[float, float]]] = {}
        for name, subset in self.subsets.items():
            other, share = shares.setdefault(READERS[subset.kind].origin, (name, subset.share))
            if share != subset.share:
                raise ValueError(
                    f"subsets.{name}.share {list(subset.share)} must equal subsets.{other}.share {list(share)}: both "
                    f"read the same files, and a file must lie on one side"
                )
        return self

    @property
    def sha256(self) -> str:
        """Identity of all that decides the bytes: everything but where they, and the tokenizer's model, lie."""
        content = self.model_dump(mode="json", exclude={"output": True, "tokenizer": {"model"}})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and its `dotted.key=value` overrides. Raises ConfigError with every mistake, one a line."""
    source = read_source(path, overrides)
    mistakes = list(source.mistakes)
    recipe = None
    try:
        recipe = Recipe.model_validate(source.tree)
    except ValidationError as error:
        for item in error.errors():
            if item["loc"] not in source.broken:
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
    }
    parents = [part for part in where[:-1] if part in sections]
    return list((sections[str(parents[-1])] if parents else Recipe).model_fields)
