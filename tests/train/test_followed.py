"""Steps after a checkpoint: what is recorded when, and what a comparison finds."""

from dataclasses import replace
from math import nan

import pytest

from k2train.data.order import ChunkOrder
from k2train.record.event import Event
from k2train.record.events import CheckpointSaved, Entry, Resumed
from k2train.record.followed_events import CheckpointFollowed, FollowedStep, ResumeDrilled
from k2train.train.followed import (
    Comparison,
    FollowedRecord,
    Recorded,
    changed_facts,
    comparable_steps,
    drill_is_due,
    half_recorded,
    recorded_steps,
    step_difference,
)
from k2train.train.repeat import reads_the_same
from k2train.train.rounding import Rounding

SETTING = {"tensor": "1"}


def step(number: int, loss: float = 6.0, **changes: object) -> FollowedStep:
    of = FollowedStep(
        step=number,
        chunk="chunk_001",
        rows=(0, 12),
        ids="ab",
        lr=0.01,
        loss=loss,
        grad_norm=2.0,
        applied=True,
    )
    return replace(of, **changes)


def entries(*events: Event) -> list[Entry]:
    return [Entry(n, "t", "", event) for n, event in enumerate(events)]


class Written(list[CheckpointFollowed]):
    """What a record has written."""

    def record(self) -> FollowedRecord:
        return FollowedRecord(1, SETTING, "config", self.append)

    def told(self) -> list[tuple[str, str, list[int]]]:
        return [
            (event.checkpoint, event.manifest_sha256, [part.step for part in event.steps])
            for event in self
        ]


def test_written_once_two_steps_and_the_hash_are_known() -> None:
    """Catches a record before the checkpoint is whole, and one that waits for a third step."""
    written = Written()
    record = written.record()
    record.saving("ckpt_001", 5)
    record.step_done(step(6), trusted=True)
    record.step_done(step(7), trusted=True)
    assert written == []
    record.saved("ckpt_001", "aa")
    record.step_done(step(8), trusted=True)
    assert written.told() == [("ckpt_001", "aa", [6, 7])]


def test_saves_that_overlap_each_have_their_steps() -> None:
    """Catches the steps of one checkpoint that are taken for those of another."""
    written = Written()
    record = written.record()
    for number in (5, 6):
        record.saving(f"ckpt_{number}", number)
        record.saved(f"ckpt_{number}", "aa")
        record.step_done(step(number + 1), trusted=True)
    record.step_done(step(8), trusted=True)
    assert written.told() == [("ckpt_5", "aa", [6, 7]), ("ckpt_6", "aa", [7, 8])]


def test_a_step_that_is_not_the_next_one_ends_a_record() -> None:
    """Catches steps after a return to an earlier checkpoint, and values changed on purpose."""
    for following, trusted in ((step(3), True), (step(6), False)):
        written = Written()
        record = written.record()
        record.saving("ckpt_001", 5)
        record.saved("ckpt_001", "aa")
        record.step_done(following, trusted)
        record.step_done(step(6), trusted=True)
        record.step_done(step(7), trusted=True)
        assert written == []


def test_one_step_is_completed_by_the_next_start() -> None:
    """A run that stops one step after a checkpoint; the next start does the second."""
    written = Written()
    record = written.record()
    record.saving("ckpt_001", 5)
    record.saved("ckpt_001", "aa")
    record.step_done(step(6), trusted=True)
    record.end()
    assert written.told() == [("ckpt_001", "aa", [6])]

    record = written.record()
    record.go_on(half_recorded(entries(*written), 6))
    record.step_done(step(7), trusted=True)
    assert written.told()[-1] == ("ckpt_001", "aa", [6, 7])
    assert half_recorded(entries(*written), 7) is None, "two steps are all"


