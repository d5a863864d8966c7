"""Rules on `run.exact`: what has equal bits on every layout, and the sizes of its units and leaves.

- `k2train.config.rules` registers them with all the others.
"""

from collections.abc import Callable

from k2train.config.nearest import Values, hint, nearest

Check = Callable[[Values], str | None]


def _sizes(values: Values) -> str | None:
    """Units divide micro-batches and leaves, leaves divide the batch."""
    if not values["run.exact"]:
        return None
    total, micro = values["batch.global_sequences"], values["batch.micro_sequences"]
    unit = values["batch.exact_unit"]
    leaf = values["batch.exact_leaf"] or unit
    for key, size in (("batch.micro_sequences", micro), ("batch.exact_leaf", leaf)):
        if size % unit:
            units = nearest(unit, lambda other: not (micro % other or leaf % other))
            return (
                f"{key} ({size}) must be divisible by batch.exact_unit ({unit}) with run.exact"
                + hint("batch.exact_unit", units)
            )
    if total % leaf:
        return (
            f"batch.global_sequences ({total}) must be divisible by batch.exact_leaf ({leaf}) "
            "with run.exact"
            + hint(
                "batch.exact_leaf", nearest(leaf, lambda other: not (total % other or other % unit))
            )
        )
    return None


def _without_exact(values: Values) -> str | None:
    unit, leaf = values["batch.exact_unit"], values["batch.exact_leaf"]
    if values["run.exact"] or (unit == 1 and leaf is None):
        return None
    name, size = ("unit", unit) if unit != 1 else ("leaf", leaf)
    return (
        f"batch.exact_{name} ({size}) has no effect with run.exact false; "
        "leave it out, or set run.exact: true"
    )


def _tensor(values: Values) -> str | None:
    tensor = values["parallel.tensor"]
    if not values["run.exact"] or tensor == 1:
        return None
    return (
        f"run.exact needs parallel.tensor 1 (is {tensor}): a product that is split over "
        "tensor-parallel ranks has other bits; split the model with parallel.pipeline, "
        "or set run.exact: false"
    )


def _kernels(values: Values) -> str | None:
    if not values["run.exact"]:
        return None
    if values["kernels.matmul"] == "fp8":
        return (
            "run.exact cannot have kernels.matmul (fp8): its scales follow from what a rank "
            "multiplied before; choose kernels.matmul: auto, or set run.exact: false"
        )
    if not values["kernels.deterministic"]:
        return (
            "run.exact needs kernels.deterministic true (is false): a kernel that differs from "
            "run to run differs between layouts; or set run.exact: false"
        )
    return None


EXACT_RULES: tuple[tuple[tuple[str, ...], Check], ...] = (
    (
        (
            "run.exact",
            "batch.global_sequences",
            "batch.micro_sequences",
            "batch.exact_unit",
            "batch.exact_leaf",
        ),
        _sizes,
    ),
    (("run.exact", "batch.exact_unit", "batch.exact_leaf"), _without_exact),
    (("run.exact", "parallel.tensor"), _tensor),
    (("run.exact", "kernels.matmul", "kernels.deterministic"), _kernels),
)
"""The keys that each rule needs, and the rule."""


def exact_world_mistake(values: Values, data: int) -> str | None:
    """Say why `data` data-parallel ranks cannot have whole leaves; None if they can."""
    if not values["run.exact"]:
        return None
    total, unit = values["batch.global_sequences"], values["batch.exact_unit"]
    leaf = values["batch.exact_leaf"] or unit
    if total // data % leaf == 0:
        return None

    leaves = nearest(leaf, lambda other: not (total // data % other or other % unit))
    return (
        f"batch.global_sequences ({total}) / data-parallel size ({data}) = {total // data} "
        f"must be divisible by batch.exact_leaf ({leaf}) with run.exact"
        + hint("batch.exact_leaf", leaves)
    )
