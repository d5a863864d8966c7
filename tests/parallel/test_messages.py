"""Messages between ranks: values keep every bit, errors their kind, and nothing is executed."""

import json
import math
import pickle
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel, ConfigDict, TypeAdapter

from k2train.errors import CheckpointError, DataError, UnavailableError
from k2train.parallel.messages import (
    MAX_TEXT,
    PROBLEM,
    DiskRefused,
    ErrorFacts,
    MessageError,
    SaveError,
    decode,
    encode,
)


class Place(NamedTuple):
    """A tuple with names."""

    inode: int
    then: "Place | None" = None


@dataclass(frozen=True)
class Report:
    """A dataclass."""

    used: str
    states: dict[str, str] | None = None


class Facts(BaseModel):
    """A model that keeps what it does not know."""

    model_config = ConfigDict(frozen=True, extra="allow")
    bytes: int


@pytest.mark.parametrize(
    ("value", "kind"),
    (
        (None, int | None),
        (2**63 - 1, int),
        (-(2**63), int),
        (0.1 + 0.2, float),
        (5e-324, float),
        (-0.0, float),
        (math.inf, float | None),
        (-math.inf, float),
        ([1.0, math.inf], list[float]),
        ((("a", 1), True), tuple[tuple[str, int], bool]),
        (Place(2**60, Place(1)), Place),
        ({"w": Report("1", {"master": "2"}), "v": Report("3")}, dict[str, Report]),
        (({"f": Facts(bytes=3, later=[1])}, {}), tuple[dict[str, Facts], dict[str, int]]),
        ("a\udc80 \x00 \n \u2028", str),
        ("nan", str),
        ({"nan": ["inf"]}, dict[str, list[str]]),
    ),
    ids=repr,
)
def test_a_value_comes_back_as_it_was(value: Any, kind: Any) -> None:
    """Catches a tuple that becomes a list, a number that is rounded, and a class that is lost."""
    form: TypeAdapter[Any] = TypeAdapter(kind)
    back = decode(encode(value, form), form)
    assert back == value and repr(back) == repr(value) and type(back) is type(value)


def test_nan_is_a_number_again() -> None:
    form = TypeAdapter(tuple[float, float])
    (one, other) = decode(encode((math.nan, 1.5), form), form)
    assert math.isnan(one) and other == 1.5


def test_a_value_of_another_form_is_not_sent() -> None:
    """Catches a list where a tuple was agreed on, which the receiver would turn into one."""
    for value, kind in (([1], tuple[int]), ({1}, list[int]), (object(), Any), (b"\xff", bytes)):
        form: TypeAdapter[Any] = TypeAdapter(kind)
        with pytest.raises(MessageError, match="cannot be sent"):
            encode(value, form)


class Canary:
    """Unpickled, it would end this test."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a message was executed",)


@pytest.mark.parametrize(
    "content",
    (
        pickle.dumps(Canary()),
        b"{",
        b"[1, NaN]",
        b'{"a": 1, "a": 2}',
        b"[" * 5000,
        b"\xff",
        b'{"kind": "os.system", "text": 3}',
        b'["SaveError"]',
        b'["SaveError", "text", 1e999]',
    ),
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_message_is_refused_in_a_line(content: bytes) -> None:
    with pytest.raises(MessageError, match="another form") as error:
        decode(content, PROBLEM)
    assert "\n" not in str(error.value)


class LaterKind(DataError):
    """A kind of error that the list does not know."""


@pytest.mark.parametrize(
    ("error", "kind"),
    (
        (CheckpointError("gone"), CheckpointError),
        (DiskRefused("full"), DiskRefused),
        (UnavailableError("away", 116), UnavailableError),
        (LaterKind("bad row"), DataError),
        (KeyError("x"), SaveError),
    ),
    ids=repr,
)
def test_an_error_comes_back_as_its_kind(error: Exception, kind: type[Exception]) -> None:
    """Catches a mistake of a user (2) that another rank takes for a crash (1)."""
    facts = decode(encode(ErrorFacts.of(error), PROBLEM), PROBLEM)
    assert facts is not None
    back = facts.error()
    assert type(back) is kind and str(back) == str(error)
    assert getattr(back, "number", 0) == getattr(error, "number", 0)


@pytest.mark.parametrize("name", ("SystemExit", "os.system", "", "LaterKind", "BaseException"))
def test_an_unknown_kind_is_a_save_error(name: str) -> None:
    """Catches a message that chooses which class is made."""
    facts = decode(json.dumps([name, "text"]).encode(), PROBLEM)
    assert facts is not None
    assert type(facts.error()) is SaveError and str(facts.error()) == "text"


def test_a_text_without_end_is_cut() -> None:
    assert len(str(ErrorFacts.of(SaveError("x" * 10**6)).error())) == MAX_TEXT
