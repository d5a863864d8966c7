"""Real trainings of a tiny model with one thing wrong: which channel alarms first, and when.

    python -m spike_search.tiny_runs

- One process on a CPU, in memory: batches of a text that a random table generates, so that there is
  something to learn. What is wrong begins at step `ONSET`; a run has `STEPS`.
- Prints one JSON object a run: its name, and the loss, gradient norm and update norm of each step.
- `bench_spikes.py --train` runs it in a process of its own, because it needs torch.
"""

import json
from collections.abc import Callable

import numpy as np
import torch

from k2train.config.load import Config
from k2train.data.loader import MicroBatch
from k2train.guard.spike_verdict import per_rate
from k2train.launch.environment import Launch
from k2train.parallel.grid import ProcessGrid, start_process_group, stop_process_group
from k2train.plan.layout import Layout
from k2train.train.engine import Engine
from k2train.train.setup import Setup

ONSET = 300
STEPS = 420
VOCAB, LENGTH, SEQUENCES = 64, 32, 16
RATE = 3e-3
SUCCESSORS = 4
"""Ids that may follow an id: the loss of a perfect model is near the logarithm of it."""

TREE = {
    "run": {"name": "tiny", "seed": 7},
    "model": {
        "num_layers": 2,
        "hidden_size": 48,
        "ffn_hidden_size": 96,
        "num_heads": 4,
        "num_kv_heads": 4,
        "vocab_size": VOCAB,
    },
    "data": {"manifest": "unused/manifest.json", "sequence_length": LENGTH},
    "batch": {"global_sequences": SEQUENCES, "micro_sequences": SEQUENCES},
    "parallel": {"tensor": 1, "pipeline": 1},
    "lr": {"kind": "constant", "peak": RATE},
    "spikes": {"update_norm": True},
    "precision": "fp32",
}


class Text:
    """Text in which each id has a few successors."""

    def __init__(self, seed: int) -> None:
        self.table = np.random.default_rng(seed).integers(0, VOCAB, (VOCAB, SUCCESSORS))

    def rows(self, step: int) -> np.ndarray:
        """Ids [SEQUENCES, LENGTH] of a step."""
        draw = np.random.default_rng(10_000 + step)
        ids = np.empty((SEQUENCES, LENGTH), dtype=np.int64)
        ids[:, 0] = draw.integers(0, VOCAB, SEQUENCES)
        for at in range(1, LENGTH):
            ids[:, at] = self.table[ids[:, at - 1], draw.integers(0, SUCCESSORS, SEQUENCES)]
        return ids


def shuffled(ids: np.ndarray, step: int) -> np.ndarray:
    """Rows whose order is lost."""
    return np.random.default_rng(step).permuted(ids, axis=1)


def repeated(ids: np.ndarray, step: int) -> np.ndarray:
    """Rows of one token each."""
    return np.repeat(np.random.default_rng(step).integers(0, VOCAB, (SEQUENCES, 1)), LENGTH, axis=1)


def unchanged(ids: np.ndarray, step: int) -> np.ndarray:
    """The rows themselves."""
    return ids


def lose_moments(engine: Engine) -> None:
    """Forget what a checkpoint of weights alone forgets; the step count stays."""
    engine.optimizer.exp_avg.zero_()
    engine.optimizer.exp_avg_sq.zero_()


def lose_second_moments(engine: Engine) -> None:
    """Forget the second moments alone."""
    engine.optimizer.exp_avg_sq.mul_(1e-2)


def damage_weights(engine: Engine) -> None:
    """Change one weight in a hundred, as a bad copy does."""
    master = engine.optimizer.master
    master[::100].mul_(-1.0)
    engine.optimizer.write_parameters()


def nothing(engine: Engine) -> None:
    """Leave the state as it is."""


Rows = Callable[[np.ndarray, int], np.ndarray]
CASES: dict[str, tuple[Rows, Callable[[Engine], None], float]] = {
    "shuffled ids": (shuffled, nothing, RATE),
    "rows of one token": (repeated, nothing, RATE),
    "rows of one token, rate x5": (repeated, nothing, 5 * RATE),
    "rate x10": (unchanged, nothing, 10 * RATE),
    "restart without moments": (unchanged, lose_moments, RATE),
    "second moments a hundredth": (unchanged, lose_second_moments, RATE),
    "one weight in 100 of the other sign": (unchanged, damage_weights, RATE),
    "nothing": (unchanged, nothing, RATE),
}
"""What the rows become, what happens to the state, and the rate, from `ONSET` on."""


def train(rows: Rows, harm: Callable[[Engine], None], rate: float) -> list[list[float | None]]:
    """Train; returns loss, gradient norm and update norm per rate of each step."""
    setup = Setup(Config.model_validate(TREE), Layout(1, 1, 1))
    engine = Engine(setup, ProcessGrid(setup.layout, 0, torch.device("cpu")))
    text, found = Text(3), []
    for step in range(1, STEPS + 1):
        ids = text.rows(step)
        if step == ONSET:
            harm(engine)
        bad = step >= ONSET
        tokens = torch.from_numpy(rows(ids, step) if bad else ids)
        # A rise to the rate, as in a real run.
        now = (rate if bad else RATE) * min(1.0, step / 50)
        result = engine.train_step([MicroBatch(tokens)], now)
        found.append([result.loss, result.grad_norm, per_rate(result.update_norm, now)])
    return found


def main() -> None:
    """Train every case."""
    device = torch.device("cpu")
    start_process_group(Launch(rank=0, world_size=1, local_rank=0, launched=False), device)
    try:
        for name, case in CASES.items():
            print(json.dumps({"name": name, "onset": ONSET, "steps": train(*case)}), flush=True)
    finally:
        stop_process_group()


if __name__ == "__main__":
    main()
