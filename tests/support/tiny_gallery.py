"""Hand-made answers and evaluation results of checkpoints, without a model."""

from collections.abc import Callable, Sequence
from pathlib import Path

from k2train.evaluation.results import Item, TaskResult, write_result
from k2train.gallery.answers import AnswerRecord, Asked, Settings, append_answers, write_asked

SETTINGS = Settings(max_tokens=40)
STEPS = 10
"""Between two checkpoints."""


def name_of(number: int) -> str:
    return f"ckpt_{number:03d}"


def answer(
    number: int,
    index: int,
    prompt: str,
    text: str,
    settings: Settings = SETTINGS,
    manifest: str = "",
) -> AnswerRecord:
    return AnswerRecord(
        manifest_sha256=manifest or f"m{number}",
        step=STEPS * number,
        index=index,
        prompt=prompt,
        settings=settings,
        text=text,
        tokens=len(text.split()),
        finish="max_tokens" if len(text) % 2 else "end",
    )


def make_answers(
    run: Path, checkpoints: int, prompts: Sequence[str], say: Callable[[int, int], str]
) -> Asked:
    """Answers `say(checkpoint, prompt)` of checkpoints that the run no longer has."""
    asked = Asked(prompts=tuple(prompts), settings=SETTINGS)
    write_asked(run, asked)
    for number in range(checkpoints):
        records = [answer(number, n, p, say(number, n)) for n, p in enumerate(prompts)]
        append_answers(run, name_of(number), records)
    return asked


def choice_item(number: int, right: int, likelihoods: Sequence[float], **more: object) -> Item:
    """An item of as many choices as there are log-likelihoods."""
    answer = max(range(len(likelihoods)), key=list(likelihoods).__getitem__)
    facts = {
        "item": f"item_{number}",
        "prompt_sha256": "p",
        "prompt": f"Question {number}: which one is it?\nAnswer:",
        "target": f" choice {right}",
        "choices": tuple(f" choice {n}" for n in range(len(likelihoods))),
        "log_likelihoods": tuple(likelihoods),
        "greedy": (False,) * len(likelihoods),
        "answer": answer,
        "scores": {"acc": float(answer == right)},
    }
    return Item(**{**facts, **more})


def said_item(number: int, texts: Sequence[str], right: float) -> Item:
    """An item that is answered by generated text."""
    return Item(
        item=f"sum_{number}",
        prompt_sha256="p",
        prompt=f"{number} + {number} =",
        target=str(2 * number),
        generated=tuple(texts),
        scores={"exact_match": right},
    )


def make_result(
    run: Path, task: str, number: int, items: Sequence[Item], manifest: str = ""
) -> None:
    """A result of checkpoint `number`; its scores are the means of those of the items."""
    names = items[0].scores
    means = {name: sum(one.scores[name] for one in items) / len(items) for name in names}
    result = TaskResult(
        format=1,
        task=task,
        version="1.0",
        style="default",
        checkpoint=name_of(number),
        step=STEPS * number,
        manifest_sha256=manifest or f"m{number}",
        harness="lm-eval 0.4.13",
        num_shots=5,
        items=0,
        items_sha256="-",
        scores=means,
    )
    write_result(run, result, items)
