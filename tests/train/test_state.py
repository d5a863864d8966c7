"""Training state through a manifest: every item, exactly, and nothing made up.

Would catch an item of the state that a checkpoint forgets, and damage that passes for a state.
"""

import dataclasses
import json
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

import pytest

from k2train.checkpoint.manifest import SaveFacts
from k2train.errors import CheckpointError
from k2train.guard.drift import Drift
from k2train.guard.nonfinite import NonFiniteCounter
from k2train.guard.reaction import OutlierCounter, Reaction, Return
from k2train.guard.spikes import SpikeAlert
from k2train.train.state import Guards, TrainState
from tests.support.tiny_model import save_facts


def in_a_spike() -> SpikeAlert:
    alert = SpikeAlert()
    for step in range(1, 102):
        alert.observe(step, 2.0 + step % 7 / 100 if step <= 100 else 9.0, 1.0, 0.5)
    # What no open event leaves behind together with it.
    alert.unusual_since = 100
    alert.drift = Drift([2.0], [2.0], [2.0], score=1.0, since=90, warned=True)
    return alert


STATE = TrainState(
    step=101,
    adam_steps=99,
    loss=9.0,
    parent={"parent": "runs/a/checkpoints/ckpt_004", "moments_kept": True},
    guard=Guards(
        NonFiniteCounter(in_a_row=1, total=3),
        in_a_spike(),
        Reaction(OutlierCounter(in_a_row=1, total=2), Return("malignant", onset=90, until=120)),
    ),
)
"""Every field has a value that no new state has."""


def saved(state: TrainState) -> SaveFacts:
    """What a reader gets of it, after the JSON of the manifest."""
    facts = save_facts(**state.to_json())
    return SaveFacts.model_validate(json.loads(json.dumps(facts.model_dump(exclude_unset=True))))


def leaves(value: Any, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every field of the state that is no state of its own, by its place."""
    if not is_dataclass(value):
        return {place: value}
    found = [leaves(getattr(value, f.name), (*place, f.name)) for f in fields(value)]
    return {name: leaf for part in found for name, leaf in part.items()}


@pytest.mark.parametrize("place", leaves(TrainState()), ids=".".join)
def test_every_item_is_saved_and_restored(place: tuple[str, ...]) -> None:
    """Catches a field that is added to the state, but not to its JSON form or to this test."""
    item = attrgetter(".".join(place))
    assert item(STATE) != item(TrainState()), f"give {'.'.join(place)} a value in STATE"
    assert item(TrainState.of(saved(STATE))) == item(STATE)


def test_the_keys_are_those_of_the_format() -> None:
    """Older checkpoints have them under these names."""
    assert {*STATE.to_json()} == {"step", "adam_steps", "loss", "parent", "guard"}
    assert {*STATE.to_json()["guard"]} == {"finite", "spikes", "reaction"}
    assert {*STATE.to_json()["guard"]["spikes"]} == {
        "losses",
        "log_grads",
        "open",
        "log_updates",
        "usual",
        "accepted",
        "unusual_since",
        "drift",
    }


def test_a_new_item_needs_one_field() -> None:
    """It is saved under its name, and has its default in checkpoints from before it."""

    @dataclasses.dataclass
    class Longer(TrainState):
        deferred: tuple[str, ...] = ()

    longer = Longer(**vars(STATE), deferred=("chunk_003",))
    assert Longer.of(saved(longer)) == longer
    assert Longer.of(saved(STATE)) == Longer(**vars(STATE))


def test_the_saved_state_is_a_copy() -> None:
    """Training continues while a checkpoint is written."""
    state = TrainState.of(saved(STATE))
    text = json.dumps(written := state.to_json())
    state.step += 1
    state.guard.finite.observe(False)
    state.guard.spikes.observe(102, 9.0, 9.0)
    assert json.dumps(written) == text and state != STATE


FINITE = {"in_a_row": 0, "total": 0}
SPIKES: dict[str, Any] = {"losses": [], "log_grads": [], "open": None}


@pytest.mark.parametrize(
    ("guard", "words"),
    (
        (None, "key 'guard' must be an object, is None"),
        ({}, "guard.finite.in_a_row is missing"),
        ({"finite": FINITE}, "guard.spikes.losses is missing"),
        ({"finite": {"total": 1}, "spikes": SPIKES}, "guard.finite.in_a_row is missing"),
        (
            {"finite": FINITE | {"in_a_row": "many"}, "spikes": SPIKES},
            "key 'in_a_row' must be a whole number",
        ),
        ({"finite": [], "spikes": SPIKES}, "guard: key 'finite' must be an object, is []"),
        (
            {"finite": FINITE, "spikes": SPIKES | {"losses": [1.0, "x"]}},
            "losses[1]: must be a number, is 'x'",
        ),
    ),
)
def test_what_is_no_state_is_refused(guard: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        TrainState.of(save_facts(1, 1, guard=guard))
    assert words in str(caught.value) and str(caught.value).isprintable()


def test_what_is_saved_is_what_is_read() -> None:
    """Catches a state that a reader finds changed: the stage before is told with a tuple."""
    state = TrainState(step=3, parent={"data_in_common": ("chunk_000", "chunk_001")})
    assert state.to_json() == json.loads(json.dumps(state.to_json()))
