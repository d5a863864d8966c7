"""A tiny run that was trained on chat data, to talk with and to compare with transformers."""

import json
from pathlib import Path
from typing import Any

from k2train.chat.prepare import ChatPreparation, ChatSettings
from k2train.data.prepare.progress import Progress
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, trainer_job
from tests.support.tiny_generation import MODEL_VOCAB, tiny_tokenizer

CHAT_LENGTH = 64
GLOBAL = 4


def chat_data(base: Path, **changes: Any) -> Path:
    """Manifest of chat data about cats, with two epochs of 40 conversations."""
    base.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save(base / "tokenizer.model")
    records = [
        {"inputs": f"the cat {n}" + " ran" * (n % 7), "targets": "a dog" + " sat" * (n % 5)}
        for n in range(40)
    ]
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (base / "chat.jsonl").write_text(lines, encoding="utf-8")
    settings: dict[str, Any] = {
        "inputs": (str(base / "chat.jsonl"),),
        "output": base / "data",
        "tokenizer": base / "tokenizer.model",
        "sequence_length": CHAT_LENGTH,
        "epochs": 2,
        **changes,
    }
    return ChatPreparation(ChatSettings(**settings), Progress(None)).run()[0].path


def chat_tree(manifest: Path, directory: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Config of a run over chat data that learns its masks."""
    return config_tree(
        manifest,
        directory,
        name,
        **{
            "model__vocab_size": MODEL_VOCAB,
            "data__sequence_length": CHAT_LENGTH,
            "data__loss_mask": "use",
            "data__cross_documents": "block",
            "batch__global_sequences": GLOBAL,
            "batch__micro_sequences": 1,
            **changes,
        },
    )


def chat_run(pool: GlooPool, base: Path) -> Path:
    """Directory of a run that learned to answer, on one process."""
    tree = chat_tree(chat_data(base), base / "runs", "talker")
    assert pool.run(1, trainer_job, tree) == [0]
    return base / "runs" / "talker"
