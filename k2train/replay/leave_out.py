"""Checkpoints with one item of the state left out, every hash and digest made anew.

- The files then pass all checks: only doing the next steps tells that something is missing.
- The items are the fields of the training state and the states of the optimizer, so a new one is
  in the list by itself.

Alternatives considered:
- Changing bytes of the files: that is damage, and found while they are read.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from k2train.checkpoint.manifest import SaveFacts, read_manifest
from k2train.checkpoint.save_events import SavePolicy
from k2train.checkpoint.writer import CheckpointWriter
from k2train.replay.session import Session
from k2train.train.state import TrainState

NOTHING = "nothing"


class Item(NamedTuple):
    """An item of the state, and what leaves it out."""

    name: str
    leave_out: Callable[[Session], None]


def _no_shard(state: str) -> Callable[[Session], None]:
    def leave_out(session: Session) -> None:
        session.engine.optimizer.flat_shards[state].zero_()

    return leave_out


def _no_tensor(session: Session) -> None:
    # The smallest change of weights: one tensor as it was drawn is not there any more.
    optimizer = session.engine.optimizer
    slot = max(optimizer.shard_layout.slots, key=lambda slot: slot.elements)
    optimizer.view("master", slot).zero_()


def _rounded_master(session: Session) -> None:
    master = session.engine.optimizer.master
    master.copy_(master.bfloat16().float())


def _one_moment(session: Session) -> None:
    optimizer = session.engine.optimizer
    slot = min(optimizer.shard_layout.slots, key=lambda slot: slot.elements)
    optimizer.view("exp_avg", slot).zero_()


def _no_field(name: str) -> Callable[[Session], None]:
    fresh = TrainState()

    def leave_out(session: Session) -> None:
        setattr(session.state, name, getattr(fresh, name))
        session.engine.optimizer.adam_steps = session.state.adam_steps

    return leave_out


def items() -> list[Item]:
    """Return every item of the state."""
    return [
        Item(NOTHING, lambda session: None),
        Item("weights of one tensor", _no_tensor),
        Item("low bits of the master weights", _rounded_master),
        *(Item(f"optimizer state {name}", _no_shard(name)) for name in ("exp_avg", "exp_avg_sq")),
        Item("optimizer state exp_avg of one tensor", _one_moment),
        *(Item(f"TrainState.{part.name}", _no_field(part.name)) for part in fields(TrainState)),
    ]


@torch.no_grad()
def write_without(session: Session, source: Path, into: Path, item: Item) -> Path:
    """Save the state of checkpoint `source` without an item into folder `into`; collective.

    Returns the new checkpoint, of the same name.
    """
    session.load(source)
    item.leave_out(session)
    engine, state = session.engine, session.state
    manifest = read_manifest(source)
    facts: dict[str, Any] = manifest.model_dump(
        include=set(SaveFacts.model_fields), exclude_unset=True
    )
    # The state's own keys, as a run that had lost them would save them.
    facts |= {**state.to_json(), "guard": facts["guard"]}
    facts["adam_steps"] = engine.optimizer.adam_steps
    if item.name == "TrainState.guard":
        facts["guard"] = state.to_json()["guard"]

    writer = CheckpointWriter(into, session.grid, SavePolicy(asynchronous=False))
    try:
        frozen = writer.snapshot(
            engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype
        )
        writer.save(source.name, frozen, SaveFacts.model_validate(facts))
        writer.wait()
    finally:
        writer.close()
    return into / source.name
