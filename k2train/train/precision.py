"""`precision: auto`, decided at the first start: bf16 where all devices have it, fp32 otherwise.

- All ranks decide alike, from what every rank's device can do.
- The decision is what the run's config says from then on: in `config.yaml`, in the ledger and in
  every checkpoint. A resume keeps it (`recorded_choices.with_recorded_precision`), also on a
  machine that would have decided otherwise.

Alternatives considered:
- Deciding at every start: a run would change its numbers with the machine it continues on.
"""

from dataclasses import replace

import torch

from k2train.parallel.agreement import Agreement
from k2train.parallel.grid import ProcessGrid
from k2train.train.machine import cpu_has_bf16
from k2train.train.preflight import Start
from k2train.train.recorded_choices import with_precision

BF16_CAPABILITY = (8, 0)
"""First compute capability of NVIDIA's GPUs with bf16 in their tensor cores (Ampere)."""


def device_has_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bf16 numbers in hardware, as far as is known."""
    if device.type == "cpu":
        return cpu_has_bf16() is True
    # AMD's GPUs have had it since MI100, the oldest that torch supports.
    return (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    )


def decide_precision(start: Start, grid: ProcessGrid) -> Start:
    """Return the start with its precision decided; collective if it is not yet."""
    config = start.setup.config
    if config.precision != "auto":
        return start

    with_it = torch.tensor([int(device_has_bf16(grid.device))])
    ranks = int(Agreement(grid).sum(with_it, "agree on the precision"))
    world = grid.layout.world_size
    if ranks == world:
        precision, reason = "bf16", "all devices have it"
    elif ranks == 0:
        precision, reason = "fp32", "no device has bf16 instructions"
    else:
        precision, reason = "fp32", f"{world - ranks} of {world} devices have no bf16 instructions"
    return replace(
        start,
        setup=replace(start.setup, config=with_precision(config, precision)),
        identity={**start.identity, "precision": precision},
        precision_reason=reason,
    )
