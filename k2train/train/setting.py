"""Setting of a run: what the bits of its steps depend on besides state, data and config's numbers.

- Recorded with the steps after each checkpoint. On another setting their numbers are compared
  within the bound of rounding, on the same one to the bit.
- A fact is text, so that a record of an older version compares with one of a newer.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from k2train.record.system_info import package_version
from k2train.train.engine import Engine
from k2train.train.forward_check import signature_of

MACHINE = ("device", "threads")
"""Facts of the machine."""


def setting_of(engine: Engine) -> dict[str, str]:
    """Return the facts of an engine's setting by their names."""
    layout, parallel, batch = engine.grid.layout, engine.config.parallel, engine.config.batch
    mask = engine.config.data.loss_mask
    facts: dict[str, Any] = {
        **signature_of(engine).model_dump(),
        "pipeline": layout.pipeline,
        "data": layout.data,
        "schedule": parallel.schedule,
        "stages_per_rank": layout.stages_per_rank,
        "layers_per_stage": layout.layers_per_stage,
        "bucket_bytes": parallel.bucket_bytes,
        "deterministic": engine.kernels.deterministic,
        "exact": (batch.exact_unit, batch.exact_leaf) if engine.config.run.exact else False,
        "fp8": engine.config.kernels.matmul == "fp8",
        "cross_documents": engine.config.data.cross_documents,
        **({} if mask == "none" else {"loss_mask": mask}),
        "k2train": package_version("k2train"),
    }
    return {name: str(value) for name, value in facts.items()}


def config_digest(identity: Mapping[str, Any]) -> str:
    """Return a short hash of what a run computes, but for the order of its chunks.

    The order may change under a run by events of its ledger; each step names its rows.
    """
    data = {key: value for key, value in identity["data"].items() if key != "order"}
    text = json.dumps({**identity, "data": data}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
