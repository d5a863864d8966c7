"""One line of a diagnosis: what was looked at, how it is, and what to do."""

from typing import Literal, NamedTuple

State = Literal["ok", "note", "FAIL"]


class Finding(NamedTuple):
    """What was found. FAIL is for what no run can do without, note for what some runs need."""

    state: State
    what: str
    text: str

    def line(self) -> str:
        """Return the finding as one line of a page."""
        return f"{self.state:<4}  {self.what:<13} {self.text}"
