"""Padded lengths of documents, and how each attention kernel stops at their borders."""

from typing import get_args

import torch

from k2train.config.schema import KernelsConfig
from k2train.model.kernels.attention import PLAIN_DOCUMENTS_UP_TO
from k2train.plan import documents
from k2train.plan.documents import method_of, padded_length


def test_padding_is_less_than_an_eighth() -> None:
    """Catches a document that is cut, one that is longer than its row, and many shapes of few
    documents.
    """
    for length in range(1, 5000):
        padded = padded_length(length, 10_000)
        assert length <= padded < length * 9 / 8
        assert padded_length(length, length) == length
        assert padded_length(length, length + 1) in (length, length + 1)
        assert padded_length(padded, 10_000) == padded, "a padded document is padded no further"
    assert all(padded_length(length, 99) == length for length in range(1, 17))
    assert len({padded_length(length, 8192) for length in range(1, 8193)}) <= 8 * 13


def test_every_kernel_has_a_way_or_none() -> None:
    """Catches a name of the config without an answer, and a dense mask where none is needed."""
    names = [*get_args(KernelsConfig.model_fields["attention"].annotation)]
    found = {name: (method_of(name, "cpu"), method_of(name, "cuda")) for name in names}
    assert found == {
        "auto": (None, None),
        "sdpa": ("packed", "masked"),
        "plain": ("packed", "packed"),
        "by_length": ("packed", "packed"),
        "flash": ("packed", "varlen"),
        "cudnn": (None, None),
        "flash_attn_2": (None, "varlen"),
        "flash_attn_3": (None, "varlen"),
        "flash_attn_4": (None, "varlen"),
        "transformer_engine": (None, None),
        "reference": ("masked", "masked"),
    }


def test_limits_of_plain_are_one_fact() -> None:
    """Catches a plan that counts probabilities which a kernel does not keep."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert {
        names[key]: value for key, value in documents.PLAIN_UP_TO.items()
    } == PLAIN_DOCUMENTS_UP_TO
