"""Predicted memory use of a config, formatted for the console.

- Uses the formulas of the plan; needs no device. `tools/plan.py` and every starting run show it.
- Settings left to the device (`auto`) are taken as on an accelerator, unless the caller says
  otherwise.

Alternatives considered:
- Measuring on the device after the first step: too late to choose a recompute policy.
"""

from collections.abc import Sequence
from dataclasses import replace

from k2train.config.load import Config
from k2train.plan.activations import RECOMPUTE, ActivationSpec, layer_bytes
from k2train.plan.cost import ModelShape
from k2train.plan.layout import Layout
from k2train.plan.memory import RankMemory, rank_memory
from k2train.plan.schedule import Program
from k2train.text import bytes_text


def spec_of(
    config: Config, device: str = "cuda", attention: str | None = None, matmul: str = "torch"
) -> ActivationSpec:
    """Return the work of one micro-batch of `config` on a device type.

    `attention` and `matmul` are the kernels in use, if known.
    """
    m, p = config.model, config.parallel
    auto = "flash" if config.kernels.attention == "auto" else config.kernels.attention
    return ActivationSpec(
        ModelShape(
            m.num_layers,
            m.hidden_size,
            m.ffn_hidden_size,
            m.num_heads,
            m.num_kv_heads or m.num_heads,
            m.vocab_size,
        ),
        config.data.sequence_length,
        config.batch.micro_sequences,
        config.precision,
        tensor=p.tensor,
        sequence=bool(p.sequence) and p.tensor > 1,
        regather=p.gathered == "again" or (p.gathered == "auto" and device != "cpu"),
        device=device,
        attention=attention or auto,
        matmul=matmul,
        block=config.data.cross_documents == "block",
        recompute=config.kernels.recompute,
        recompute_layers=config.kernels.recompute_layers,
    )


def memory_of(
    config: Config, spec: ActivationSpec, layout: Layout, program: Program, pp: int
) -> RankMemory:
    """Return the memory of one rank at pipeline rank `pp`, which runs `program`."""
    p = config.parallel
    overlap = p.overlap == "on" or (p.overlap == "auto" and spec.device != "cpu")
    return rank_memory(spec, layout, program, pp, overlap, p.bucket_bytes)


def activations_text(spec: ActivationSpec) -> str:
    """Format one layer's activations: `257.26 MiB (recompute none; selective 182.26 MiB, ...)`."""
    others = [
        f"{policy} {bytes_text(layer_bytes(spec, policy))}"
        for policy in RECOMPUTE
        if policy != spec.recompute
    ]

    size = bytes_text(layer_bytes(spec, spec.recompute))
    count = spec.recompute_layers
    where = "" if count is None else f" in {count} layers of a stage"
    return f"{size} (recompute {spec.recompute}{where}; {', '.join(others)})"


def memory_line(
    config: Config, spec: ActivationSpec, layout: Layout, program: Program, pp: int
) -> str:
    """Format the memory line that a run logs when it starts."""
    memory = memory_of(config, spec, layout, program, pp)
    # The reference kernels keep more than the formulas of the plan count.
    reference = "reference" in config.kernels.model_dump().values()
    return (
        f"activations per layer and micro-batch: {activations_text(spec)}; planned for this rank: "
        f"{bytes_text(memory.activations_bytes)} activations, "
        f"{bytes_text(memory.total_bytes)} in total"
        + (", more with the configured reference kernels" if reference else "")
    )


def memory_table(config: Config, layout: Layout, programs: Sequence[Program]) -> list[str]:
    """Format the peak memory of one rank per pipeline rank, and per recompute policy."""
    spec = spec_of(config)
    lines = [
        "memory    peak of one rank, on an accelerator",
        f"  activations per layer and micro-batch: {activations_text(spec)}",
        "  pp         persistent  activations      working  in transfer        total",
    ]

    for pp in range(layout.pipeline):
        memory = memory_of(config, spec, layout, programs[pp], pp)
        sizes = (
            memory.activations_bytes,
            memory.working_bytes,
            memory.transfer_bytes,
            memory.total_bytes,
        )
        lines.append(
            f"  {pp:<3} {bytes_text(memory.state.total_bytes):>17} "
            + " ".join(f"{bytes_text(size):>12}" for size in sizes)
        )

    lines.append("  activations / total of one rank, by pipeline rank and recompute policy")
    lines.append("  pp  " + "".join(f"{policy:>25}" for policy in RECOMPUTE))

    for pp in range(layout.pipeline):
        by_policy = [
            memory_of(config, replace(spec, recompute=p), layout, programs[pp], pp)
            for p in RECOMPUTE
        ]
        cells = [
            f"{bytes_text(m.activations_bytes)} / {bytes_text(m.total_bytes)}" for m in by_policy
        ]
        lines.append(f"  {pp:<3} " + "".join(f"{text:>25}" for text in cells))
    return lines
