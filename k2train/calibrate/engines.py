"""Steps of small engines, by part: what a layer, a stage and a step cost beside their kernels.

- The engine is that of a run. Its executor says when an action begins and ends.
- Two depths give a layer, the rest of a pass is the stage's, and what follows the passes is the
  step's. A large vocabulary shows the optimizer: nearly all parameters are in its two tables.
- Engines take turns, step by step, and with them a reference piece of work. Each step is measured
  in the seconds of its turn's reference: a machine's speed moves from one second to the next.

Alternatives considered:
- Counting kernels and timing an empty one: Python and autograd around them take longer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from k2train.calibrate.clock import Clock, times_of
from k2train.calibrate.engine_config import MICROBATCHES
from k2train.config.load import Config
from k2train.data.loader import MicroBatch
from k2train.parallel.grid import ProcessGrid
from k2train.plan import cost
from k2train.plan.action import Action, Op
from k2train.train.engine import Engine
from k2train.train.setup import Setup

PARTS = ("forward", "backward", "rest")
"""Parts of a step that are timed."""
WARM_UP = 2
"""First steps of an engine, which allocate and do not count."""


def engine_times(
    clock: Clock,
    configs: Mapping[str, Config],
    ranks: int,
    rank: int,
    rounds: int,
    reference: Callable[[], float],
) -> list[dict[str, Any]]:
    """Median forward, backward and rest of a step of each engine, as shares of the reference.

    Each runs on `ranks` ranks, whose process group exists; collective. `reference` times the piece
    of work that takes turns with them.
    """
    steppers = {name: _Stepper(clock, config, ranks, rank) for name, config in configs.items()}
    before = reference()
    for turn in range(rounds + WARM_UP):
        for stepper in steppers.values():
            stepper.step()
        after = reference()
        for stepper in steppers.values():
            stepper.finish((before + after) / 2, keep=turn >= WARM_UP)
        before = after
    return [{"name": name, **stepper.found()} for name, stepper in steppers.items()]


class _Stepper:
    """One engine, and the times of its steps."""

    def __init__(self, clock: Clock, config: Config, ranks: int, rank: int):
        self.clock, self.config = clock, config
        self.setup = Setup.of(config, ranks)
        self.engine = Engine(self.setup, ProcessGrid(self.setup.layout, rank, clock.device))
        self.engine.watch_actions = (self._after, self._before)

        shape = (config.batch.global_sequences, config.data.sequence_length)
        # Ranks of a tensor-parallel group read the same batch.
        draw = torch.Generator().manual_seed(7)
        batch = torch.randint(config.model.vocab_size, shape, generator=draw).to(clock.device)
        self.parts = [MicroBatch(part) for part in batch.split(config.batch.micro_sequences)]
        self.spent = {Op.FORWARD: 0.0, Op.BACKWARD: 0.0}
        self.began = 0.0
        self.last: dict[str, float] = {}
        self.samples: dict[str, list[float]] = {part: [] for part in PARTS}

    def _now(self) -> float:
        if self.clock.cuda:
            torch.cuda.synchronize()
        return self.clock.now()

    def _before(self, action: Action) -> None:
        self.began = self._now()

    def _after(self, action: Action) -> None:
        if action.op in self.spent:
            self.spent[action.op] += self._now() - self.began

    def step(self) -> None:
        """Make one step."""
        self.spent.update({Op.FORWARD: 0.0, Op.BACKWARD: 0.0})
        start = self._now()
        self.engine.train_step(self.parts, 1e-3)
        total = self._now() - start
        self.last = {
            "forward": self.spent[Op.FORWARD] / MICROBATCHES,
            "backward": self.spent[Op.BACKWARD] / MICROBATCHES,
            "rest": total - sum(self.spent.values()),
        }

    def finish(self, reference: float, keep: bool) -> None:
        """Keep the last step as shares of its turn's reference."""
        if keep:
            for part, seconds in self.last.items():
                self.samples[part].append(seconds / reference)

    def found(self) -> dict[str, Any]:
        """Facts of the engine, and the medians of its parts."""
        model = self.config.model
        medians = {part: times_of(found).seconds for part, found in self.samples.items()}
        return {
            "layers": model.num_layers,
            "vocab": model.vocab_size,
            "parameters": cost.parameters(self.setup.architecture),
            **medians,
        }
