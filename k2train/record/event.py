"""Base of the ledger's events: how a class becomes a line, and which name is of which class.

- A field that defaults to None is left out of the line when it is None: it was not set, or the
  ledger is older than the key. Any other None is written as null.
- The kinds are in `k2train.record.events`, which also reads them.
"""

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, ClassVar, dataclass_transform

EVENTS: dict[str, type["Event"]] = {}
"""Class of every event, by its name in the ledger."""
WRITE_NULL = {"null": True}
"""Metadata of a field that is written as null, although older ledgers lack it."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events, frozen dataclasses; `extra` holds keys that only a newer ledger has."""

    _name: ClassVar[str]
    extra: dict[str, Any] = field(default_factory=dict)

    def __init_subclass__(cls, name: str = "") -> None:
        dataclass(frozen=True, kw_only=True)(cls)
        if name:
            cls._name = name
            EVENTS[name] = cls

    @property
    def name(self) -> str:
        """Name of the event in the ledger."""
        return self._name

    def row(self) -> dict[str, Any]:
        """Return the event's part of its line."""
        values, extra = asdict(self), self.extra
        kept = [
            key.name
            for key in fields(self)[1:]
            if values[key.name] is not None or key.default is MISSING or key.metadata
        ]
        return {"event": self.name, **{key: values[key] for key in kept}, **extra}


class UnknownEvent(Event):
    """Event of a newer version; `extra` holds all its keys."""

    unknown: str

    @property
    def name(self) -> str:
        return self.unknown

    def row(self) -> dict[str, Any]:
        return {"event": self.unknown, **self.extra}