@pytest.mark.parametrize(
    ("now", "words"),
    (
        (step(6), ""),
        (step(6, 6.000000000000001), "has loss 6.000000000000001, recorded 6.0"),
        (step(6, nan), "has loss nan"),
        (step(6, grad_norm=2.5), "has grad_norm 2.5, recorded 2.0, 0.5 apart"),
        (step(6, ids="cd"), "was fed other ids"),
        (step(6, lr=0.02), "used the rate 0.02"),
        (step(6, applied=False), "was skipped"),
        (step(1), "was done in the place of step 6"),
    ),
)
def test_every_number_of_a_step_counts(now: FollowedStep, words: str) -> None:
    found = step_difference(step(6), now, 1, None)
    assert found.startswith(words) and bool(found) == bool(words)


def test_rounding_grows_with_the_steps_and_refuses_nan() -> None:
    """Catches a bound that any step passes: it is some millionths in the first one."""
    rounding = Rounding("fp32")
    assert step_difference(step(6), step(6, 6.0 * (1 + 1e-6)), 1, rounding) == ""
    assert "rounding explains" in step_difference(step(6), step(6, 6.0 * (1 + 1e-5)), 1, rounding)
    assert step_difference(step(6), step(6, 6.0 * (1 + 1e-5)), 10, rounding) == ""
    assert step_difference(step(6), step(6, nan), 10, rounding) != ""
    assert step_difference(step(6, nan), step(6, nan), 1, rounding) == "", "a skipped step"


def comparison(**changes: object) -> Comparison:
    recorded = Recorded("ckpt_001", "aa", SETTING, "config", (step(6), step(7)))
    return Comparison(recorded, None, **changes)  # type: ignore[arg-type]


def test_the_second_step_tells_what_is_lost() -> None:
    found = comparison()
    found.compare(step(6))
    assert not found.complete
    found.compare(step(7, 6.1))
    assert found.complete and "step 6 equals its record, step 7 has loss 6.1" in found.difference
    assert "the weights are whole; moments" in found.difference


def test_another_order_or_config_ends_a_comparison() -> None:
    """A chunk that was deferred meanwhile, or a rate changed on purpose, is no bad restart."""
    found = comparison()
    found.compare(step(6, 9.0, chunk="chunk_002"))
    assert found.complete and not found.difference and found.done == 0

    found = comparison(comparable=1, same_config=False)
    found.compare(step(6, lr=0.5))
    assert found.complete and not found.difference and found.done == 1


@pytest.mark.parametrize(
    ("config", "setting", "steps"),
    (
        ("config", {}, 2),
        ("config", {"precision": "fp32"}, 2),
        ("other", {}, 1),
        ("other", {"tensor": "2", "exact": "(1, 2)"}, 1),
        ("other", {"precision": "fp32"}, 0),
        ("other", {"cross_documents": "block"}, 0),
        ("other", {"fp8": "True"}, 0),
        ("other", {"of a later version": "1"}, 1),
    ),
)
def test_what_was_permitted_is_no_bad_restart(
    config: str, setting: dict[str, str], steps: int
) -> None:
    """A run that goes on in another precision (`run.allow`) has another first loss on purpose."""
    before = {"precision": "bf16", "cross_documents": "attend", "fp8": "False", "exact": "False"}
    recorded = Recorded("ckpt_001", "aa", {**SETTING, **before}, "config", (step(6), step(7)))
    assert comparable_steps(recorded, {**SETTING, **before, **setting}, config) == steps
    older = recorded._replace(setting=SETTING)
    assert comparable_steps(older, {**SETTING, **setting}, config) >= 1, "it says nothing of them"


def test_steps_of_another_order_are_other_steps() -> None:
    """Catches a checkpoint whose steps are not recorded anew once its next chunk is deferred."""
    order = ChunkOrder(("chunk_001", "chunk_002"), (24, 24), 12)
    own = [step(1, rows=(0, 12)), step(2, rows=(12, 24)), step(3, chunk="chunk_002", rows=(0, 12))]
    assert reads_the_same(order, own)
    assert not reads_the_same(order, [own[0], replace(own[1], rows=(0, 12))])
    assert not reads_the_same(order, [replace(own[0], chunk="chunk_002")])
    assert not reads_the_same(order, [step(5, chunk="chunk_002")]), "after the last one"


