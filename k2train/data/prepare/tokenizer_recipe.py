"""The tokenizer in a data recipe: its model, how to train it, its special tokens and spelling.

- A recipe decides ids, so everything here is part of its identity but where the model is stored.
- Alternatives considered: reading the spelling of the first word off the model alone; the chunks
  of other projects were made with either.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from k2train.config.messages import Contradiction
from k2train.data.load_tokenizer import default_specials, load_tokenizer
from k2train.data.tokenizer import K2_SPECIAL_TOKENS, DummyPrefix, Tokenizer

Count = Annotated[int, Field(ge=1, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]


class Section(BaseModel):
    """Base of all recipe sections: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainTokenizer(Section):
    """How to train the tokenizer when its model file is absent.

    `vocab_size` does not count the special tokens. A corpus larger than `max_bytes` is sampled by
    document, since training holds its text in memory.
    """

    vocab_size: Count = 4096
    max_bytes: Count = 2**26


class TokenizerRecipe(Section):
    """A sentencepiece model or a `tokenizer.json`, and how to train the first when it is absent.

    With `train` it is trained on all documents of the subsets, whatever their shares. `specials`
    get the ids after its pieces, none by default after those of a `tokenizer.json`. They exist only
    as ids and are never produced from text.
    `dummy_prefix` keeps or drops the space that LLaMA's model puts in front of a document.
    """

    model: Path
    train: TrainTokenizer | None = None
    specials: tuple[str, ...] = K2_SPECIAL_TOKENS
    dummy_prefix: DummyPrefix = "drop"

    def load(self, path: Path | None = None) -> Tokenizer:
        """Read the tokenizer, from `path` if it is not `model`. Raises DataError."""
        return load_tokenizer(path or self.model, self.specials, self.dummy_prefix)

    @model_validator(mode="before")
    @classmethod
    def _own_specials(cls, written: Any) -> Any:
        """Leave out K2's special tokens where the tokenizer is a file with its own."""
        if not isinstance(written, dict) or "specials" in written:
            return written
        model = written.get("model")
        if not isinstance(model, str | Path):
            return written
        return {**written, "specials": default_specials(Path(model))}

    @model_validator(mode="after")
    def _distinct(self) -> "TokenizerRecipe":
        if len(set(self.specials)) != len(self.specials):
            raise Contradiction("specials names a token twice", ("specials",))
        if self.train is not None and self.model.suffix == ".json":
            raise Contradiction(
                "train makes a sentencepiece model, and model names a tokenizer.json, which is not "
                "trained here: leave out train, or name a .model",
                ("train",),
            )
        return self
