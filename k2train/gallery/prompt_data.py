"""Data files of the prompt gallery: an index of who answered alike, and a file for each prompt.

- The index has the prompts, and of each checkpoint which of a prompt's distinct answers it gave.
  So a page knows what differs between any two checkpoints before it has loaded a text.
- Later checkpoints often answer as the one before: a text is kept once.

Alternatives considered:
- A file for each checkpoint: the page of one prompt would load them all.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k2train.gallery.answers import Asked, CheckpointAnswers
from k2train.gallery.verbatim import Facts

Spans = Mapping[str, Sequence[Facts]]
NO_ANSWER = -1


def answer_texts(answers: Sequence[CheckpointAnswers]) -> Iterator[str]:
    """Yield every generated text, for the search in the training data."""
    for checkpoint in answers:
        yield from (one.text for one in checkpoint.answers if one is not None)


def prompt_files(
    asked: Asked, answers: Sequence[CheckpointAnswers], spans: Spans | None
) -> Iterator[tuple[str, Any]]:
    """Yield name and content of each file; `spans` None where the data have no index.

    `prompts` is the index: `answers[p][c]` is the number of a text in the file of prompt p, or -1.
    """
    index: list[list[int]] = []
    for number, _ in enumerate(asked.prompts):
        numbers: dict[tuple[str, str], int] = {}
        texts: list[Facts] = []
        row = []
        for checkpoint in answers:
            record = checkpoint.answers[number]
            if record is None:
                row.append(NO_ANSWER)
                continue
            key = (record.text, record.finish)
            if key not in numbers:
                facts = {"text": record.text, "finish": record.finish, "tokens": record.tokens}
                texts.append(with_spans(facts, record.text, spans))
            row.append(numbers.setdefault(key, len(numbers)))
        index.append(row)
        yield f"prompt_{number + 1:04d}", {"texts": texts}

    settings = asked.settings
    yield (
        "prompts",
        {
            "prompts": asked.prompts,
            "answers": index,
            "checkpoints": [
                {"name": one.name, "step": one.step, "manifest": one.manifest_sha256}
                for one in answers
            ],
            "how": how_text(settings.model_dump()),
        },
    )


def with_spans(facts: Facts, text: str, spans: Spans | None) -> Facts:
    """Add the spans of a text; without an index, or for no Unicode, nothing is known of it."""
    found = None if spans is None else spans.get(text)
    return facts if found is None else {**facts, "spans": found}


def how_text(settings: Mapping[str, Any]) -> str:
    """Say in words how tokens were chosen."""
    if not settings["temperature"]:
        how = "greedy"
    else:
        how = f"temperature {settings['temperature']:g}"
        how += f", top-k {settings['top_k']}" if settings["top_k"] else ""
        how += f", top-p {settings['top_p']:g}" if settings["top_p"] < 1 else ""
        how += f", seed {settings['seed']}"
    weights = ", fp32 master weights" if settings["fp32"] else ""
    return f"{how}, at most {settings['max_tokens']} tokens{weights}"