def followed(sha256: str, loss: float) -> CheckpointFollowed:
    return CheckpointFollowed(
        attempt=1,
        checkpoint="ckpt_001",
        manifest_sha256=sha256,
        setting=SETTING,
        config="config",
        steps=(step(6, loss), step(7)),
    )


def test_the_record_is_that_of_the_checkpoint() -> None:
    """Catches the steps of a checkpoint of the same name that was set aside since."""
    known = entries(followed("aa", 1.0), followed("bb", 2.0), followed("bb", 3.0))
    found = recorded_steps(known, "ckpt_001", "bb")
    assert found is not None and found.steps[0].loss == 3.0
    assert recorded_steps(known, "ckpt_001", "cc") is None


def saved(sha256: str, **changes: object) -> CheckpointSaved:
    event = CheckpointSaved(
        checkpoint="ckpt_001",
        attempt=1,
        step=5,
        chunks_consumed=1,
        consumed_tokens=960,
        loss=6.0,
        held_out_loss=None,
        bytes=1,
        manifest_sha256=sha256,
    )
    return replace(event, **changes)


def test_a_checkpoint_in_the_place_of_another_must_do_its_steps() -> None:
    """Catches a copy without moments whose digests were made anew: nothing is on record of it,
    before and after a start that found it there.
    """
    known = [followed("aa", 1.0), saved("aa")]
    for more in ([], [saved("ff", recovered=True)]):
        found = recorded_steps(entries(*known, *more), "ckpt_001", "ff")
        assert found is not None and found.steps[0].loss == 1.0
    # Saved again since, by the run: that one counts, and its steps are still to come.
    assert recorded_steps(entries(*known, saved("bb")), "ckpt_001", "bb") is None
    # The run went back behind it: what is there now is of another branch.
    back = Resumed(
        attempt=2,
        checkpoint="ckpt_000",
        step=0,
        refused=(),
        set_aside=("ckpt_001",),
        layout="",
        world_size=1,
        config_changes=(),
    )
    assert recorded_steps(entries(*known, back), "ckpt_001", "ff") is None


def drilled(**changes: object) -> ResumeDrilled:
    event = ResumeDrilled(
        attempt=1,
        checkpoint="ckpt_001",
        manifest_sha256="aa",
        setting=SETTING,
        reloaded=True,
        steps=2,
        bits=True,
        changed=(),
        same=True,
    )
    return replace(event, **changes)


def test_a_change_of_the_setting_is_short() -> None:
    """Catches two kernels lines of 300 characters each, in which one number differs, and a change
    that is told as none.
    """
    before = {"tensor": "2", "kernels": "norm fused, compile on", "threads": "1"}
    for after, told in (
        ("norm fused, compile on, compiled code 2", "nothing -> compiled code 2"),
        ("norm torch, compile on", "norm fused -> norm torch"),
        ("norm fused", "compile on -> nothing"),
        ("compile on, norm fused", "norm fused, compile on -> compile on, norm fused"),
    ):
        now = {**before, "tensor": "1", "kernels": after}
        assert changed_facts(before, now) == ("tensor 2 -> 1", f"kernels {told}")
    assert changed_facts({}, {"kernels": "a, b"}) == ("kernels unknown -> a, b",)


def test_a_setting_is_drilled_once() -> None:
    """Catches a drill after every save, and none where the last one failed or was of another."""
    assert drill_is_due([], SETTING)
    assert not drill_is_due(entries(drilled()), SETTING)
    for changes in ({"same": False}, {"bits": False}, {"setting": {"tensor": "2"}}):
        assert drill_is_due(entries(drilled(**changes)), SETTING)
