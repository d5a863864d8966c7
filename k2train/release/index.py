"""The index of a release: every checkpoint ever saved, every artefact promised, and the gaps.

- `index.json` is for programs, `INDEX.md` the same for people. A gap is a line with its reason.
- What was redacted is listed with the hash of the original.

Alternatives considered:
- A list of what is there: a reader could not tell what was left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from k2train.release.choice import Line
from k2train.release.stage import Artefact
from k2train.text import clean, counted, markdown_table, number

FORMAT = 1


@dataclass
class Index:
    """Content of an index."""

    name: str
    artefacts: list[Artefact] = field(default_factory=list)
    checkpoints: dict[str, Sequence[Line]] = field(default_factory=dict)
    """By stage, in the order of its ledger."""
    redacted: dict[str, str] = field(default_factory=dict)
    """File -> SHA-256 of the original."""
    values: int = 0
    """Values that were replaced."""

    def add(self, name: str, stage: str, place: str | None, reason: str = "") -> None:
        """Add an artefact; without a place, a gap with its reason."""
        assert place or reason, f"{name} is neither released nor has a reason"
        self.artefacts.append(Artefact(name, stage, place, reason))

    @property
    def gaps(self) -> list[Artefact]:
        """Artefacts that are not released."""
        return [one for one in self.artefacts if one.place is None]

    def content(self) -> dict[str, Any]:
        """Return the content of `index.json`."""
        return {
            "format": FORMAT,
            "name": self.name,
            "artefacts": [asdict(one) for one in self.artefacts],
            "checkpoints": {
                stage: [asdict(line) for line in lines] for stage, lines in self.checkpoints.items()
            },
            "redacted": {"values": self.values, "originals": self.redacted},
        }

    def page(self) -> str:
        """Return the same for people, in Markdown."""
        lines = [f"# Index of {clean(self.name)}", "", "## Artefacts", ""]
        lines += markdown_table(
            ("artefact", "stage", "released", "why not"), map(_artefact_row, self.artefacts)
        )
        for stage, checkpoints in self.checkpoints.items():
            released = sum(line.released for line in checkpoints)
            lines += ["", f"## Checkpoints of {clean(stage)}", ""]
            lines += [f"{counted(len(checkpoints), 'checkpoint')} saved, {released} released.", ""]
            lines += markdown_table(_HEADINGS, map(_line_row, checkpoints))
        return "\n".join([*lines, *self._redacted_part(), ""])

    def _redacted_part(self) -> list[str]:
        if not self.redacted:
            return ["", "Nothing was redacted: the record is the run's, byte for byte."]
        rows = [(name, original) for name, original in sorted(self.redacted.items())]
        return [
            "",
            "## Redacted",
            "",
            f"{counted(self.values, 'value')} with a path or the name of a machine or user "
            "were replaced. Ledger and manifests were sealed anew: their chain and hashes are "
            "those of the redacted files, and signatures of the originals do not apply.",
            "",
            *markdown_table(("file", "SHA-256 of the original"), rows),
        ]


_HEADINGS = ("checkpoint", "kind", "step", "tokens", "loss", "held-out", "released", "why not")


def _artefact_row(one: Artefact) -> tuple[str, ...]:
    place = "no" if one.place is None else f"`{one.place}`"
    return clean(one.name), clean(one.stage) if one.stage else "all", place, clean(one.reason)


def _line_row(line: Line) -> tuple[str, ...]:
    released = "no" if not line.released else "with states" if line.states else "weights"
    return (
        line.checkpoint,
        line.kind,
        number(line.step),
        number(line.consumed_tokens),
        number(line.loss, 4),
        number(line.held_out_loss, 4),
        released,
        clean(line.reason),
    )


def page_of(content: Mapping[str, Any]) -> str:
    """Return the page of an index that was read. Raises ValueError when it is none."""
    try:
        index = Index(
            content["name"],
            [Artefact(**one) for one in content["artefacts"]],
            {
                stage: [Line(**one) for one in lines]
                for stage, lines in content["checkpoints"].items()
            },
            dict(content["redacted"]["originals"]),
            content["redacted"]["values"],
        )
        return index.page()
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"is no index of a release ({error!r:.80})") from None
