"""Findings of a contamination search: bounds, places with their steps, parts, and items.

- Plain values: the search makes them, reports and comparisons of scores read them.
- A place counts from the last of the first steps that trained on its rows.
- An item is what its most covered part is. Wrong choices are searched and never judged.
"""

from dataclasses import dataclass

from k2train.data.trace.exposures import Exposure
from k2train.errors import UserError
from k2train.evaluation.contamination_items import CHOICE

EXPOSED, PARTLY, CLEAN, SHORT = "exposed", "partly", "clean", "too short"


@dataclass(frozen=True)
class Rules:
    """When an item counts as seen. Raises UserError for values out of their range."""

    tokens: int = 13
    """Shortest span, N."""
    least_tokens: int = 8
    """Parts with fewer are not judged."""
    exposed: float = 0.8
    """Covered share from which an item is exposed."""
    clean: float = 0.2
    """Covered share below which it is clean."""
    places: int = 64
    """Places of a span that are looked at."""

    def __post_init__(self) -> None:
        if not 4 <= self.least_tokens <= self.tokens:
            raise UserError(
                f"--least-tokens ({self.least_tokens}) must be from 4 to --tokens ({self.tokens})"
            )
        if not 0 < self.clean <= self.exposed <= 1:
            raise UserError(
                f"--clean ({self.clean:g}) must be above 0 and at most --exposed "
                f"({self.exposed:g}), which is at most 1"
            )

    def needed(self, part_tokens: int) -> int:
        """Return the shortest span of a part that counts; 0 where it is not judged."""
        return 0 if part_tokens < self.least_tokens else min(self.tokens, part_tokens)

    def label(self, covered: float) -> str:
        """Return what an item with this covered share is."""
        return EXPOSED if covered >= self.exposed else PARTLY if covered >= self.clean else CLEAN


@dataclass(frozen=True)
class Row:
    """Tokens of one row that belong to a span, and the uses of the row."""

    data: str
    chunk: str
    row: int
    start: int
    tokens: int
    exposures: tuple[Exposure, ...]
    steps: tuple[int, ...]
    """Steps that trained on it, ascending; 0 for those of an earlier stage."""


@dataclass(frozen=True)
class Hit:
    """A place where a part of an item occurs."""

    first: int
    last: int
    """Bytes `first` to `last` of the part's text."""
    tokens: int
    rows: tuple[Row, ...]

    @property
    def step(self) -> int | None:
        """First step after which all of it was trained on; None when that was never."""
        firsts = [row.steps[0] for row in self.rows if row.steps]
        return max(firsts) if len(firsts) == len(self.rows) else None


@dataclass(frozen=True)
class PartFinding:
    """What is found of one part."""

    name: str
    tokens: int
    needed: int
    longest: int
    """Tokens of the longest span that was trained on."""
    covered: float
    """Share of its tokens in spans that were trained on."""
    step: int | None
    """First step after which it is exposed; None where it never is."""
    covered_in_data: float
    """The same share of all chunks, read or not."""
    with_answer: bool
    """Whether one span that was trained on has the end of the prompt and the whole answer."""
    hits: tuple[Hit, ...]

    @property
    def is_judged(self) -> bool:
        """Whether an item is judged by it: a wrong choice in the data gives nothing away."""
        return self.needed > 0 and not self.name.startswith(CHOICE)


@dataclass(frozen=True)
class ItemFinding:
    """One item: its parts, and what it counts as."""

    name: str
    label: str
    parts: tuple[PartFinding, ...]

    @property
    def worst(self) -> PartFinding | None:
        """The judged part that is covered most; None where all are too short."""
        return max(
            (part for part in self.parts if part.is_judged),
            key=lambda part: (part.covered, part.longest, part.covered_in_data),
            default=None,
        )

    @property
    def step(self) -> int | None:
        """First step after which one of its parts is exposed; None where none is."""
        steps = [part.step for part in self.parts if part.is_judged and part.step is not None]
        return min(steps, default=None)

    @property
    def with_answer(self) -> bool:
        """Whether a span has the end of the question and the whole answer."""
        return any(part.with_answer for part in self.parts)
