"""Fault row 30, endurance: one run under many kinds of faults.

Its end must equal an undisturbed run.

- Each attempt is drawn from the seed: how it ends, what else it must survive, and at which step.
- The length of an attempt follows from the remaining steps and faults, so both end together.
- A fault counts only when it was seen to fire.
- Effective time is MegaScale's formula: steps times the median step time, over all time from the
  first start to the end. With a fault every half second and steps of hundredths of a second it is
  small by construction. So the cost of one recovery is given too, and the effective time of a run
  that fails as often as a large one is known to.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fault_tests import disk_state
from fault_tests.endurance_faults import (
    ENDING,
    HARMLESS,
    LATE,
    LIVED_WITH,
    PATCH,
    Drawn,
    Kind,
    Scene,
    backstop,
)
from fault_tests.processes import Job
from fault_tests.restarts import Attempt, Restarts
from fault_tests.result import Bench, Result

STEPS_PER_CHUNK = 3
STEPS_PER_FAULT = 1.5
LIVED_WITH_PER_ATTEMPT = (0, 1, 2, 3)
FAULTS_PER_ATTEMPT = 2.2
"""What comes of it, as measured: not all that is drawn strikes."""
BACKSTOP = "SIGKILL in a step"
FAILURE_SECONDS = 3.09 * 3600
"""Mean time between unexpected interruptions of a published run on 16,384 GPUs."""
QUICK = (
    # A start that saved, two that are struck at the same step, and one that nothing strikes early.
    ("run.max_fruitless_starts", 5),
    ("batch.micro_sequences", 2),
    ("checkpoint.retry_seconds", 1.0),
    ("watch.step_seconds", 5.0),
    ("watch.heartbeat_seconds", 0.1),
)
"""Timeouts in proportion to a step of some hundredths of a second."""


class Endurance:
    """Draw faults and run attempts until both faults and steps are used up."""

    def __init__(
        self,
        bench: Bench,
        faults: int,
        progress: Callable[["Endurance"], object] = lambda run: None,
    ):
        self.bench, self.faults, self.progress = bench, faults, progress
        self.began = time.monotonic()
        self.draw = bench.random(30)
        chunks = max(8, round(faults * STEPS_PER_FAULT / STEPS_PER_CHUNK))
        self.restarts: Restarts = bench.restarts(
            bench.world(chunks, STEPS_PER_CHUNK).changed(*QUICK), "endurance"
        )
        self.restarts.verify_newest = 4
        self.kinds: Counter[str] = Counter()
        self.recoveries: list[float] = []
        self.fruitless = 0

    @property
    def done_faults(self) -> int:
        """Number of faults that have fired."""
        return sum(self.kinds.values())

    @property
    def run(self) -> Path:
        """Directory of the run."""
        return self.restarts.run

    def go(self) -> None:
        """Run to the end, or to the first result that a person would have to examine."""
        reported = 0
        while not self.restarts.done and len(self.restarts.attempts) < 4 * self.faults + 20:
            if self.bench.time_is_up:
                break
            attempt = self._attempt() if self.done_faults < self.faults else self.restarts.attempt()
            self.fruitless = self.fruitless + 1 if attempt.after <= max(attempt.before, 0) else 0
            if (first := attempt.first_step_seconds) is not None:
                self.recoveries.append(first)
            if 2 in attempt.codes or len(self.restarts.problems) > 20:
                self.restarts.problems.append(
                    f"a person was needed: {attempt.codes}: {attempt.text[-400:]}"
                )
                return
            if self.done_faults >= reported + 20:
                reported = self.done_faults
                self.bench.log(
                    f"endurance: {reported} faults, step {attempt.after} of "
                    f"{self.restarts.world.steps}, {len(self.restarts.attempts)} starts"
                )
                self.progress(self)

        # Without faults to the end, also where the time was up: only the end proves the bits.
        self.restarts.finish()

    def _attempt(self) -> Attempt:
        drawn = self.next_faults()
        patches = [value for _, one in drawn if (value := one.environment.get(PATCH))]
        self.restarts.environments = [{PATCH: ",".join(patches)}] * self.restarts.world.ranks

        def during(job: Job) -> None:
            for _, one in drawn:
                if one.during is not None:
                    one.during(job)

        attempt = self.restarts.attempt(";".join(one.text for _, one in drawn if one.text), during)
        self.restarts.environments = ()
        # A STOP laid down in the moment in which the run ended by itself was for a start that is
        # over.
        (self.run / "STOP").unlink(missing_ok=True)
        strikes = {name for _, _, name in attempt.job.strikes()}
        # A kind counts once an attempt: strikes are distinguished by their point, not by what
        # drew them.
        self.kinds.update({kind for kind, one in drawn if one.struck(strikes)})
        return attempt

    def next_faults(self) -> list[tuple[str, Drawn]]:
        """Draw the faults of the next attempt and its end; file damage is done at once."""
        newest = max(self.restarts.attempts[-1].after if self.restarts.attempts else 0, 0)
        left_steps, left_faults = self.restarts.world.steps - newest, self.faults - self.done_faults
        reach = max(2, round(1.5 * left_steps * FAULTS_PER_ATTEMPT / max(1, left_faults)))
        step = newest + self.draw.randint(1, reach)
        # Starts that die at one step again and again are refused, rightly; a person would have
        # looked by then: so nothing strikes early.
        tired = self.fruitless >= 2
        if tired:
            step = newest + 2 * STEPS_PER_CHUNK + 1
        scene = Scene(
            self.draw,
            self.restarts,
            self.bench.server,
            min(step, self.restarts.world.steps - 1),
            newest,
            STEPS_PER_CHUNK,
        )

        (ending,) = self._names(ENDING, LATE if tired else (), 1)
        lived = self._names(
            LIVED_WITH, HARMLESS if tired else (), self.draw.choice(LIVED_WITH_PER_ATTEMPT)
        )

        # Each kind once; one that waits for a step goes before the one that ends the attempt by
        # hand.
        names = [*dict.fromkeys(lived), ending]
        return [
            *((name, {**ENDING, **LIVED_WITH}[name][0](scene)) for name in names),
            (BACKSTOP, backstop(scene)),
        ]

    def _names(
        self, kinds: Mapping[str, tuple[Kind, float]], only: Sequence[str], count: int
    ) -> list[str]:
        names = sorted(only or kinds)
        return self.draw.choices(names, [kinds[name][1] for name in names], k=count)


def row_30(bench: Bench) -> Result:
    """Row 30: endurance."""
    run = Endurance(bench, bench.endurance, lambda run: bench.keep(report(bench, run)))
    run.go()
    return report(bench, run)


def report(bench: Bench, run: Endurance) -> Result:
    """The result of a run so far."""
    result = Result(
        30,
        "Endurance: many mixed faults in one run",
        "1,000 faults, no hand, final state bit-equal to the undisturbed run's; effective time "
        "reported",
        f"{bench.endurance} faults of {len(ENDING) + len(LIVED_WITH)} kinds drawn from the seed, "
        "one run, the same command each time; each start ends by one fault and meets up to three "
        "others before; only those seen to strike are counted",
    )
    result.seconds = seconds = time.monotonic() - run.began
    restarts, wanted = run.restarts, run.faults
    result.problems += restarts.problems
    if run.done_faults < wanted:
        why = "the time was up" if restarts.done else "the run had not come to its end"
        result.missing.append(f"{wanted - run.done_faults} of {wanted} faults: {why}")

    if run.done_faults < 1000:
        result.missing.append(f"1,000 faults: this was a run of {run.done_faults}")
    step = restarts.reference.step_seconds
    steps = restarts.world.steps if restarts.done else max(restarts.attempts[-1].after, 0)
    judged = seconds - sum(attempt.seconds for attempt in restarts.attempts)

    result.measured += [
        f"{run.done_faults} faults, {len(restarts.attempts)} starts, {steps} of "
        f"{restarts.world.steps} steps, {seconds:.0f} "
        f"s: a fault every {seconds / max(1, run.done_faults):.2f} s, a start every "
        f"{seconds / len(restarts.attempts):.2f} s; hands needed: "
        f"{sum(2 in a.codes for a in restarts.attempts)}",
        ", ".join(f"{kind}: {count}" for kind, count in sorted(run.kinds.items())),
    ]

    metrics = restarts.run / "metrics.jsonl"
    rows = len(disk_state.read_metrics(metrics)) if metrics.exists() else 0
    result.measured.append(
        f"effective time (steps x median step {step * 1000:.0f} ms / all time): "
        f"{steps * step / seconds:.1%}; of all time {judged:.0f} s went into looking at what "
        f"was left; {rows} steps were taken to make {steps}"
    )

    if run.recoveries:
        recovery = statistics.median(run.recoveries)
        result.measured.append(
            f"from a start to its first step: median {recovery:.2f} s; at one failure in 3.09 "
            f"hours that alone would cost {recovery / FAILURE_SECONDS:.3%} (arithmetic for this "
            "tiny model, not a measurement)"
        )

    result.measured.append(
        "fewest complete verified checkpoints after any attempt, once there were two: "
        f"{restarts.fewest_whole}"
    )
    return result
