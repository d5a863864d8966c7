"""GPU check part `parity`: losses and gradients on the device against a CPU and independent code.

- The independent code is transformers' LLaMA where it is installed, else a LLaMA written by hand on
  plain torch; the row says which. Both get k2train's initial weights by name.
- fp32 differs by the order of sums only; bf16 by its rounding.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cpu.contract import UnavailableError
from benchmarks.cpu.llama import Llama, LossOf, loss_of
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import world_of_one
from benchmarks.gpu.peers import optional, work_of
from gpu_checks.numerics import (
    CPU,
    Distance,
    Small,
    Trace,
    build_engine,
    distance,
    farthest,
    hold_within,
    ids_of,
    small,
    tensors_of,
    trace,
)
from k2train.hf.names import transformers_name

FP32 = {"loss": 2e-5, "gradient": 2e-4}
BF16 = {"loss": 2e-2, "gradient": 1e-1}
"""Bounds on the distances. A bf16 value has 8 bits: a gradient is a sum of values each 0.4 % off,
and its largest difference that of the unluckiest of millions.
"""


def run(bench: Bench) -> None:
    """Compare the device with a CPU and with independent code."""
    work = small(bench.dry)
    with world_of_one(bench):
        known: dict[str, Trace] = {}
        bench.attempt("the CPU, fp32", lambda: keep(known, "fp32", trace(CPU, work, "fp32")))
        if known:
            compare(bench, work, known["fp32"])


def keep(known: dict[str, Trace], key: str, found: Trace) -> Mapping[str, Any]:
    """Remember a trace; the figures of its row."""
    known[key] = found
    return {"losses": list(found.losses), "kernels": found.kernels}


def compare(bench: Bench, work: Small, base: Trace) -> None:
    """Every comparison, most telling first."""

    def beside(precision: str, bounds: Mapping[str, float], **kernels: Any) -> Mapping[str, Any]:
        found = trace(bench.device, work, precision, **kernels)
        figures = hold_within(distance(found, base), **bounds)
        return {**figures, "kernels": found.kernels, "losses": list(found.losses)}

    off = {"compile": "off"}
    bench.attempt("fp32 = the CPU", partial(beside, "fp32", FP32, **off))
    bench.attempt("independent code, fp32", lambda: independent(bench, work))
    bench.attempt("fp32 = the CPU, kernels auto", partial(beside, "fp32", FP32))
    bench.attempt("bf16 near the CPU's fp32", partial(beside, "bf16", BF16, **off))
    bench.attempt("bf16 near the CPU's fp32, kernels auto", partial(beside, "bf16", BF16))


def independent(bench: Bench, work: Small) -> Mapping[str, Any]:
    """Loss and gradients of one step of the device against independent code on the CPU."""
    engine = build_engine(bench.device, work, "fp32", compile="off")
    weights = tensors_of(engine, engine.optimizer.master)
    name, model, loss, names = independent_model(work, weights)
    theirs = gradients(model, loss, work, names)

    found: dict[str, Tensor] = {}
    reduce = engine.gradients.reduce

    def kept() -> Tensor:
        shard = reduce()
        found.update(tensors_of(engine, shard))
        return shard

    engine.gradients.reduce = kept  # type: ignore[method-assign]
    mine = engine.train_step(ids_of(work, bench.device), 0.0).loss
    apart, tensor = farthest(found, theirs[1])
    loss_apart = abs(mine - theirs[0]) / abs(theirs[0])
    return {**hold_within(Distance(loss_apart, apart, tensor), **FP32), "code": name}


def independent_model(
    work: Small, weights: Mapping[str, Tensor]
) -> tuple[str, nn.Module, LossOf, dict[str, str]]:
    """(what it is, model, its loss, our name of each tensor -> its name), with these weights."""
    sizes = work_of(work.shape, work.batch)
    try:
        module = optional("benchmarks.cpu.hugging_face")
    except UnavailableError:
        model: nn.Module = Llama(sizes)
        names = {name: name.replace("layers.", "blocks.", 1) for name in weights}
        what, loss = "a LLaMA written by hand", loss_of(model)
    else:
        model, loss = module.make_model(sizes, torch.float32)
        names = {name: transformers_name(name) for name in weights}
        what = f"transformers {optional('transformers').__version__}"

    state = {names[name]: values for name, values in weights.items()}
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and not found.missing_keys, found
    return what, model, loss, names


def gradients(
    model: nn.Module, loss: LossOf, work: Small, names: Mapping[str, str]
) -> tuple[float, dict[str, Tensor]]:
    """(mean loss, gradients by our names) of the step's ids on the CPU."""
    total, parts = 0.0, ids_of(work, CPU)
    for part in parts:
        value = loss(part.tokens) / len(parts)
        value.backward()
        total += float(value.detach())
    found = dict(model.named_parameters())
    values = {name: found[theirs].grad for name, theirs in names.items()}
    assert all(value is not None for value in values.values()), "a parameter has no gradient"
    return total, {name: value for name, value in values.items() if value is not None}
