"""Benchmark contenders: their interleaved groups, and the target ratios.

- The reference is in every group, so every ratio is of processes that ran in turns.
- Groups keep memory bounded, and a peer's failure does not delay all.
- Names are those of the command line.
- Standard library only: the driver imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2train.errors import ConfigError

PRECISIONS = ("fp32", "bf16")
REFERENCE = "reference"


@dataclass(frozen=True)
class Contender:
    """One way to do the work: a module with `build`, its options, and its number of processes."""

    name: str
    module: str
    world: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    group: str = "one process"
    precision: str = "fp32"
    root: Path | None = None
    """Another tree to run it from, by the name it has there; None: this one."""

    @property
    def ours(self) -> bool:
        """True for k2train."""
        return self.module.endswith(".k2train_contender")


def _peer(name: str, module: str, world: int, group: str, **options: Any) -> Contender:
    return Contender(name, f"benchmarks.cpu.{module}", world, options, group)


def _ours(name: str, world: int, group: str, **sections: Mapping[str, Any]) -> Contender:
    return Contender(name, "benchmarks.cpu.k2train_contender", world, sections, group)


def _pipeline(schedule: str, stages_per_rank: int = 1, **more: Any) -> Contender:
    keys = {"pipeline": 2, "schedule": schedule, "stages_per_rank": stages_per_rank, **more}
    return _ours(f"k2train-pp2-{schedule}", 2, "pipeline", parallel=keys)


def _torch(name: str, schedule: str) -> tuple[Contender, Contender]:
    """A schedule of torch with even stages, and balanced with the head."""
    even = _peer(f"pipelining-{name}", "pipelining", 2, "pipeline", schedule=schedule)
    name = f"{even.name}-balanced"
    return even, _peer(name, "pipelining", 2, "pipeline", schedule=schedule, balanced=True)


CHOSEN = {"layers_per_stage": "auto"}
"""Keys of `parallel` that leave the cut to the plan."""


BOTH = "tensor x pipeline"
CONTENDERS: tuple[Contender, ...] = (
    _peer(REFERENCE, "reference", 1, "one process"),
    _peer("reference-compiled", "reference", 1, "one process", compile=True),
    _peer("transformers", "hugging_face", 1, "one process"),
    _ours("k2train", 1, "one process"),
    _ours("k2train-compiled", 1, "one process", kernels={"compile": "on"}),
    _peer("ddp2", "data_parallel", 2, "data parallel", kind="ddp"),
    _peer("fsdp2", "data_parallel", 2, "data parallel", kind="fsdp2"),
    _ours("k2train-dp2", 2, "data parallel"),
    _peer("dtensor-tp2", "dtensor", 2, "tensor parallel"),
    _peer("dtensor-tp2-sp", "dtensor", 2, "tensor parallel", sequence=True),
    _peer("megatron-tp2", "megatron_core", 2, "tensor parallel", tensor=2),
    _ours("k2train-tp2-sp", 2, "tensor parallel", parallel={"tensor": 2}),
    *_torch("1f1b", "1F1B"),
    *_torch("interleaved", "Interleaved1F1B"),
    *_torch("zb", "InterleavedZeroBubble"),
    *_torch("zbv", "ZBVZeroBubble"),
    _peer("megatron-pp2", "megatron_core", 2, "pipeline", pipeline=2),
    _peer("megatron-pp2-balanced", "megatron_core", 2, "pipeline", pipeline=2, balanced=True),
    _pipeline("1f1b"),
    _pipeline("interleaved", 2),
    _pipeline("zb-h1"),
    _pipeline("zb-h2"),
    _pipeline("zb-v", 2),
    _pipeline("auto", 2, **CHOSEN),
    _peer("torch-tp2-pp2", "pipelining", 4, BOTH, schedule="1F1B", tensor=2),
    _peer(
        "torch-tp2-pp2-balanced", "pipelining", 4, BOTH, schedule="1F1B", tensor=2, balanced=True
    ),
    _peer("megatron-tp2-pp2", "megatron_core", 4, BOTH, tensor=2, pipeline=2),
    _peer(
        "megatron-tp2-pp2-balanced", "megatron_core", 4, BOTH, tensor=2, pipeline=2, balanced=True
    ),
    _ours("k2train-tp2-pp2", 4, BOTH, parallel={"tensor": 2, "pipeline": 2}),
    _ours(
        "k2train-tp2-pp2-auto",
        4,
        BOTH,
        parallel={"tensor": 2, "pipeline": 2, "schedule": "auto", "stages_per_rank": 2, **CHOSEN},
    ),
)
QUICK = (REFERENCE, "transformers", "k2train", "k2train-dp2", "k2train-tp2-sp", "k2train-pp2-1f1b")


@dataclass(frozen=True)
class Aim:
    """Target: the best of `ours` is at least `factor` times as fast as the best of `theirs`."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    factor: float
    title: str


