"""Generation from folders of transformers, imported: the tokens that their own model says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from k2train.hf.folder import HuggingFaceFolder
from k2train.hf.import_folder import import_folder
from k2train.hf.tokenizer_files import write_tokenizer
from k2train.inference.generate import generate
from k2train.inference.model import LanguageModel
from k2train.inference.options import Limits
from k2train.inference.source import Source
from tests.support.hugging_face import LLAMA3, llama, saved
from tests.support.tiny_generation import prompts_of, tiny_tokenizer

pytest.importorskip("transformers")
MODELS: dict[str, dict[str, Any]] = {
    "grouped heads, positions of llama 3": {
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3},
    },
    "one key head, another epsilon": {"num_key_value_heads": 1, "rms_norm_eps": 0.1},
    "a tied head": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_that_of_the_folder(name: str, tmp_path: Path) -> None:
    """Catches positions, heads or a head that generation reads otherwise than training does, and
    prompts of unequal length that see each other's padding, up to the last position.
    """
    tokenizer = tiny_tokenizer()
    peer = llama(vocab_size=tokenizer.vocab_size + 5, **MODELS[name])
    saved(tmp_path / "hf", peer)
    write_tokenizer(tmp_path / "hf", tokenizer, 32)
    path = tmp_path / "run" / "checkpoints" / "ckpt_000"
    import_folder(HuggingFaceFolder(tmp_path / "hf"), path)

    source = Source.find(tmp_path / "run")
    assert source.tokenizer.sha256 == tokenizer.sha256 and source.context_tokens == 32
    prompts = prompts_of([3, 30, 1, 17], tokenizer.vocab_size)
    limits = Limits(100, frozenset(), tokenizer.vocab_size)
    found = generate(LanguageModel(source), prompts, limits)
    spare = list(range(tokenizer.vocab_size, tokenizer.vocab_size + 5))
    for prompt, answer in zip(prompts, found, strict=True):
        given = torch.tensor([prompt.ids])
        said = peer.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_length=32,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=spare,
        )
        assert answer.ids == said[0, given.shape[1] :].tolist()
        assert (answer.finish, len(answer.ids)) == ("context", 32 - len(prompt.ids))
