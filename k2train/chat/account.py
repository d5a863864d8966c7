"""Account of a chat preparation: what was read, left out and why, and what became of it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from k2train.text import counted, percent

EXAMPLES = 3
"""Places that are shown for one reason."""


@dataclass
class Account:
    """Counts of one preparation. A place is `file:line`."""

    read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    cut: int = 0
    """Conversations that lost a question at the end without a response."""
    forged: int = 0
    """Conversations with the name of a control token in a message; it stayed text."""
    first_forged: str = ""
    conversations: int = 0
    rows: int = 0
    """Rows of all epochs, without those held out."""
    held_out_rows: int = 0
    tokens: int = 0
    """Tokens of all rows, padding included."""
    padding: int = 0
    targets: int = 0

    def leave_out(self, kind: str, place: str, reason: str) -> None:
        """Count a record that is not used; `kind` groups reasons."""
        self.left_out[kind] += 1
        listed = self.examples.setdefault(kind, [])
        if len(listed) < EXAMPLES:
            listed.append(f"{place}: {reason}")

    def note_forged(self, place: str) -> None:
        """Count a conversation that quotes a control token."""
        self.forged += 1
        self.first_forged = self.first_forged or place

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest records."""
        return {
            "read": self.read,
            "conversations": self.conversations,
            "left_out": dict(sorted(self.left_out.items())),
            "cut": self.cut,
            "forged": self.forged,
            "padding_tokens": self.padding,
            "targets": self.targets,
        }

    def lines(self, sequence_length: int) -> Iterator[str]:
        """Yield lines for people."""
        yield f"read: {counted(self.read, 'record')}, {self.conversations:,} of them used"
        for kind, count in self.left_out.most_common():
            yield f"left out: {count:,} {kind}"
            yield from (f"  {example}" for example in self.examples[kind])
        if self.cut:
            yield f"cut off: the question at the end of {counted(self.cut, 'conversation')}"
        if self.forged:
            yield (
                f"kept as text: names of control tokens in messages of "
                f"{counted(self.forged, 'conversation')}, the first at {self.first_forged}"
            )
        yield (
            f"packed: {counted(self.rows, 'row')} of {sequence_length} tokens, and "
            f"{self.held_out_rows:,} held out; {percent(self.targets, self.tokens)} of "
            f"{self.tokens:,} tokens are learned, {percent(self.padding, self.tokens)} are padding"
        )
