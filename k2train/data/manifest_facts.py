"""Facts of a data folder's manifest: what a preparation recorded of itself (key `facts`).

- A key that is read again has a type here; every other one is kept as it is.

Alternatives considered:
- A plain dictionary: each reader would check the same keys once more.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field, StrictBool

from k2train.json_record import Number, Record, Whole


class Fact(Record):
    """Base of what a preparation may record besides: unknown keys are kept."""

    model_config = ConfigDict(extra="allow")


class TokenizerFacts(Fact):
    """The tokenizer's file in the data folder, and its control tokens in the order of their ids.

    `dummy_prefix` says what became of the space that the model puts in front of a text: `drop`,
    `keep`, or `as published` for imported ids; None for a model without, and in older folders.
    """

    file: str
    specials: tuple[str, ...]
    dummy_prefix: str | None = None

    @property
    def prefix(self) -> Literal["drop", "keep"]:
        """How the tokenizer is loaded, so that its hash is that of the manifest."""
        return "keep" if self.dummy_prefix == "keep" else "drop"


class TextFacts(Fact):
    """The record of the texts that a data folder was made of, see `text_record`."""

    file: str
    sha256: str
    count: Whole


class SubsetFacts(Fact):
    """A subset of a recorded recipe: the keys that are read again."""

    repeat: Number = 1
    limit_tokens: Whole | None = None
    fill: StrictBool = False


class RecipeFacts(Fact):
    """A recorded recipe: the keys that are read again."""

    name: str | None = None
    seed: Whole | None = None
    sequence_length: Whole | None = None
    chunks: Whole | None = None
    rows_per_chunk: Whole | None = None
    subsets: dict[str, SubsetFacts] = Field(default_factory=dict)


class ChatFacts(Fact):
    """How conversations became ids: by `k2` or a `jinja` template, whose text is in `file`.

    `learn` is whether responses are learned, or all. `identity` is the hash of all that decided it.
    """

    template: str
    file: str
    sha256: str
    learn: str
    identity: str | None = None


class Facts(Fact):
    """What the preparation recorded of itself; older and imported folders lack some of it.

    - `account`: what became of each subset's documents and tokens.
    - `road`: version of the preparation's code.
    - `document_keys`: see `data.document_keys`.
    - `texts`: see `data.text_record`; `seen`: hashes of these records of earlier folders, whose
      texts were left out.
    - `imported`: identity of an import of K2's files.
    """

    name: str | None = None
    imported: dict[str, Any] | None = None
    recipe_sha256: str | None = None
    recipe: RecipeFacts | None = None
    listing_sha256: str | None = None
    sources_sha256: str | None = None
    rejected_sha256: str | None = None
    tokenizer: TokenizerFacts | None = None
    texts: TextFacts | None = None
    seen: tuple[str, ...] = ()
    road: Whole | None = None
    python: str | None = None
    seed: Whole | None = None
    dropped_tail_tokens: dict[str, Whole] | None = None
    account: dict[str, dict[str, Number]] | None = None
    document_keys: dict[str, Any] | None = None
    chat: ChatFacts | None = None