def _named(start: str) -> tuple[str, ...]:
    return tuple(c.name for c in CONTENDERS if c.name.startswith(start))


OUR_PIPELINES = _named("k2train-pp2")
AIMS: tuple[Aim, ...] = (
    Aim(("k2train",), ("transformers",), 1.1, "transformers"),
    Aim(("k2train-compiled",), ("reference-compiled",), 1.0, "the compiled reference"),
    Aim(("k2train-dp2",), ("ddp2",), 1.05, "DDP"),
    Aim(("k2train-tp2-sp",), ("megatron-tp2",), 1.2, "Megatron-core"),
    Aim(("k2train-tp2-sp",), _named("dtensor"), 1.5, "DTensor"),
    Aim(("k2train-tp2-sp",), (REFERENCE,), 0.95, "the reference"),
    Aim(OUR_PIPELINES, _named("pipelining"), 1.2, "torch's pipelining"),
    Aim(OUR_PIPELINES, (REFERENCE,), 0.95, "the reference"),
    Aim(_named("k2train-tp2-pp2"), _named("megatron-tp2-pp2"), 1.2, "Megatron-core"),
    Aim(_named("k2train-tp2-pp2"), _named("torch-tp2-pp2"), 1.2, "torch's pipelining and DTensor"),
)


def find(name: str) -> Contender | None:
    """The contender of that name, or None."""
    return next((c for c in CONTENDERS if c.name == name), None)


def choose(
    only: Sequence[str] | None,
    quick: bool,
    precisions: Sequence[str],
    more: Sequence[Contender] = (),
) -> list[list[Contender]]:
    """Groups of contenders that run interleaved, each with the reference first.

    Quick is one group. In bf16 the first group also has the fp32 reference: the one number that
    connects the two precisions. Raises ConfigError for an unknown name.
    """
    unknown = [name for name in only or () if find(name) is None]
    if unknown:
        raise ConfigError(
            f"--only {unknown[0]}: not one of {', '.join(c.name for c in CONTENDERS)}"
        )

    names = set(only) if only else set(QUICK) if quick else {c.name for c in CONTENDERS}
    chosen = [*(c for c in CONTENDERS if c.name in names - {REFERENCE}), *more]
    reference = CONTENDERS[0]
    groups = list(dict.fromkeys("quick" if quick else c.group for c in chosen)) or [reference.group]
    found = []

    for precision in precisions:
        for group in groups:
            members = [c for c in chosen if quick or c.group == group]
            joining = [reference] if precision != PRECISIONS[0] and group == groups[0] else []
            same = [dataclasses.replace(c, precision=precision) for c in (reference, *members)]
            found.append(
                [dataclasses.replace(c, group=f"{group}, {precision}") for c in (*joining, *same)]
            )

    return found


def variant(text: str) -> Contender:
    """Parse `NAME: CONTENDER key=value ...` to a k2train layout with other keys.

    Raises ConfigError.
    """
    name, _, rest = text.partition(":")
    base, *changes = rest.split() or [""]
    known = find(base)
    if known is None or not known.ours or not name.strip():
        raise ConfigError(
            f"--variant {text!r}: must be NAME: CONTENDER section.key=value ..., with a k2train "
            "contender"
        )

    if find(name.strip()) is not None:
        raise ConfigError(
            f"--variant {text!r}: {name.strip()} is a contender already; give it another name"
        )

    sections = {section: dict(values) for section, values in known.options.items()}
    for change in changes:
        key, _, value = change.partition("=")
        section, _, inner = key.partition(".")
        if not inner or not value:
            raise ConfigError(f"--variant {text!r}: {change} is not section.key=value")
        sections.setdefault(section, {})[inner] = parse_value(value)

    return dataclasses.replace(known, name=name.strip(), options=sections)


def parse_value(text: str) -> Any:
    """Parse `4`, `[5,3]`, `true`, `null` or a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text
