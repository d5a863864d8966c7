"""Predicted memory use of a config, formatted for the console.

- Uses the formulas of the plan; needs no device. `tools/plan.py` and every starting run show it.
- Settings left to the device (`auto`) are taken as on an accelerator, unless the caller says
  otherwise.

Alternatives considered:
- Measuring on the device after the first step: too late to choose a recompute policy.
"""

from dataclasses import replace

from k2train.plan.activations import RECOMPUTE, ActivationSpec, layer_bytes
from k2train.text import bytes_text, counted
from k2train.train.setup import Setup


def activations_text(spec: ActivationSpec) -> str:
    """Format one layer's activations: `257.26 MiB (recompute none; selective 182.26 MiB, ...)`."""
    others = [
        f"{policy} {bytes_text(layer_bytes(spec, policy))}"
        for policy in RECOMPUTE
        if policy != spec.recompute
    ]

    size = bytes_text(layer_bytes(spec, spec.recompute))
    count = spec.recompute_layers
    where = "" if count is None else f" in {counted(count, 'layer')} of a stage"
    return f"{size} (recompute {spec.recompute}{where}; {', '.join(others)})"


def memory_line(setup: Setup, work: ActivationSpec, pp: int) -> str:
    """Format the memory line that a run logs when it starts."""
    memory, shared = setup.memory(work, pp), setup.shared_bytes(work.device)
    # The reference kernels keep more than the formulas of the plan count.
    reference = "reference" in setup.config.kernels.model_dump().values()
    return (
        f"activations per layer and micro-batch: {activations_text(work)}; planned for this rank: "
        f"{bytes_text(memory.activations_bytes)} activations, "
        f"{bytes_text(memory.total_bytes)} in total"
        + (f", and up to {bytes_text(shared)} shared with other ranks" if shared else "")
        + (", more with the configured reference kernels" if reference else "")
    )


def memory_table(setup: Setup) -> list[str]:
    """Format the peak memory of one rank per pipeline rank, and per recompute policy."""
    work = setup.work()
    lines = [
        "memory    peak of one rank, on an accelerator",
        f"  activations per layer and micro-batch: {activations_text(work)}",
        "  pp         persistent  activations      working  in transfer        total",
    ]

    for pp in range(setup.layout.pipeline):
        memory = setup.memory(work, pp)
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

    lines.append(
        "  total: persistent, and the larger of activations with working and what is in transfer"
    )
    lines.append("  activations / total of one rank, by pipeline rank and recompute policy")
    lines.append("  pp  " + "".join(f"{policy:>25}" for policy in RECOMPUTE))

    for pp in range(setup.layout.pipeline):
        by_policy = [setup.memory(replace(work, recompute=policy), pp) for policy in RECOMPUTE]
        cells = [
            f"{bytes_text(m.activations_bytes)} / {bytes_text(m.total_bytes)}" for m in by_policy
        ]
        lines.append(f"  {pp:<3} " + "".join(f"{text:>25}" for text in cells))
    return lines + shared_lines(setup)


def shared_lines(setup: Setup) -> list[str]:
    """Format the host memory that ranks share in a run on the CPUs of one machine, if any."""
    ranks = range(setup.layout.world_size)
    each, machine = setup.shared_bytes("cpu"), setup.shared_bytes("cpu", ranks)
    if not each:
        return []
    return [
        f"  on the CPUs of one machine: transfers in memory that two ranks share, up to "
        f"{bytes_text(each)} of a rank, {bytes_text(machine)} in all (parallel.shared_memory)"
    ]
