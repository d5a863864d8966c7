"""Engine and data of a replay: load a checkpoint, do its steps again, and measure the state."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter

from k2train.checkpoint.blocks import local_boxes
from k2train.checkpoint.load import agree_on_checkpoint, load_states
from k2train.checkpoint.manifest import CheckpointManifest, read_manifest
from k2train.errors import CheckpointError
from k2train.model.kernels.product_choice import Choice
from k2train.parallel.agreement import Agreement
from k2train.parallel.device_digest import StateRoot
from k2train.parallel.grid import ProcessGrid
from k2train.record.followed_events import FollowedStep
from k2train.replay.read_rows import read_boxes
from k2train.train.batches import BatchSource
from k2train.train.engine import Engine
from k2train.train.preflight import Start
from k2train.train.recheck import StepJudge
from k2train.train.repeat import engine_root, repeat_step
from k2train.train.run_logger import RunLogger
from k2train.train.setting import setting_of
from k2train.train.setup_kernels import kernels_of
from k2train.train.state import TrainState
from k2train.train.step_report import StepReport
from k2train.train.step_result import StepResult

SUMS: TypeAdapter[dict[str, tuple[float, float, float]]] = TypeAdapter(
    dict[str, tuple[float, float, float]]
)

MASTER = "master"
WEIGHTS = "weights"
"""Name of the weights that a model computes with, beside the states of the optimizer."""


class Distance(NamedTuple):
    """How far a tensor of the state is from the recorded one."""

    name: str
    """NAME.state."""
    relative: float
    """L2 norm of the difference, over that of the recorded tensor."""
    largest: float
    """Largest difference of an element."""


class Session:
    """A replay on one grid. `trained_world` is the number of ranks that did the steps."""

    def __init__(
        self,
        start: Start,
        grid: ProcessGrid,
        verify: bool = True,
        products: Choice | None = None,
    ):
        """`products`: libraries of the products, as the run measured them."""
        self.start, self.grid = start, grid
        kernels = None if products is None else kernels_of(start.setup, grid.device, products)
        self.engine = Engine(start.setup, grid, fill=False, kernels=kernels)
        self.batches = BatchSource(start, grid, verify)
        self.report = StepReport(start, RunLogger(), grid.device)
        self.state = TrainState()
        self.setting = setting_of(self.engine)
        if start.setup.config.spikes.policy == "skip_step":
            # What the run left out as an outlier is left out here, by the same rule.
            self.engine.judge = StepJudge(self._would_open, False, self._is_outlier)

    def _would_open(self, loss: float, grad_norm: float) -> bool:
        return self.state.guard.spikes.would_open(loss, grad_norm)

    def _is_outlier(self, loss: float, grad_norm: float) -> bool:
        return self.state.guard.spikes.is_outlier(loss, grad_norm)

    def load(self, path: Path) -> CheckpointManifest:
        """Fill weights, moments and training state from `path`, every byte checked; collective.

        Raises CheckpointError when it is not whole, or thinned.
        """
        engine, manifest = self.engine, read_manifest(path)
        shards = engine.optimizer.flat_shards
        layout = engine.gradients.shard_layout
        if not load_states(path, layout, shards, self.grid, engine.dtype):
            raise CheckpointError(f"{path} was thinned to its weights: no step can be done from it")
        engine.optimizer.adam_steps = manifest.adam_steps
        engine.optimizer.write_parameters()
        self.state = TrainState.of(manifest)
        return manifest

    def take_over(self, other: "Session") -> None:
        """Go on from the state of a session with another config."""
        mine, theirs = self.engine.optimizer, other.engine.optimizer
        for name, shard in mine.flat_shards.items():
            shard.copy_(theirs.flat_shards[name])
        mine.adam_steps, self.state = theirs.adam_steps, other.state
        mine.write_parameters()

    def step(self, step: int, trained_world: int) -> tuple[FollowedStep, StepResult]:
        """Do a step of a run of `trained_world` ranks; collective."""
        done, result = repeat_step(self.engine, self.batches, step, trained_world)
        state = self.state
        state.step = step
        if state.guard.finite.observe(result.applied or result.outlier) == "apply":
            state.guard.reaction.outliers.observe(result.outlier)
        if result.applied:
            state.loss = result.loss
            self.report.spikes(state, result, done.lr)
        state.adam_steps = self.engine.optimizer.adam_steps
        return done, result

    def root(self) -> StateRoot:
        """Root of the present state; collective."""
        return engine_root(self.engine, self.state.step)

    def distances(self, path: Path) -> list[Distance]:
        """Distance of every tensor from that of checkpoint `path`; collective, twice the state.

        Every file of it is read: those of the weights must be the rounded master weights beside
        them. Raises CheckpointError when a file is not what was saved.
        """
        if refused := agree_on_checkpoint([path], self.grid).refused:
            raise CheckpointError(refused[0])

        engine = self.engine
        layout, mine = engine.gradients.shard_layout, engine.optimizer.flat_shards
        recorded = {name: torch.zeros_like(shard) for name, shard in mine.items()}
        whole = load_states(path, layout, recorded, self.grid, engine.dtype)
        if not whole:
            # Thinned: its weights were rounded, and no moment is there.
            mine = {MASTER: mine[MASTER].to(engine.dtype).float()}

        sums: dict[str, tuple[float, float, float]] = {}
        for slot in layout.slots:
            for name, shard in mine.items():
                ours = layout.local(shard, slot)
                theirs = layout.local(recorded[name], slot)
                if ours.numel():
                    sums[f"{slot.param_slice.name}.{name}"] = _sums(ours, theirs)
        if whole:
            sums |= self.weight_sums(path, recorded[MASTER])
        told = Agreement(self.grid).all(sums, SUMS, "all-gather of distances")
        return list(_joined(told))

    def weight_sums(
        self, path: Path, master: torch.Tensor
    ) -> dict[str, tuple[float, float, float]]:
        """Sums of this rank's rounded master weights of `path` and the weights in its files."""
        layout = self.engine.gradients.shard_layout
        boxes = [box for box in local_boxes(layout) if not box.empty]
        parts = [(box.name, box.offsets, box.shape) for box in boxes]
        found = read_boxes(path, read_manifest(path), "model", parts)
        sums: dict[str, tuple[float, float, float]] = {}
        for box, theirs in zip(boxes, found, strict=True):
            rounded = layout.local(master, box.slot).cpu().to(theirs.dtype).view(box.shape)
            sums[f"{box.name}.{WEIGHTS}"] = _sums(rounded, theirs)
        return sums

    def close(self) -> None:
        """Stop the loader's threads."""
        self.batches.close()


def _sums(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float, float]:
    """Square sums of difference and of the recorded values, and the largest difference."""
    apart = ours.double() - theirs.double()
    return (
        float(apart.square().sum()),
        float(theirs.double().square().sum()),
        float(apart.abs().max()),
    )


def _joined(told: list[dict[str, tuple[float, float, float]]]) -> Iterator[Distance]:
    """Distances from the sums of all ranks; parts that several ranks hold weigh alike in both."""
    names = dict.fromkeys(name for part in told for name in part)
    for name in names:
        parts = [part[name] for part in told if name in part]
        square, of = sum(part[0] for part in parts), sum(part[1] for part in parts)
        relative = (square / of) ** 0.5 if of else float(square > 0)
        yield Distance(name, relative, max(part[2] for part in parts))
