"""Rules between config keys, with the nearest values that pass.

- A rule is a function over dotted values that declares the keys it needs. It can therefore run on
  the readable part of a config while another part is wrong.

Alternatives considered:
- Pydantic's model validators: they are skipped as soon as one field is wrong, so a user would meet
  the mistakes of a file in two rounds.
"""

from collections.abc import Callable

from k2train.config.exact_rules import EXACT_RULES
from k2train.config.nearest import (
    Values,
    fits_tensor,
    hint,
    nearest,
)
from k2train.config.pipeline_rules import PIPELINE_RULES
from k2train.config.profile_rules import PROFILE_RULES

Check = Callable[[Values], str | None]

_RULES: list[tuple[tuple[str, ...], Check]] = []


def cross_field_mistakes(values: Values) -> list[tuple[tuple[str, ...], str]]:
    """Return each rule that `values` (dotted key -> value) break: its keys and one line of text.

    The line starts with a key. Rules with missing keys are skipped.
    """
    found = []
    for keys, check in _RULES:
        if all(key in values for key in keys):
            message = check(values)
            if message:
                found.append((keys, message))
    return found


def _rule(*keys: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        _RULES.append((keys, check))
        return check

    return register


@_rule("checkpoint.keep_optimizer_states")
def _two_states(values: Values) -> str | None:
    if values["checkpoint.keep_optimizer_states"] != 1:
        return None
    return (
        "checkpoint.keep_optimizer_states (1) must be 0 (all) or at least 2: "
        "with one, a damaged newest checkpoint would leave none to resume from"
    )


@_rule("data.held_out_rows", "data.held_out_batches", "batch.global_sequences")
def _held_out(values: Values) -> str | None:
    rows, batches = values["data.held_out_rows"], values["data.held_out_batches"]
    if rows is None or batches is None:
        return None
    same = "1 batch is" if batches == 1 else f"{batches} batches are"
    return (
        f"data.held_out_batches ({batches}) and data.held_out_rows ({rows}) both say how many rows "
        f"are scored; leave one out ({same} data.held_out_rows: "
        f"{batches * values['batch.global_sequences']})"
    )


@_rule("model.hidden_size", "model.num_heads")
def _head_size(values: Values) -> str | None:
    hidden, heads, tensor = (
        values["model.hidden_size"],
        values["model.num_heads"],
        values.get("parallel.tensor", 1),
    )
    kv_heads = values.get("model.num_kv_heads", 1)

    # If not set, num_kv_heads follows num_heads, so it must not limit the search for another one.
    kv_heads = 1 if kv_heads == heads else kv_heads

    if hidden % heads:
        problem = f"model.hidden_size ({hidden}) must be divisible by model.num_heads ({heads})"
    elif hidden // heads % 2:
        problem = (
            f"model.hidden_size ({hidden}) / model.num_heads ({heads}) = {hidden // heads} "
            "must be even: rotary positions turn pairs"
        )
    else:
        return None
    return (
        problem
        + hint("model.hidden_size", nearest(hidden, lambda number: number % (2 * heads) == 0))
        + hint(
            "model.num_heads",
            nearest(
                heads,
                lambda number: not (hidden % (2 * number) or number % tensor or number % kv_heads),
            ),
            when_none="",
        )
    )


@_rule("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor")
def _rope_scaling(values: Values) -> str | None:
    low, high = (values[f"model.rope_scaling.{name}_freq_factor"] for name in ("low", "high"))
    if low < high:
        return None
    return (
        f"model.rope_scaling.high_freq_factor ({high:g}) must be above "
        f"model.rope_scaling.low_freq_factor ({low:g}): raise it; Llama 3 has 4 and 1"
    )


@_rule("model.num_heads", "model.num_kv_heads")
def _grouped_heads(values: Values) -> str | None:
    heads, kv_heads, tensor = (
        values["model.num_heads"],
        values["model.num_kv_heads"],
        values.get("parallel.tensor", 1),
    )
    if heads % kv_heads == 0:
        return None

    hidden = values.get("model.hidden_size", 0)
    return (
        f"model.num_heads ({heads}) must be divisible by model.num_kv_heads ({kv_heads})"
        + hint(
            "model.num_kv_heads",
            nearest(kv_heads, lambda number: not (heads % number or number % tensor)),
        )
        + hint(
            "model.num_heads",
            nearest(
                heads,
                lambda number: not (number % kv_heads or number % tensor or hidden % (2 * number)),
            ),
            when_none="",
        )
    )


def _tensor_rule(key: str) -> None:
    @_rule(key, "parallel.tensor")
    def check(values: Values) -> str | None:
        number, tensor = values[key], values["parallel.tensor"]

        hidden = values.get("model.hidden_size", 0) if key == "model.num_heads" else 0
        # Report one mistake, not two, where num_kv_heads only follows num_heads.
        follows = key == "model.num_kv_heads" and number == values.get("model.num_heads")
        if number % tensor == 0 or follows:
            return None
        return (
            f"{key} ({number}) must be divisible by parallel.tensor ({tensor})"
            + hint("parallel.tensor", nearest(tensor, lambda other: fits_tensor(values, other)))
            + hint(
                key,
                nearest(number, lambda other: not (other % tensor or hidden % (2 * other))),
                when_none="",
            )
        )


for _key in ("model.num_heads", "model.num_kv_heads", "model.ffn_hidden_size"):
    _tensor_rule(_key)


@_rule("data.sequence_length", "parallel.tensor", "parallel.sequence")
def _sequence(values: Values) -> str | None:
    length, tensor = values["data.sequence_length"], values["parallel.tensor"]
    if not values["parallel.sequence"] or length % tensor == 0:
        return None
    return (
        f"data.sequence_length ({length}) must be divisible by parallel.tensor ({tensor}) "
        "with parallel.sequence true"
        + hint("parallel.tensor", nearest(tensor, lambda other: fits_tensor(values, other)))
        + hint(
            "data.sequence_length", nearest(length, lambda other: other % tensor == 0, minimum=2)
        )
        + "; or parallel.sequence: false"
    )


@_rule("model.vocab_size", "parallel.tensor")
def _vocabulary(values: Values) -> str | None:
    vocabulary, tensor = values["model.vocab_size"], values["parallel.tensor"]
    if vocabulary >= tensor:
        return None
    return (
        f"model.vocab_size ({vocabulary}) must be at least parallel.tensor ({tensor})"
        + hint("parallel.tensor", nearest(tensor, lambda other: fits_tensor(values, other)))
        + f"; nearest model.vocab_size: {tensor}"
    )


for _keys, _check in PIPELINE_RULES:
    _rule(*_keys)(_check)


@_rule("batch.global_sequences", "batch.micro_sequences")
def _micro_batches(values: Values) -> str | None:
    total, micro = values["batch.global_sequences"], values["batch.micro_sequences"]
    if total % micro == 0:
        return None
    return (
        f"batch.global_sequences ({total}) must be divisible by batch.micro_sequences ({micro})"
        + hint("batch.micro_sequences", nearest(micro, lambda other: total % other == 0))
        + hint("batch.global_sequences", nearest(total, lambda other: other % micro == 0))
    )


@_rule("lr.kind", "lr.peak", "lr.final")
def _final_rate(values: Values) -> str | None:
    kind, peak, final = values["lr.kind"], values["lr.peak"], values["lr.final"]
    if final > peak:
        return (
            f"lr.final ({final:g}) must not be above lr.peak ({peak:g}); nearest lr.final: {peak:g}"
        )
    if kind == "constant" and final not in (0.0, peak):
        return (
            f"lr.final ({final:g}) has no effect with lr.kind constant; "
            "leave it out, or use cosine, linear or wsd"
        )
    return None


@_rule("lr.kind", "lr.decay_steps")
def _decay_steps(values: Values) -> str | None:
    kind, decay_steps = values["lr.kind"], values["lr.decay_steps"]
    if kind == "wsd" and decay_steps is None:
        return "lr.decay_steps: lr.kind wsd needs the length of its final decay, in steps"
    if kind != "wsd" and decay_steps is not None:
        return (
            f"lr.decay_steps ({decay_steps}) has no effect with lr.kind {kind}; "
            "leave it out, or use wsd"
        )
    return None


@_rule("parallel.symmetric_memory", "parallel.tensor", "parallel.sequence")
def _symmetric_memory(values: Values) -> str | None:
    tensor, sequence = values["parallel.tensor"], values["parallel.sequence"]
    if values["parallel.symmetric_memory"] is not True or (tensor > 1 and sequence):
        return None
    return (
        f"parallel.symmetric_memory needs parallel.tensor ({tensor}) of 2 or more "
        f"and parallel.sequence true (is {str(sequence).lower()}); "
        "or parallel.symmetric_memory: false"
    )


@_rule("kernels.recompute", "kernels.recompute_layers")
def _recompute(values: Values) -> str | None:
    policy, count = values["kernels.recompute"], values["kernels.recompute_layers"]
    if count is None or policy != "none":
        return None
    return (
        f"kernels.recompute_layers ({count}) has no effect with kernels.recompute none; "
        "leave it out, or set kernels.recompute: selective or full"
    )


@_rule(
    "kernels.recompute_layers",
    "model.num_layers",
    "parallel.pipeline",
    "parallel.stages_per_rank",
    "parallel.layers_per_stage",
)
def _recompute_layers(values: Values) -> str | None:
    count, uneven = values["kernels.recompute_layers"], values["parallel.layers_per_stage"]
    stages = values["parallel.pipeline"] * values["parallel.stages_per_rank"]
    if uneven == "auto" or values.get("parallel.schedule") == "auto":
        # Not chosen yet: the most that a stage can have beside others of one layer.
        largest = values["model.num_layers"] - values["parallel.pipeline"] + 1
    else:
        largest = max(uneven) if uneven else values["model.num_layers"] // stages
    if count is None or count <= largest:
        return None
    return (
        f"kernels.recompute_layers ({count}) must be at most the layers of a pipeline stage "
        f"({largest}); lower it, or leave it out for all of them"
    )


@_rule("kernels.attention", "kernels.deterministic")
def _deterministic(values: Values) -> str | None:
    if values["kernels.attention"] != "cudnn" or not values["kernels.deterministic"]:
        return None
    # What else cannot be deterministic depends on the device (model/kernels/determinism.py).
    return (
        "kernels.attention (cudnn) is not deterministic: its backward adds gradients in any order, "
        "and torch cannot ask cuDNN for another; set kernels.attention: auto, or "
        "kernels.deterministic: false, and no run will repeat to the bit"
    )


for _keys, _check in (*EXACT_RULES, *PROFILE_RULES):
    _rule(*_keys)(_check)
