"""GPU benchmark part `models`: LLaMAs of 1.3B to 6.7B at 2048 and 8192 beside peers on equal ids.

- The smallest model at the shortest length comes first, with the fair peer; what has no time then
  is named.
- All contenders of one work are in memory at once and step in turns, if the device can hold them.
- Otherwise they run one after another, and the row says so.
- What does not fit is tried again with recomputation.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch

from benchmarks.cpu.contract import UnavailableError
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import world_of_one
from benchmarks.gpu.peers import (
    FAIR_BYTES,
    OUR_BYTES,
    PEER_BYTES,
    Contender,
    k2train_contender,
    peer_contenders,
)
from benchmarks.gpu.rows import FAIR
from benchmarks.gpu.sizes import Batch, Sizes, sizes
from benchmarks.gpu.timing import Timer, Timing
from k2train.parallel.grid import ProcessGrid
from k2train.plan.cost import ModelShape, flops_per_token, parameters
from k2train.text import bytes_text

ACTIVATION_BYTES = 60
"""Roughly what a peer keeps of a token for each layer and unit of hidden size: only says whether to
try at once.
"""
SPARE = 0.95
"""Share of the device's memory that states may fill."""
WARM_UP_STEPS = 3
FIRST_COMPILE_SECONDS = 30.0
"""What a compilation is taken to need until one was seen: nobody can stop it half-way."""
PEERS = (FAIR, "transformers", "reference")
BYTES = {FAIR: FAIR_BYTES, "transformers": PEER_BYTES, "reference": PEER_BYTES}
"""Bytes of a parameter, by peer."""
Build = Callable[[], list[Contender]]
Ready = tuple[Contender, dict[str, Any]]


class Outcome(Enum):
    """Result of a group."""

    TIMED = 1
    NOT_TIMED = 2
    NOT_BUILT = 3


@dataclass(frozen=True)
class Case:
    """One work: a model, its micro-batch, and how many of them a step has."""

    name: str
    shape: ModelShape
    batch: Batch
    microbatches: int

    def __str__(self) -> str:
        return f"{self.name}, {self.microbatches} x {self.batch}"


def cases_of(work: Sizes) -> Iterator[Case]:
    """All works, in order of worth: every model at the first batch, then the longer sequences."""
    for batch in work.model_batches:
        for name, shape in work.models:
            for microbatches in work.microbatches:
                yield Case(name, shape, batch, microbatches)


def run(bench: Bench) -> None:
    """Measure every model and batch beside all peers while the time lasts."""
    compare(bench, PEERS)


def compare(bench: Bench, peers: Sequence[str]) -> None:
    """Measure every model and batch beside these peers while the time lasts."""
    work = sizes(bench.dry)
    compile_seconds = FIRST_COMPILE_SECONDS

    with world_of_one(bench) as grid:
        for case in cases_of(work):
            if bench.left_seconds <= 0:
                bench.emit(str(case), "skipped", "no time was left", model=case.name)
                continue
            comparison = Comparison(bench, grid, case, peers, work.rounds, compile_seconds)
            comparison.run()
            compile_seconds = comparison.compile_seconds
            del comparison
            # Compiled code holds the models it was made for.
            torch.compiler.reset()
            bench.free()


