"""A tiny trained run to evaluate, and local tasks of every kind."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from k2train.data.chunk import write_chunk, write_manifest
from k2train.data.tokenizer import Tokenizer
from k2train.launch.environment_defaults import set_harness_environment
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import GLOBAL, STEPS_PER_CHUNK, config_tree, trainer_job
from tests.support.tiny_generation import MODEL_VOCAB, tiny_tokenizer

SEQUENCE = 64
# Before any test imports lm-eval.
set_harness_environment(offline=True)

QUESTIONS = [
    ("the cat sat on the", [" mat", " dog", " cat", " été"], 0),
    ("a dog ran to", [" the cat", " a", " the mat", " dog sat"], 0),
    ("the cat sat", [" on the mat", " the", " on", " ran"], 2),
    ("wer reitet so", [" spät", " cat", " the dog ran to the cat", " s"], 0),
    # Longer than the context: its begin is lost.
    ("the cat sat on the mat " * 12, [" the cat", " a dog", " cat", " ça va"], 1),
    ("ça va,", [" été", " mat", " a", " on the"], 0),
]
TEXTS = ["the cat sat on the mat", "a dog ran to the cat " * 14, "ça va, été", "x"]
BEGINS = ["the cat", "a dog ran", "the cat sat on the mat " * 9, "wer", "ça"]


def scored_run(pool: GlooPool, base: Path) -> Path:
    """Directory of a run with ckpt_000 to ckpt_002, that has read words of the tasks."""
    tokenizer, data = tiny_tokenizer(), base / "data"
    _corpus(data, tokenizer)
    tree = config_tree(
        data / "manifest.json",
        base / "runs",
        "scored",
        model__num_kv_heads=2,
        model__vocab_size=MODEL_VOCAB,
        data__sequence_length=SEQUENCE,
    )
    assert pool.run(1, trainer_job, tree) == [0]
    return base / "runs" / "scored"


def _corpus(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(key=3))
    words = ["the cat sat on the mat", "a dog ran to the cat", "wer reitet so spät", "ça va, été"]
    rows = GLOBAL * STEPS_PER_CHUNK
    infos = []
    for number in range(2):
        text = " ".join(words[n] for n in rng.integers(0, len(words), 3000))
        ids = np.array(tokenizer.encode(text * 2)[: rows * SEQUENCE], np.uint16)
        chunk = ids.reshape(rows, SEQUENCE)
        infos.append(
            write_chunk(
                folder,
                f"chunk_{number:03d}",
                [chunk],
                rows,
                tokenizer.vocab_size,
                {"words": rows * SEQUENCE},
            )
        )
    write_manifest(
        folder,
        tokenizer_sha256=tokenizer.sha256,
        sequence_length=SEQUENCE,
        vocab_size=tokenizer.vocab_size,
        chunks=infos,
        held_out=None,
    )
    tokenizer.save(folder / "tokenizer.model")


def local_tasks(folder: Path) -> Path:
    """Fill a folder with tasks: questions (plain, with drawn and fixed shots), texts, answers."""
    rows = [{"q": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    _lines(folder / "questions.jsonl", rows)
    _lines(folder / "shots.jsonl", rows[:3] + rows[5:])
    _lines(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    _lines(folder / "begins.jsonl", [{"text": text} for text in BEGINS])
    files = {"test": "questions.jsonl", "shots": "shots.jsonl"}
    metrics = [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")]
    choice = {
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{**one, "higher_is_better": True} for one in metrics],
        "metadata": {"version": 1.0},
    }
    _task(folder, "questions", files, choice)
    _task(folder, "drawn", files, {**choice, "fewshot_split": "shots", "num_fewshot": 2})
    first = {"fewshot_config": {"sampler": "first_n"}}
    _task(folder, "fixed", files, {**choice, **first, "fewshot_split": "shots", "num_fewshot": 1})
    texts = {
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metadata": {"version": 2},
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        ],
    }
    _task(folder, "texts", {"test": "texts.jsonl"}, texts)
    answers = {
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "metadata": {"version": 1},
        "generation_kwargs": {"until": [" mat", "ä"], "max_gen_toks": 20, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    _task(folder, "answers", {"test": "begins.jsonl"}, answers)
    return folder


def _lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _task(folder: Path, name: str, files: dict[str, str], rest: Mapping[str, object]) -> None:
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **rest}))
