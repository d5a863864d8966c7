"""Types of what a run says of a checkpoint: the JSON that was read comes back, unknown keys too."""

import json
import math
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from k2train.checkpoint.run_facts import (
    Facts,
    ForwardAnswer,
    LayoutFacts,
    Loss,
    ParentFacts,
    Rate,
    RunIdentity,
    SignatureFacts,
)

PROMPT = {
    "num_layers": 2,
    "sequence_length": 16,
    "vocab_size": 23,
    "cross_documents": "attend",
    "positions": [7, 15],
}
SIGNATURE = {
    "tensor": 2,
    "sequence": True,
    "micro_sequences": 1,
    "precision": "bf16",
    "kernels": "attention sdpa",
    "torch": "2.13.0",
    "device": "x86_64",
    "threads": 1,
}
ANSWER: dict[str, Any] = {
    "sha256": "0" * 64,
    "values": [[0.1, None, -3], [1e-300, 2.5, 0]],
    "max_abs": 3,
    "prompt": PROMPT,
    "signature": SIGNATURE,
}
IDENTITY = {
    "model": {"hidden_size": 8},
    "batch": {"global_sequences": 12},
    "run": {"seed": 7},
    "data": {
        "sequence_length": 16,
        "tokenizer_sha256": "t",
        "order": [{"name": "a", "sha256": "0"}],
    },
    "optimizer": {"eps": 1e-8},
    "lr": {"peak": 0.1},
    "precision": "fp32",
}


@pytest.mark.parametrize(
    ("kind", "tree"),
    (
        (ForwardAnswer, ANSWER),
        (ForwardAnswer, {**ANSWER, "apart": "", "later": {"a": [1, None]}}),
        (ForwardAnswer, {**ANSWER, "signature": {**SIGNATURE, "symmetric_memory": False, "b": 1}}),
        (RunIdentity, IDENTITY),
        (RunIdentity, {**IDENTITY, "matmul": "fp8"}),
        (LayoutFacts, {"tensor": 1, "pipeline": 2, "data": 3}),
        (LayoutFacts, {"tensor": 1, "pipeline": 2, "data": 3, "layers_per_stage": [1, 2], "x": 0}),
        (ParentFacts, {"parent": "runs/a", "data_in_common": ["x"], "rate_before": None}),
    ),
)
def test_json_comes_back_as_it_was_read(kind: type[Facts], tree: dict[str, Any]) -> None:
    """Catches a key that is lost, a default that is written, and a whole number that gets a dot."""
    text = json.dumps(tree)
    back = kind.model_validate(json.loads(text)).model_dump(mode="json", exclude_unset=True)
    assert json.dumps(back, sort_keys=True) == json.dumps(tree, sort_keys=True)


def test_the_tree_of_an_identity_is_what_it_was_made_of() -> None:
    """Catches an old checkpoint that seems to belong to another run, for a key it never had."""
    assert RunIdentity.model_validate(IDENTITY).tree() == IDENTITY


def test_signatures_differ_in_what_either_has() -> None:
    one = SignatureFacts.model_validate(SIGNATURE)
    other = SignatureFacts.model_validate({**SIGNATURE, "threads": 4, "later": "x"})
    assert one.differences(one) == [] and sorted(one.differences(other)) == ["later", "threads"]


@pytest.mark.parametrize("value", (0, 2.5, "nan", "inf", "-inf", math.nan))
def test_a_loss_is_a_number_or_one_of_three_words(value: Any) -> None:
    form = TypeAdapter(Loss)
    written = form.dump_python(form.validate_python(value), mode="json")
    assert written == (str(value) if value != value else value)


@pytest.mark.parametrize(
    ("kind", "value"),
    (
        *((Loss, value) for value in (True, "1.5", "NaN", [], None)),
        *((Rate, value) for value in (-1e-9, math.nan, math.inf, "nan", True, None)),
    ),
)
def test_what_is_no_number(kind: Any, value: Any) -> None:
    with pytest.raises(ValidationError, match="must be a number"):
        TypeAdapter(kind).validate_python(value)