@dataclass
class Comparison:
    """The contenders at one work."""

    bench: Bench
    grid: ProcessGrid
    case: Case
    peers: Sequence[str]
    rounds: int
    compile_seconds: float

    @property
    def labels(self) -> dict[str, Any]:
        """Fields that every row of the comparison has."""
        case = self.case
        return {
            "model": case.name,
            "batch": str(case.batch),
            "microbatches": case.microbatches,
            "shape": asdict(case.shape),
        }

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.case.batch.tokens * self.case.microbatches

    def what(self, of: str) -> str:
        """Name of a row."""
        return f"{self.case}: {of}"

    def run(self) -> None:
        """Measure the contenders together, or one after another where they do not fit."""
        builds: dict[str, Build] = {"k2train": self.ours}
        builds |= {name: partial(self.peer, name) for name in self.peers}

        # Nothing timed although something was built: together they were too many after all.
        if self.fits_together() and self.group(builds) is not Outcome.NOT_TIMED:
            return
        for key, build in builds.items():
            outcome = self.group({key: build})
            policies = ("selective", "full") if key == "k2train" else ()
            for policy in policies:
                if outcome is Outcome.TIMED or self.bench.left_seconds <= 0:
                    break
                changed = partial(self.ours, {"recompute": policy})
                outcome = self.group({f"k2train, recompute {policy}": changed})

    def ours(self, kernels: dict[str, Any] | None = None) -> list[Contender]:
        """Build k2train's contender."""
        case = self.case
        self.check_states("k2train", OUR_BYTES)
        return [
            k2train_contender(
                self.bench, self.grid, case.shape, case.batch, case.microbatches, kernels
            )
        ]

    def peer(self, name: str) -> list[Contender]:
        """Build a peer's contenders."""
        case = self.case
        self.check_states(name, BYTES[name])
        return peer_contenders(self.bench, name, case.shape, case.batch, case.microbatches)

    def check_states(self, name: str, bytes_each: int) -> None:
        """Raise UnavailableError where weights, gradients and moments alone do not fit."""
        total, states = self.bench.total_bytes(), parameters(self.case.shape) * bytes_each
        if total is not None and states > SPARE * total:
            raise UnavailableError(
                f"{name}: states alone need {bytes_text(states)} of {bytes_text(total)}"
            )

    def fits_together(self) -> bool:
        """True when all contenders' states and one step's activations fit at once."""
        total, shape, tokens = self.bench.total_bytes(), self.case.shape, self.case.batch.tokens
        states = parameters(shape) * (OUR_BYTES + sum(BYTES[name] for name in self.peers))
        activations = ACTIVATION_BYTES * tokens * shape.num_layers * shape.hidden_size
        logits = 16 * tokens * shape.vocab_size
        return total is None or states + activations + logits < 0.9 * total

    def group(self, builds: Mapping[str, Build]) -> Outcome:
        """Build and warm up each contender, time them in turns, and write a row for each."""
        ready: list[Ready] = []
        for key, build in builds.items():
            ready += self.warmed_up(key, build)
        if not ready:
            return Outcome.NOT_BUILT
        timings: list[Timing] = []

        def measure() -> Mapping[str, Any]:
            steps = [contender.step for contender, _ in ready]
            timings.extend(Timer(self.bench).in_turns(steps, self.rounds, warm_up=1))
            return {"kind": "turns", "in_turns": len(ready), "rounds": self.rounds}

        self.bench.attempt(self.what(f"{len(ready)} in turns"), measure, **self.labels)
        length = self.case.batch.length_tokens
        flops = self.tokens * flops_per_token(self.case.shape, length)

        for (contender, figures), timing in zip(ready, timings, strict=False):
            self.bench.emit(
                self.what(contender.name),
                contender=contender.name,
                step_seconds=timing.median,
                spread=timing.spread,
                tokens_per_second=self.tokens / timing.median,
                step_flops_per_second=flops / timing.median,
                in_turns=len(ready),
                **self.labels,
                **figures,
            )

        return Outcome.TIMED if timings else Outcome.NOT_TIMED

    def warmed_up(self, key: str, build: Build) -> list[Ready]:
        """Build and warm up one kind of contender; writes a row with the reason when that fails."""
        contenders: list[Contender] = []
        ready: list[Ready] = []

        def construct() -> Mapping[str, Any]:
            contenders.extend(build())
            return {"kind": "built"}

        # What does not fit is a fact about the device: smaller models and recomputation follow.
        self.bench.attempt(self.what(key), construct, optional=True, **self.labels)

        for contender in contenders:

            def warm(contender: Contender = contender) -> Mapping[str, Any]:
                figures = self.first_steps(contender)
                ready.append((contender, figures))
                return {"kind": "warmed"}

            needs = 0.0 if self.bench.dry else 10 + contender.compiled * self.compile_seconds
            what = self.what(f"{contender.name}, warm-up")
            self.bench.attempt(
                what, warm, needs, optional=True, contender=contender.name, **self.labels
            )

        return ready

    def first_steps(self, contender: Contender) -> dict[str, Any]:
        """Losses of the first steps, seconds of the first, and the memory peak of the others."""
        began = time.monotonic()
        losses = [float(contender.step())]
        first_seconds = time.monotonic() - began
        if contender.compiled:
            self.compile_seconds = first_seconds
        self.bench.forget_peak()
        before = self.bench.held_bytes()
        losses += [float(contender.step()) for _ in range(WARM_UP_STEPS - 1)]
        peak = self.bench.peak_bytes()
        above = None if peak is None or before is None else peak - before
        return {"losses": losses, "first_seconds": first_seconds, "above_held_bytes": above}
