"""Ledger events and entries for tests: a required field that a test does not name is empty."""

from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, get_args, get_origin

from k2train.record.event import Event
from k2train.record.events import E, Entry


def event(kind: type[E], **facts: Any) -> E:
    """An event with these facts; other required fields are empty values of their types."""
    types = {
        key.name: key.type
        for key in fields(kind)
        if key.default is key.default_factory is MISSING and key.name not in facts
    }
    plain = {
        name: get_args(of)[0] if isinstance(of, UnionType) else get_origin(of) or of
        for name, of in types.items()
    }
    return kind(**{name: of() for name, of in plain.items()}, **facts)


def entries(*events: Event) -> list[Entry]:
    """The events as a ledger's entries, outside of any chain."""
    return [Entry(seq, "", "", event) for seq, event in enumerate(events)]
