"""Sentences for pydantic's mistakes: plain words, values as YAML spells them, each mistake once."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from k2train.config.messages import Contradiction, legal_keys, nearest, problems_of, unknown
from k2train.config.values import show


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _ascending(self) -> "Inner":
        if self.low > self.high:
            raise Contradiction("low must not be above high", ("low",), ("high",))
        return self


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    count: Annotated[int, Field(ge=1, strict=True)]
    kind: Literal["auto", "on", "off"] = "auto"
    name: str = Field("x", min_length=1)
    names: tuple[str, ...] = ("x",)
    pair: tuple[int, int] = (0, 1)
    follows: int = Field(default_factory=lambda data: data["count"])
    inner: Inner = Inner()
    by_name: dict[str, Inner] = {}


def problems(**values: Any) -> list[tuple[str, str]]:
    with pytest.raises(ValidationError) as refused:
        Outer.model_validate({"count": 1, **values})
    found = problems_of(refused.value, lambda path: unknown(None, legal_keys(Outer, path[:-1])))
    return [(".".join(map(str, problem.path)), problem.message) for problem in found]


@pytest.mark.parametrize(
    ("values", "path", "message"),
    [
        ({"count": "two"}, "count", "must be a whole number, is two"),
        ({"count": 1.5}, "count", "must be a whole number, is 1.5"),
        ({"count": 0}, "count", "must be at least 1, is 0"),
        ({"kind": "Autp"}, "kind", "Autp is not one of auto, on, off; nearest is auto"),
        ({"kind": None}, "kind", "null is not one of auto, on, off"),
        ({"name": ""}, "name", "must not be empty"),
        ({"name": 7}, "name", "must be text, is 7"),
        ({"names": "x"}, "names", "must be a list, written [a, b], is x"),
        ({"names": [None]}, "names.0", "must be text, is null"),
        ({"pair": [1]}, "pair.1", "missing; the list is too short"),
        ({"pair": [1, 2, 3]}, "pair", "must have 2 values, has 3"),
        ({"inner": 3}, "inner", "must be a section with keys of its own, is 3"),
        ({"inner": {"lo": 1}}, "inner.lo", "unknown key; legal are low, high"),
        ({"inner": {"low": [1]}}, "inner.low", "must be a number, is a list"),
        ({"inner": {"low": 2}}, "inner", "low must not be above high"),
        ({"by_name": {"a": {"lo": 1}}}, "by_name.a.lo", "unknown key; legal are low, high"),
        ({"by_name": [1]}, "by_name", "must be a section of names, each with a value of its own"),
    ],
)
def test_one_mistake_one_sentence(values: dict[str, Any], path: str, message: str) -> None:
    """Catches library jargon, Python's spelling of a value, and one mistake told twice, such as a
    default that follows a wrong key.
    """
    ((where, words),) = problems(**values)
    assert where == path and words.startswith(message)


def test_a_contradiction_names_its_keys() -> None:
    """Catches the line of a section blamed where two of its keys contradict each other."""
    with pytest.raises(ValidationError) as refused:
        Outer.model_validate({"count": 1, "by_name": {"a": {"low": 3, "high": 2}}})
    (problem,) = problems_of(refused.value, str)
    section = ("by_name", "a")
    assert problem.causes == ((*section, "low"), (*section, "high"), section)


def test_values_are_shown_on_one_line() -> None:
    """Catches a value that floods the terminal or breaks the line."""
    assert show("a\nb") == '"a\\nb"' and len(show("a" * 5000)) == 80
    assert [show(value) for value in (None, True, 1e-5, {}, ())] == [
        "null",
        "true",
        "1.0e-05",
        "a section",
        "a list",
    ]
    assert nearest("vocab", ["vocab_size", "max_bytes"]) == "vocab_size" and not nearest("x", ["y"])
    assert unknown("a.b", []) == "unknown key; nearest is a.b"
