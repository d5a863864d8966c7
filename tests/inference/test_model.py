"""`inference/model.py`: catches logits that differ from those of transformers."""

import pytest
import torch

from k2train.errors import ConfigError
from k2train.inference.model import LanguageModel, check_layout
from k2train.inference.source import Source
from tests.support.tiny_generation import CONTEXT, peer_of, prompts_of


def test_logits_are_those_of_transformers(source: Source) -> None:
    """Catches a wrong constant of the model: base of the positions, eps of the norms."""
    (prompt,) = prompts_of([CONTEXT])
    tokens = torch.tensor(prompt.ids)
    found = LanguageModel(source).all_logits(tokens)
    with torch.no_grad():
        expected = peer_of(source)(tokens[None]).logits[0]
    assert expected.std() > 0.1
    # fp32 rounding of sums in another order, over four layers.
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "told"), ((3, 1, "num_heads"), (4, 1, "num_kv_heads"), (1, 5, "layers"))
)
def test_a_layout_that_does_not_fit(source: Source, tensor: int, pipeline: int, told: str) -> None:
    """Catches half a head on each rank, and a rank without a layer."""
    with pytest.raises(ConfigError, match=told):
        check_layout(source, tensor, pipeline)
