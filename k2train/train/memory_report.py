"""What a config keeps in memory, in lines for people: by the plan's formulas, for the tool and for a run's first lines.

Needs no device: what is left to it (`auto`) is taken as on an accelerator, unless the caller says what it found. The
alternative refused is asking the device after the first step: too late to choose a policy.
"""

from collections.abc import Sequence
from dataclasses import replace

from k2train.config.load import Config
from k2train.plan.activations import RECOMPUTE, Work, layer_bytes
from k2train.plan.cost import ModelShape
from k2train.plan.layout import Layout
from k2train.plan.memory import RankMemory, rank_memory
from k2train.plan.schedule import Program
from k2train.text import bytes_text


def work_of(
    config: Config, device: str = "cuda", attention: str | None = None, matmul: str = "torch"
) -> Work:
    """A micro-batch of `config` on a `device`; `attention` and `matmul` are the kernels in use, where they are known."""
    m, p = config.model, config.parallel
    auto = "flash" if config.kernels.attention == "auto" else config.kernels.attention
    return Work(
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


def memory_of(config: Config, work: Work, layout: Layout, program: Program, pp: int) -> RankMemory:
    """Memory of a rank of pipeline rank `pp`, whose program is given."""
    p = config.parallel
    overlap = p.overlap == "on" or (p.overlap == "auto" and work.device != "cpu")
    return rank_memory(work, layout, program, pp, overlap, p.bucket_bytes)


def policies_text(work: Work) -> str:
    """`257.26 MiB of a micro-batch with recompute none (selective 182.26 MiB, full 16.00 MiB)`."""
    others = [
        f"{policy} {bytes_text(layer_bytes(work, policy))}"
        for policy in RECOMPUTE
        if policy != work.recompute
    ]
    kept = bytes_text(layer_bytes(work, work.recompute))
    some = "" if work.recompute_layers is None else f" in {work.recompute_layers} layers a stage"
    return f"{kept} of a micro-batch with recompute {work.recompute}{some} ({', '.join(others)})"


def start_line(config: Config, work: Work, layout: Layout, program: Program, pp: int) -> str:
    """What a run says of its memory when it starts."""
    memory = memory_of(config, work, layout, program, pp)
    reference = "reference" in config.kernels.model_dump().values()
    return (
        f"a layer keeps {policies_text(work)}; planned for this rank: {bytes_text(memory.activations_bytes)} of "
        f"activations, {bytes_text(memory.total_bytes)} in all"
        + (", more with the reference kernels asked for" if reference else "")
    )


def memory_lines(config: Config, layout: Layout, programs: Sequence[Program]) -> list[str]:
    """The fullest moment of a rank of each pipeline rank, and what the activations would be under every policy."""
    work = work_of(config)
    lines = [
        "memory    at the fullest moment of a rank, on an accelerator",
        f"  a layer keeps {policies_text(work)}",
        "  pp  from step to step  activations      at work on their way        total",
    ]
    for pp in range(layout.pipeline):
        found = memory_of(config, work, layout, programs[pp], pp)
        sizes = (
            found.activations_bytes,
            found.working_bytes,
            found.transfer_bytes,
            found.total_bytes,
        )
        lines.append(
            f"  {pp:<3} {bytes_text(found.state.total_bytes):>17} "
            + " ".join(f"{bytes_text(n):>12}" for n in sizes)
        )
    lines.append("  activations / total of a rank, by pipeline rank and recompute")
    lines.append("  pp  " + "".join(f"{policy:>25}" for policy in RECOMPUTE))
    for pp in range(layout.pipeline):
        each = [
            memory_of(config, replace(work, recompute=p), layout, programs[pp], pp)
            for p in RECOMPUTE
        ]
        shown = [f"{bytes_text(m.activations_bytes)} / {bytes_text(m.total_bytes)}" for m in each]
        lines.append(f"  {pp:<3} " + "".join(f"{text:>25}" for text in shown))
    return lines
