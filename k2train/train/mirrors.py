"""Mirrors of a run's record: W&B and TensorBoard, as the config asks for them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from k2train.config.load import Config, to_yaml
from k2train.data.manifest import read_manifest
from k2train.errors import RunError, UserError
from k2train.plan.cost import flops_per_token
from k2train.record.curves import Curves
from k2train.record.energy import Site
from k2train.record.event import Event
from k2train.record.events import Entry, Resumed
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord, latest
from k2train.record.mirror import Mirror
from k2train.record.tensorboard import FOLDER, TensorBoardMirror
from k2train.record.wandb import WandbMirror, WandbRun, wandb_run_id
from k2train.retry import exists_retried
from k2train.train.setup import Setup

ROW_FILES = ("metrics.jsonl", "held_out.jsonl", "ledger.jsonl")
"""Files each of whose lines may be a row at W&B."""


class Mirrors:
    """All mirrors of a run; `metrics` is the file of its steps, `site` where it uses energy."""

    def __init__(self, mirrors: Sequence[Mirror], metrics: Path, site: Site | None = None) -> None:
        self._mirrors, self._metrics, self._site = mirrors, metrics, site

    def history(self, entries: Sequence[Entry]) -> None:
        """Mirror what earlier starts recorded and a mirror shows as a whole."""
        for entry in entries:
            for mirror in self._mirrors:
                mirror.past_event(entry.event, entry.time)

    def step(self, record: StepRecord) -> None:
        """Mirror one step."""
        for mirror in self._mirrors:
            mirror.step(record)

    def score(self, record: HeldOutRecord) -> None:
        """Mirror a held-out score."""
        for mirror in self._mirrors:
            mirror.score(record)

    def event(self, event: Event) -> None:
        """Mirror an event of the ledger."""
        if isinstance(event, Resumed) and self._mirrors:
            devices = event.world_size
            trained = trained_until(self._metrics, event.step, self._site, devices)
            for mirror in self._mirrors:
                mirror.begin(*trained)
        for mirror in self._mirrors:
            mirror.event(event)

    def close(self) -> None:
        """Finish all of them."""
        for mirror in self._mirrors:
            mirror.close()


def trained_until(
    metrics: Path, step: int, site: Site | None = None, devices: int = 0
) -> tuple[int, float, float]:
    """Return the tokens of the stage up to a step, and seconds and joules of all its steps.

    All are 0 where the file cannot be read: they decide over an axis only.
    """
    try:
        rows = latest(metrics) if exists_retried(metrics) else []
    except RunError:
        return 0, 0.0, 0.0
    sums = Curves(site=site, devices=devices)
    for row in rows:
        if row.step <= step:
            sums.add(row)
    return sums.tokens, sums.trained_seconds, sums.joules


def site_of(config: Config) -> Site:
    """Return where a run uses its energy."""
    energy = config.energy
    return Site(energy.device_watts, energy.pue, energy.tonnes_per_mwh)


def chunk_facts(config: Config) -> dict[str, tuple[str, int, str]]:
    """Return hash, tokens and mix of each chunk; {} where the manifest cannot be read."""
    try:
        manifest = read_manifest(config.data.manifest)
    except UserError:
        return {}
    found = {}
    for info in manifest.chunks:
        tokens = info.rows * manifest.sequence_length
        whole = sum(info.tokens_per_subset.values()) or 1
        mix = [f"{name} {100 * n / whole:.0f}%" for name, n in info.tokens_per_subset.items()]
        found[info.name] = (info.sha256, tokens, ", ".join(mix))
    return found


def open_mirrors(
    config: Config,
    directory: Path,
    run_id: str,
    attempt: int,
    rank_flops_per_token: float,
    log: Callable[[str], None],
) -> list[Mirror]:
    """Return the mirrors that a config asks for; `log` takes messages from their threads."""
    made: list[Mirror] = []
    if config.wandb.mode != "disabled":
        rows = sum(lines_of(directory / name) for name in ROW_FILES)
        run = wandb_run(config, wandb_run_id(run_id), rows)
        curves = Curves(rank_flops_per_token, site_of(config))
        chunks = chunk_facts(config)
        made.append(WandbMirror(run, directory, log, curves=curves, chunks=chunks))
    if config.tracking.tensorboard:
        folder, text = directory / FOLDER, to_yaml(config)
        curves = Curves(rank_flops_per_token, site_of(config))
        made.append(TensorBoardMirror(folder, attempt, text, log, curves))
    return made


def flops_of_rank(config: Config, world_size: int) -> float:
    """Return the planned FLOPs of one rank for a token of the batch."""
    shape = Setup.of(config, world_size).architecture
    return flops_per_token(shape, config.data.sequence_length) / world_size


def lines_of(path: Path) -> int:
    """Return the number of lines of a file; 0 without one."""
    if not exists_retried(path):
        return 0
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(2**20), b""))


def wandb_run(config: Config, id: str, rows_before: int = 0) -> WandbRun:
    """Return the W&B run of a config; `rows_before` as there."""
    w = config.wandb
    return WandbRun(
        w.mode,
        w.project,
        config.run.name,
        id,
        config.model_dump(mode="json"),
        w.entity,
        w.group,
        w.tags,
        w.notes,
        w.system_stats,
        rows_before,
    )
