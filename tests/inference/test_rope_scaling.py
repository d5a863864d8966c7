"""Generation with stretched positions: catches a scaling that is lost, or read as another one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from k2train.hf.folder import HuggingFaceFolder
from k2train.hf.import_folder import import_folder
from k2train.inference.generate import generate
from k2train.inference.model import LanguageModel
from k2train.inference.options import Limits
from k2train.inference.prompts import Prompt
from k2train.inference.source import Source, architecture_of
from k2train.model.architecture import RopeScaling
from tests.support.hugging_face import LLAMA3, llama, saved

pytest.importorskip("transformers")
VOCAB, CONTEXT, NEW = 61, 48, 24


def test_greedy_is_that_of_transformers(tmp_path: Path) -> None:
    """Catches the section of a config in place of the architecture's own scaling, and positions
    that are not stretched: both a model with scaling and one without, from the same weights.
    """
    answers = {}
    for name, rope in {"llama3": {"rope_type": "llama3", **LLAMA3}, "none": {}}.items():
        parameters = {"rope_type": "default", "rope_theta": 500.0, **rope}
        model = llama(max_position_embeddings=CONTEXT, rope_parameters=parameters)
        path = tmp_path / name / "checkpoints" / "ckpt_000"
        manifest = import_folder(HuggingFaceFolder(saved(tmp_path / f"hf_{name}", model)), path)
        architecture = architecture_of(path, manifest)
        scaling = None if name == "none" else RopeScaling(**LLAMA3)  # type: ignore[arg-type]
        assert architecture.rope_scaling == scaling
        assert hash(architecture) is not None
        # Ids alone: no tokenizer is asked.
        tokenizer: Any = None
        source = Source(path, manifest, architecture, CONTEXT, "fp32", tokenizer)

        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCAB, (20,), generator=generator)
        prompt = Prompt(0, "", tuple(ids.tolist()))
        limits = Limits(NEW, frozenset(), VOCAB)
        (found,) = generate(LanguageModel(source), [prompt], limits)
        model.generation_config.eos_token_id = None
        expected = model.generate(
            ids[None],
            attention_mask=torch.ones(1, 20, dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )[0, 20:].tolist()
        assert found.ids == expected and len(set(expected)) > 3
        answers[name] = found.ids
    assert answers["llama3"] != answers["none"], "the scaling changes what is said"
