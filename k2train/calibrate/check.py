"""Predicted beside measured step times: short runs of the real trainer in several layouts.

- Each layout is a run of its own over random tokens, through the launcher, with everything left out
  that no step needs: checkpoints, audits, evaluation. Its steps are those of `metrics.jsonl`.
- The first steps, which allocate, do not count.
- With several rounds the layouts take turns. The machine's pace is sampled between all runs, and
  each run is compared with what was predicted at its own: a speed that moves is no error of a plan.
- Needs no torch itself.

Alternatives considered:
- Steps of an engine in turns, as the benches take them: the trainer around it would not be checked.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from k2train.calibrate import processes
from k2train.calibrate.pace import pace_of
from k2train.calibrate.workload import workload_of
from k2train.config.load import Config, load_config
from k2train.config.messages import nearest
from k2train.data.chunk import write_chunk, write_manifest
from k2train.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, UnavailableError
from k2train.plan.hardware import Cluster
from k2train.plan.uncertainty import Interval, interval
from k2train.record.metrics import latest
from k2train.text import markdown_table

KEYS: Mapping[str, str] = {
    "tensor": "parallel.tensor",
    "pipeline": "parallel.pipeline",
    "stages": "parallel.stages_per_rank",
    "schedule": "parallel.schedule",
    "sequence": "parallel.sequence",
    "micro": "batch.micro_sequences",
    "recompute": "kernels.recompute",
}
"""Names in a layout, and the config keys they set; `data` adds data-parallel ranks."""
LAYOUTS = (
    "data=1",
    "micro=2",
    "data=2",
    "tensor=2,sequence=false",
    "tensor=2",
    "pipeline=2,schedule=gpipe",
    "pipeline=2",
    "pipeline=2,micro=2",
    "pipeline=2,stages=2,schedule=interleaved",
    "pipeline=2,schedule=zb-h1",
    "pipeline=2,tensor=2",
)
QUIET = (
    *("data.order=null", "data.held_out_rows=0", "data.seen_before=allow", "run.init_from=null"),
    *("checkpoint.every_seconds=0", "audit.replicas_every_steps=0", "audit.root_every_steps=0"),
    *("audit.subset_losses=false", "audit.row_losses=false"),
    *("audit.resume_drill=off", "log.detail=quiet", "wandb.mode=disabled"),
)
"""Overrides that leave out what is no part of a step."""
METRICS = "metrics.jsonl"
SKIPPED = 2
CLOSE = 0.15
HEADINGS = ("layout", "ranks", "pace", "measured", "spread", "predicted", "error", "nine of ten")


@dataclass(frozen=True)
class Case:
    """One layout of a config."""

    text: str
    overrides: tuple[str, ...]
    world_size: int


@dataclass(frozen=True)
class Checked:
    """A layout, predicted and measured."""

    case: Case
    predicted: Interval
    seconds: float
    """Median of the steps, each as it would have been at the speed of the calibration."""
    low: float
    """First quartile of the steps, as `seconds`."""
    high: float
    """Third quartile."""
    pace: float = 1.0
    """Median of the machine's pace, for that at the calibration; above 1: slower."""

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / self.seconds

    @property
    def error(self) -> float:
        """Predicted for measured, less one."""
        return self.predicted.seconds / self.seconds - 1


def parse_layout(text: str) -> Case:
    """Read `tensor=2,pipeline=2`. Raises ConfigError."""
    degrees = {"tensor": 1, "pipeline": 1, "data": 1}
    overrides = []
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in KEYS and name != "data":
            near = nearest(name, [*KEYS, "data"])
            known = f"nearest is {near}" if near else f"names are {', '.join([*KEYS, 'data'])}"
            raise ConfigError(f"layout {text!r}: unknown name {name!r}; {known}")
        if name in degrees:
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(
                    f"layout {text!r}: {name} ({value}) must be a whole number above 0"
                )
            degrees[name] = int(value)
        if name in KEYS:
            overrides.append(f"{KEYS[name]}={value}")
    return Case(text, tuple(overrides), degrees["tensor"] * degrees["pipeline"] * degrees["data"])


