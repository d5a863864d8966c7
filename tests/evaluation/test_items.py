"""`evaluation/items.py`: catches likelihoods beside other choices, and answers by another rule."""

from types import SimpleNamespace
from typing import Any

from k2train.evaluation.items import item_of

TEXTS = ["a", "bbbb", "cc"]


def sample(**changes: Any) -> dict[str, Any]:
    return {
        "doc_id": 3,
        "doc": {},
        "target": 1,
        "arguments": [("q", " a"), ("q", " bbbb"), ("q", " cc")],
        "resps": [[(-2.0, True)], [(-4.0, False)], [(-3.0, False)]],
        "filter": "none",
        "metrics": ["acc"],
        "acc": 0.0,
        **changes,
    }


def task(kind: str = "multiple_choice") -> Any:
    return SimpleNamespace(
        OUTPUT_TYPE=kind,
        doc_to_choice=lambda doc: TEXTS,
        aggregation=lambda: {"bits": lambda values: -values[0][0] / values[0][1]},
    )


def test_choices_and_the_answer() -> None:
    item = item_of(task(), [sample()], ("s/1",))
    assert item.item == "3" and item.prompt == "q" and item.shots == ("s/1",)
    assert item.choices == (" a", " bbbb", " cc") and item.target == "bbbb"
    assert item.log_likelihoods == (-2.0, -4.0, -3.0) and item.greedy == (True, False, False)
    assert item.answer == 0 and item.scores == {"acc": 0.0}
    # By length: -2, -1, -1.5 a character.
    both = sample(metrics=["acc", "acc_norm"], acc_norm=1.0)
    assert item_of(task(), [both], ()).answer == 1


def test_requests_beyond_the_choices_are_no_choices() -> None:
    """Catches the likelihood of a choice without its context as a fourth choice."""
    more = sample()
    more["arguments"] = [*more["arguments"], ("", " a")]
    more["resps"] = [*more["resps"], [(-1.0, True)]]
    assert len(item_of(task(), [more], ()).log_likelihoods) == 3


def test_contexts_that_differ_are_the_choices() -> None:
    """Catches the same text three times, where a sentence is completed in its middle."""
    pairs = [(name, " end") for name in ("x", "y", "z")]
    item = item_of(task(), [sample(arguments=pairs)], ())
    assert item.choices == ("x", "y", "z")


def test_answers_texts_and_filters() -> None:
    strict = sample(
        arguments=[("q", {"until": []})],
        resps=[["one", "two"]],
        target="one",
        metrics=["exact_match"],
        exact_match=True,
        filter="strict",
    )
    other = {**strict, "filter": "flexible", "exact_match": 0.0}
    item = item_of(task("generate_until"), [strict, other], ())
    assert item.generated == ("one", "two") and item.choices == () and item.answer is None
    assert item.scores == {"exact_match,strict": 1.0, "exact_match,flexible": 0.0}

    text = sample(
        arguments=[("whole text",)], resps=[[-6.0]], target="t", metrics=["bits"], bits=(-6.0, 3)
    )
    item = item_of(task("loglikelihood_rolling"), [text], ())
    assert item.prompt == "" and item.log_likelihoods == (-6.0,) and item.scores == {"bits": 2.0}
