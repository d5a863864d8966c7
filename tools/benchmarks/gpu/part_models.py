"""GPU benchmark part `models`: LLaMAs of 1.3B and 2.7B at 2048 and 8192 beside peers on equal ids.

- All contenders of one work are in memory at once and step in turns, if the device can hold them.
- Otherwise they run one after another, and the row says so.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import world_of_one
from benchmarks.gpu.peers import (
    OUR_BYTES,
    PEER_BYTES,
    Contender,
    k2train_contender,
    peer_contenders,
)
from benchmarks.gpu.sizes import Batch, sizes
from benchmarks.gpu.timing import Timer, Timing
from k2train.parallel.grid import ProcessGrid
from k2train.plan.cost import ModelShape, flops_per_token, parameters

ACTIVATION_BYTES = 60
"""Roughly what a peer keeps of a token for each layer and unit of hidden size: only says whether to
try at once.
"""
WARM_UP_STEPS = 3
FIRST_COMPILE_SECONDS = 60.0
"""What a compilation is taken to need until one was seen: nobody can stop it half-way."""
Build = Callable[[], list[Contender]]
Ready = tuple[Contender, dict[str, Any]]


class Outcome(Enum):
    """Result of a group."""

    TIMED = 1
    NOT_TIMED = 2
    NOT_BUILT = 3


def run(bench: Bench) -> None:
    """Measure every model and batch while the time lasts."""
    work = sizes(bench.dry)
    compile_seconds = FIRST_COMPILE_SECONDS

    with world_of_one(bench) as grid:
        cases = list(product(work.models, work.model_batches))
        # The first two differ in both: where the time ends early, each model and each length was
        # seen once.
        for (name, shape), batch in cases[:1] + cases[:0:-1]:
            comparison = Comparison(bench, grid, name, shape, batch, work.rounds, compile_seconds)
            comparison.run()
            compile_seconds = comparison.compile_seconds
            del comparison
            # Compiled code holds the models it was made for.
            torch.compiler.reset()
            bench.free()


@dataclass
class Comparison:
    """The contenders at one model and batch."""

    bench: Bench
    grid: ProcessGrid
    name: str
    shape: ModelShape
    batch: Batch
    rounds: int
    compile_seconds: float

    @property
    def labels(self) -> dict[str, Any]:
        """Fields that every row of the comparison has."""
        return {"model": self.name, "batch": str(self.batch), "shape": asdict(self.shape)}

    def what(self, of: str) -> str:
        """Name of a row."""
        return f"{self.name}, {self.batch}: {of}"

    def run(self) -> None:
        """Measure the contenders together, or one after another where they do not fit."""
        builds: dict[str, Build] = {
            "k2train": self.ours,
            "transformers": partial(
                peer_contenders, self.bench, "transformers", self.shape, self.batch
            ),
            "reference": partial(peer_contenders, self.bench, "reference", self.shape, self.batch),
        }

        # Nothing timed although something was built: together they were too many after all.
        if self.fits_together() and self.group(builds) is not Outcome.NOT_TIMED:
            return
        for key, build in builds.items():
            outcome = self.group({key: build})
            if key == "k2train" and outcome is not Outcome.TIMED:
                self.group(
                    {"k2train, recompute selective": partial(self.ours, {"recompute": "selective"})}
                )

    def ours(self, kernels: dict[str, Any] | None = None) -> list[Contender]:
        """Build k2train's contender."""
        return [k2train_contender(self.bench, self.grid, self.shape, self.batch, kernels)]

    def fits_together(self) -> bool:
        """True when all contenders' states and one step's activations fit at once."""
        total = self.bench.total_bytes()
        states = parameters(self.shape) * (OUR_BYTES + 2 * PEER_BYTES)
        activations = (
            ACTIVATION_BYTES * self.batch.tokens * self.shape.num_layers * self.shape.hidden_size
        )
        logits = 16 * self.batch.tokens * self.shape.vocab_size
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
        flops = self.batch.tokens * flops_per_token(self.shape, self.batch.length_tokens)

        for (contender, figures), timing in zip(ready, timings, strict=False):
            self.bench.emit(
                self.what(contender.name),
                contender=contender.name,
                step_seconds=timing.median,
                spread=timing.spread,
                tokens_per_second=self.batch.tokens / timing.median,
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

        self.bench.attempt(self.what(key), construct, **self.labels)

        for contender in contenders:

            def warm(contender: Contender = contender) -> Mapping[str, Any]:
                figures = self.first_steps(contender)
                ready.append((contender, figures))
                return {"kind": "warmed"}

            needs = 0.0 if self.bench.dry else 10 + contender.compiled * self.compile_seconds
            what = self.what(f"{contender.name}, warm-up")
            self.bench.attempt(what, warm, needs, contender=contender.name, **self.labels)

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
