"""Resume drill of a recorded checkpoint, without an engine."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from k2train.errors import RunError
from k2train.record.events import Entry
from k2train.record.followed_events import CheckpointFollowed, FollowedStep
from k2train.replay import drill
from k2train.replay.replay import Replay

STEP = FollowedStep(
    step=6,
    chunk="chunk_002",
    rows=(0, 12),
    ids="ab",
    lr=0.01,
    loss=6.0,
    grad_norm=2.0,
    applied=True,
)


def replaying(path: Path, done: FollowedStep) -> Replay:
    """A replay that does `done` after checkpoint `path`, of which `STEP` is on record."""
    event = CheckpointFollowed(
        attempt=1,
        checkpoint=path.name,
        manifest_sha256="aa",
        setting={},
        config="",
        steps=(STEP,),
    )

    def step(number: int, world: int) -> tuple[FollowedStep, None]:
        return done, None

    config = SimpleNamespace(run=SimpleNamespace(exact=False))
    session = SimpleNamespace(
        setting={},
        state=SimpleNamespace(step=5),
        start=SimpleNamespace(setup=SimpleNamespace(config=config)),
        engine=SimpleNamespace(kernels=SimpleNamespace(deterministic=True), precision="fp32"),
        step=step,
    )
    run = SimpleNamespace(entries=(Entry(0, "t", "", event),))
    found: Any = SimpleNamespace(run=run, session_after=lambda *_: (session, 1))
    return cast(Replay, found)


def test_steps_that_cannot_be_compared_are_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `verified` for none of the steps, after a deferral has changed the order."""
    path = Path("ckpt_001")
    monkeypatch.setattr(drill, "manifest_sha256", lambda path: "aa")
    same = drill.drill_from(replaying(path, STEP), path, path)
    assert same.done == 1 and same.exact and not same.difference
    other = replaying(path, replace(STEP, chunk="chunk_003"))
    with pytest.raises(RunError, match="ckpt_001: the steps on record after it read other rows"):
        drill.drill_from(other, path, path)
