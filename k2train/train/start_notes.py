"""Notes on settings that are legal and absurd here: emulated bf16, evaluations that take too long.

- A start logs them, and `--explain` and the plan tool show them before one. Each names the numbers
  and the setting that is better.

Alternatives considered:
- Refusing such settings: a test or a comparison may want them.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from k2train.config.load import Config
from k2train.data.held_out import HeldOutSet
from k2train.data.order import ChunkOrder
from k2train.train.machine import cpu_has_bf16, has_accelerator

FORWARDS_A_STEP = {"none": 3, "selective": 3, "full": 4}
"""Forwards that a step of a batch takes: a backward is two, full recomputation one more."""
SMALL_SHARE = 0.1
"""Share of the training time that an evaluation with the proposed setting takes."""


def bf16_note(config: Config, on_cpu: bool | None = None) -> str:
    """Say that this CPU emulates bf16 products; "" where it does not, or an accelerator computes.

    It does with `kernels.matmul: torch` only: `auto` has them upcast to fp32 there.
    `on_cpu`: whether the run computes on the CPU; None: unknown yet.
    """
    emulated = config.kernels.matmul == "torch" and cpu_has_bf16() is False
    if config.precision != "bf16" or not emulated:
        return ""
    better = "set kernels.matmul=auto or precision=fp32"
    if on_cpu is None and not has_accelerator():
        return (
            "precision bf16: no accelerator is seen here, and this CPU has no bf16 instructions "
            f"and emulates them, several times slower than fp32; on it {better}"
        )
    if not on_cpu:
        return ""
    return (
        "precision bf16 is emulated: this CPU has no bf16 instructions (avx512_bf16, amx_bf16) "
        f"and is several times slower than in fp32; {better}"
    )


def evaluation_note(config: Config, held_out: Sequence[HeldOutSet], order: ChunkOrder) -> str:
    """Say that an evaluation takes longer than the training between two of them; "" if not."""
    batch, every = config.batch.global_sequences, config.checkpoint.every_chunks
    rows = sum(part.rows for part in held_out)
    steps = order.total_steps / ceil(len(order.names) / every)
    forwards = FORWARDS_A_STEP[config.kernels.recompute]
    if rows <= steps * forwards * batch:
        return ""

    fewer = max(1, int(SMALL_SHARE * steps * forwards * batch / len(held_out)))
    sets = "" if len(held_out) == 1 else f" of {len(held_out)} sets"
    return (
        f"the held-out loss takes longer than the training: {rows:,} rows{sets} cost as much as "
        f"{rows / batch / forwards:.0f} steps, after every {steps:.0f} steps; "
        f"data.held_out_rows={fewer} makes that {fewer * len(held_out) / batch / forwards:.1f} "
        "steps, checkpoint.every_chunks makes it rarer"
    )


def determinism_note(config: Config, device_type: str) -> str:
    """Say that the bits of this run will not repeat; "" where they will, as on every CPU."""
    if config.kernels.deterministic or device_type == "cpu":
        return ""
    return (
        f"kernels.deterministic is false: sums have no fixed order on {device_type}, so a resume "
        "or a second run of this record ends with other bits"
    )


def determinism_change(before: Mapping[str, Any], config: Config, device_type: str) -> str:
    """Say that a run continues with another `kernels.deterministic`; "" where it does not.

    `before` is the config of its checkpoint; configs older than the key say nothing.
    """
    was = before.get("kernels", {}).get("deterministic")
    now = config.kernels.deterministic
    if device_type == "cpu" or was is None or was == now:
        return ""
    return (
        "kernels.deterministic was true up to this checkpoint and is false from here: what follows "
        "does not repeat to the bit"
        if was
        else "kernels.deterministic was false up to this checkpoint and is true from here: what "
        "follows repeats to the bit, what led to it does not"
    )
