"""One page on two stages before they are paid for: what holds, what does not, and what they cost.

- Data: chunks are there and their sizes and hashes match; tokens, steps and chunks add up. The
  second stage reads nothing of the first, with the same tokenizer.
- The model of both stages, as the start of a stage compares it.
- The learning rate over both stages, with the step between them.
- Memory of the layout, disk for the checkpoints, days and energy, each with its numbers.
- A line begins with `holds` or `FAILS`; the page fails if one line does.

Alternatives considered:
- Stopping at the first failure: a team would read the page as often as it has mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from k2train.checkpoint.disk_space import CheckpointBytes, free_bytes, plan_bytes
from k2train.config.load import Config, config_differences, load_config
from k2train.data.added_specials import added_specials
from k2train.data.chunk import verify_chunk
from k2train.data.manifest import Manifest
from k2train.data.order import ChunkOrder
from k2train.errors import UserError
from k2train.plan.cost import WEIGHT_BYTES, parameters, tensor_count
from k2train.plan.hardware import GIB
from k2train.plan.search import RESERVE_BYTES
from k2train.plan.uncertainty import interval as step_interval
from k2train.planner.cluster_file import load_cluster
from k2train.planner.layouts import DAY, Question
from k2train.planner.planned_step import workload_of
from k2train.retry import retried
from k2train.text import bytes_text, counted, duration, tokens_text
from k2train.train.data_seen import planned_in_common
from k2train.train.preflight import check_data
from k2train.train.recorded_choices import run_directory
from k2train.train.resume_check import model_facts
from k2train.train.setup import Setup
from k2train.train.stage_transition import is_allowed

SHOWN = 3
"""Chunks or texts of both stages that a line names."""


@dataclass
class Page:
    """Lines of the page, and whether all of them hold."""

    lines: list[str] = field(default_factory=list)
    holds: bool = True

    def check(self, holds: bool, text: str) -> None:
        """Add one line."""
        self.holds &= holds
        self.lines.append(f"  {'holds' if holds else 'FAILS'}  {text}")


@dataclass(frozen=True)
class Stage:
    """One stage as far as it could be read."""

    config: Config
    setup: Setup
    data: tuple[Manifest, ChunkOrder] | None

    @property
    def order(self) -> ChunkOrder | None:
        """Chunks in their order, if they could be read."""
        return self.data[1] if self.data else None


def before_you_burn(configs: Sequence[str], cluster: str, devices: int) -> tuple[bool, list[str]]:
    """Whether both stages hold, and the page. Raises ConfigError for a cluster that is none."""
    page, machine = Page(), load_cluster(cluster)
    stages = []
    for path in configs:
        page.lines.append(path)
        stage = _stage(page, path, devices)
        if stage:
            stages.append(stage)
            seconds = _memory_and_time(page, stage, Question(stage.config, machine, devices))
            _calendar(page, stage, Question(stage.config, machine, devices), seconds)
    if len(stages) == len(configs) == 2:
        page.lines.append("both stages")
        _seam(page, *stages)
        _disk(page, stages)
    page.lines.append("all of it holds" if page.holds else "does not hold: see FAILS above")
    return page.holds, page.lines


def _stage(page: Page, path: str, devices: int) -> Stage | None:
    """Read one stage: config, layout, data."""
    try:
        config = load_config(path)
        setup = Setup.of(config, devices)
    except UserError as problem:
        page.check(False, _one_line(problem))
        return None
    layout = setup.layout
    page.check(
        True,
        f"{devices} devices = tensor {layout.tensor} x pipeline {layout.pipeline} x data "
        f"{layout.data}; {counted(setup.num_microbatches, 'micro-batch').replace('hs', 'hes')}",
    )
    return Stage(setup.config, setup, _data(page, setup.config))


def _data(page: Page, config: Config) -> tuple[Manifest, ChunkOrder] | None:
    """Sizes, headers and hashes of all chunks, and the steps that they make."""
    try:
        manifest, order = check_data(config)
        for name in order.names:
            verify_chunk(manifest, manifest.chunk(name))
    except UserError as problem:
        page.check(False, _one_line(problem))
        return None
    tokens = order.total_steps * config.batch.global_sequences * config.data.sequence_length
    page.check(
        True,
        f"{counted(len(order.names), 'chunk')} with matching hashes: {order.total_steps:,} steps x "
        f"{config.batch.global_sequences:,} x {config.data.sequence_length:,} = "
        f"{tokens_text(tokens)} tokens",
    )
    return manifest, order


def _memory_and_time(page: Page, stage: Stage, question: Question) -> float:
    """Memory of the fullest rank, and the seconds of a step."""
    setup = stage.setup
    memory = max(setup.memory(setup.work(), pp).total_bytes for pp in range(setup.layout.pipeline))
    there = question.cluster.device.memory_bytes
    page.check(
        memory + RESERVE_BYTES <= there,
        f"memory {memory / GIB:.1f} GiB + {RESERVE_BYTES / GIB:.0f} GiB reserve of "
        f"{there / GIB:.1f} GiB on {question.cluster.device.name}",
    )
    # As the run would do it: its own schedule, uneven stages, a wait or none for gradients.
    sure = step_interval(workload_of(setup, question.cluster, "cuda"), question.cluster)
    page.lines.append(
        f"         a step takes {sure.seconds:.2f} s ({sure.low:.2f} to {sure.high:.2f})"
    )
    return sure.seconds


def _calendar(page: Page, stage: Stage, question: Question, seconds: float) -> None:
    """Days, energy, and when chunks and checkpoints are due."""
    if stage.order is None:
        return
    order, chunks = stage.order, len(stage.order.names)
    every = max(1, stage.config.checkpoint.every_chunks)
    # Ends of chunks are saved in any case, other moments only where the config says so.
    at_ends = order.total_steps * seconds / chunks * every
    cluster = question.reliability
    inside = stage.config.checkpoint.every_seconds != 0
    interval = min(cluster.used_interval, at_ends) if inside else at_ends
    goodput = replace(cluster, interval=interval).goodput
    days = order.total_steps * seconds / goodput / DAY
    energy = stage.config.energy
    watts = energy.device_watts or question.cluster.device.watts
    mwh = days * 24 * question.devices * watts / 1e6 * energy.pue
    page.lines.append(
        f"         {_time(days * DAY)} at a goodput of {goodput:.1%}, {_energy(mwh)}; a chunk "
        f"every {_time(days * DAY / chunks)}, {counted(-(-chunks // every), 'numbered checkpoint')}"
    )


def _time(seconds: float) -> str:
    """Days or hours of a long time, and a duration of a short one."""
    if seconds >= DAY:
        return f"{seconds / DAY:.3g} days"
    return f"{seconds / 3600:.3g} h" if seconds >= 3600 else duration(seconds)


def _energy(mwh: float) -> str:
    return f"{mwh:.3g} MWh" if mwh >= 0.1 else f"{1e3 * mwh:.3g} kWh"


def _seam(page: Page, first: Stage, second: Stage) -> None:
    """Model, tokenizer, data and learning rate from the first stage to the second."""
    both = ({"model": model_facts(stage.config)} for stage in (first, second))
    allow = second.config.run.allow
    differing = [text for text in config_differences(*both) if not is_allowed(text, allow)]
    page.check(
        not differing,
        f"one model of {parameters(first.setup.architecture):,} parameters"
        if not differing
        else "the models differ: " + "; ".join(text.removeprefix("model.") for text in differing),
    )
    init_from = second.config.run.init_from
    parent = str(init_from)
    run = run_directory(first.config)
    # It may name the run, or a checkpoint inside it.
    # Both may be relative, or only one of them.
    named, whole = Path(parent).absolute(), run.absolute()
    follows = named == whole or whole in named.parents
    page.check(
        follows,
        f"run.init_from of stage 2 ({parent}) is the run of stage 1"
        if follows
        else f"run.init_from of stage 2 ({'not set' if init_from is None else parent}) must be the "
        f"run of stage 1, {run}",
    )
    if first.data is None or second.data is None or not first.order or not second.order:
        page.lines.append("         data, rate and disk of both are not checked without all chunks")
        return
    _data_of_both(page, second.config, *first.data, *second.data)
    last = first.setup.learning_rate(first.order.total_steps, first.order.total_steps)
    steps = second.order.total_steps
    begin, end = (second.setup.learning_rate(step, steps) for step in (1, steps))
    one, two = first.config.lr, second.config.lr
    page.check(
        two.peak <= one.peak,
        f"learning rate: {one.kind} {one.peak:.3g} to {last:.3g}, then {two.kind} from {begin:.3g} "
        f"over {two.peak:.3g} at step {two.warmup_steps:,} to {end:.3g}; stage 2 must not exceed "
        "stage 1's peak",
    )


def _data_of_both(
    page: Page,
    config: Config,
    before: Manifest,
    planned: ChunkOrder,
    manifest: Manifest,
    order: ChunkOrder,
) -> None:
    """One tokenizer, and nothing read twice unless `data.seen_before` allows it."""
    try:
        added = added_specials(manifest, before.tokenizer_sha256)
        common = planned_in_common(before, planned, manifest, order)
    except UserError as problem:
        page.check(False, _one_line(problem))
        return
    page.check(
        added is not None,
        f"one tokenizer ({before.tokenizer_sha256[:12]})"
        + (f", with {', '.join(added)} more in stage 2" if added else "")
        if added is not None
        else f"the tokenizers differ: {before.tokenizer_sha256[:12]} and "
        f"{manifest.tokenizer_sha256[:12]}; prepare the data of stage 2 with the one of stage 1",
    )
    shared, allowed = common.found, config.data.seen_before == "allow"
    page.check(
        allowed or not shared,
        f"the stages share no data ({common.compared} compared)"
        if not shared
        else f"stage 2 reads what stage 1 has read: {'; '.join(shared[:SHOWN])}"
        + (f" and {len(shared) - SHOWN} more" if len(shared) > SHOWN else "")
        + f"; data.seen_before is {config.data.seen_before}",
    )


def _disk(page: Page, stages: Sequence[Stage]) -> None:
    """Checkpoints of the stages against the free space of each folder of runs."""
    needed: dict[Path, int] = {}
    for stage in stages:
        config, shape = stage.config, stage.setup.architecture
        if stage.order is None:
            return
        one = CheckpointBytes(
            parameters(shape),
            WEIGHT_BYTES[stage.setup.precision],
            tensor_count(shape),
            stage.setup.layout.tensor * stage.setup.layout.data,
        )
        count = -(-len(stage.order.names) // max(1, config.checkpoint.every_chunks))
        folder = run_directory(config).parent
        kept = plan_bytes(one, count, config.checkpoint.keep_optimizer_states, 0)
        needed[folder] = needed.get(folder, 0) + kept

    for folder, size in needed.items():
        free = retried(partial(free_bytes, folder), folder)
        of = "both stages" if len(needed) == 1 else f"the stage in {folder}"
        page.check(
            size <= free,
            f"disk: checkpoints of {of} need {bytes_text(size)}, {bytes_text(free)} are free in "
            f"{folder}",
        )


def _one_line(problem: UserError) -> str:
    return "; ".join(str(problem).splitlines())