def check(
    config: str,
    overrides: Sequence[str],
    layouts: Sequence[str],
    cluster: Cluster,
    steps: int,
    log: Callable[[str], None],
    rounds: int = 1,
    tiny: bool = False,
) -> list[Checked]:
    """Predict every layout and run each `rounds` times, in turns; the steps of all runs count.

    `tiny` says that the cluster was measured at tiny shapes.

    Raises ConfigError before any run for one that cannot be.
    """
    if cluster.measured is None:
        raise ConfigError(
            f"cluster {cluster.name} was not measured: a check needs a file that "
            "calibrate has written on this machine"
        )
    cases = [parse_layout(text) for text in layouts]
    configs = [load_config(config, [*overrides, *case.overrides]) for case in cases]
    planned = [
        interval(workload_of(one, case.world_size), cluster)
        for one, case in zip(configs, cases, strict=True)
    ]
    seconds: list[list[float]] = [[] for _ in cases]
    paces: list[list[float]] = [[] for _ in cases]
    device = "cpu" if cluster.measured.cores is not None else "cuda"
    with (
        TemporaryDirectory(prefix="k2train-check-") as name,
        pace_of(cluster.measured, Path(name), device, tiny) as pace,
    ):
        for turn in range(rounds):
            for number, case in enumerate(cases):
                given = [*overrides, *case.overrides, f"run.name=check_{number}_{turn}"]
                threads = cluster.measured.speed(case.world_size).threads
                before = pace.sample(case.world_size)
                took = _steps(Path(name), config, given, case, threads, steps)
                now = (before + pace.sample(case.world_size)) / 2
                seconds[number] += [one / now for one in took]
                paces[number].append(now)
                said = f"{case.text}: {statistics.median(took):.3f} s, pace {now:.2f}"
                log(f"{said}, predicted {now * planned[number].seconds:.3f} s")
    return [_checked(*one) for one in zip(cases, planned, seconds, paces, strict=True)]


def _checked(
    case: Case, predicted: Interval, seconds: Sequence[float], paces: Sequence[float]
) -> Checked:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Checked(case, predicted, middle, low, high, statistics.median(paces))


def _steps(
    folder: Path, config: str, overrides: Sequence[str], case: Case, threads: int, steps: int
) -> list[float]:
    """Seconds of the steps of one run, the first ones left out. Raises UnavailableError."""
    loaded = load_config(config, overrides)
    given = [
        *overrides,
        *QUIET,
        f"data.manifest={_data(folder, loaded, loaded.lr.warmup_steps + 4 * steps)}",
        f"run.directory={folder}",
        f"run.stop_after_steps={steps + SKIPPED}",
    ]
    launch = ["-m", "k2train.launch", "--nproc-per-node", str(case.world_size)]
    log = folder / f"{loaded.run.name}.log"
    process = processes.start(
        [*(launch if case.world_size > 1 else []), "-m", "k2train.train", config, *given],
        {"OMP_NUM_THREADS": str(threads)},
        log,
    )
    try:
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    if code not in (EXIT_DONE, EXIT_STOPPED):
        raise UnavailableError(
            f"check of {case.text}: the run ended with exit code {code}: {processes.last_line(log)}"
        )
    return [row.seconds for row in latest(folder / loaded.run.name / METRICS)][SKIPPED:]


def _data(folder: Path, config: Config, steps: int) -> Path:
    """Manifest of a folder of random tokens for a config, made once."""
    rows, length = steps * config.batch.global_sequences, config.data.sequence_length
    vocab = config.model.vocab_size
    data = folder / f"data_{rows}_{length}_{vocab}"
    manifest = data / "manifest.json"
    try:
        data.mkdir()
    except FileExistsError:
        return manifest
    drawn = np.random.default_rng(0).integers(0, vocab, (rows, length))
    ids = drawn.astype(np.uint16) if vocab <= 2**16 else drawn.astype(np.uint32)
    chunk = write_chunk(data, "chunk_000", [ids], rows, vocab, {"random": rows * length})
    write_manifest(
        data, tokenizer_sha256="0" * 64, sequence_length=length, vocab_size=vocab, chunks=[chunk]
    )
    return manifest


def check_lines(checked: Sequence[Checked]) -> list[str]:
    """Markdown table of a check, and a line that sums it up."""
    rows = [
        [
            one.case.text,
            str(one.case.world_size),
            f"{one.pace:.2f}",
            f"{one.pace * one.seconds:.3f} s",
            f"{one.spread:.0%}",
            f"{one.pace * one.predicted.seconds:.3f} s",
            f"{one.error:+.1%}",
            f"{one.pace * one.predicted.low:.3f} to {one.pace * one.predicted.high:.3f} s",
        ]
        for one in checked
    ]
    close = sum(abs(one.error) <= CLOSE for one in checked)
    mean = statistics.fmean(abs(one.error) for one in checked)
    inside = sum(one.predicted.low <= one.seconds <= one.predicted.high for one in checked)
    summary = (
        f"{close} of {len(checked)} within {CLOSE:.0%}; mean error {mean:.1%}; {inside} inside "
        f"their interval; rank correlation {rank_correlation(checked)}"
    )
    return [*markdown_table(HEADINGS, rows), "", summary]


def rank_correlation(checked: Sequence[Checked]) -> str:
    """Spearman's correlation of predicted and measured seconds; `-` where it has no meaning."""
    predicted = [one.predicted.seconds for one in checked]
    measured = [one.seconds for one in checked]
    if len(set(predicted)) < 2 or len(set(measured)) < 2:
        return "-"
    return f"{statistics.correlation(ranks_of(predicted), ranks_of(measured)):.2f}"


def ranks_of(values: Sequence[float]) -> list[float]:
    """Rank of each value from 1; equal ones share the mean of theirs."""
    order = sorted(values)
    return [order.index(one) + (order.count(one) + 1) / 2 for one in values]
