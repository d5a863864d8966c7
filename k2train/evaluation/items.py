"""Items of an evaluation from the harness's samples: prompt, choices, likelihoods, answer, scores.

- A sample of each filter becomes one item: a metric behind a filter is named `metric,filter`.
- The answer is the choice with the highest log-likelihood, by length where the task's main score
  is `acc_norm`, as the harness divides it.
- Of a metric with a weight (perplexities) an item has the value over itself alone.
"""

import math
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from k2train.evaluation.results import Item


def item_of(task: Any, samples: Sequence[Mapping[str, Any]], shots: tuple[str, ...]) -> Item:
    """Return the item of a document's samples, one for each filter; `task` is the harness's."""
    first = samples[0]
    requests = first["arguments"]
    prompt = _prompt(task, requests)
    facts: dict[str, Any] = {
        "item": str(first["doc_id"]),
        "prompt": prompt,
        "prompt_sha256": sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest(),
        "target": _target(task, first),
        "scores": _scores(task, samples),
    }
    if shots:
        facts["shots"] = list(shots)
    if task.OUTPUT_TYPE == "generate_until":
        facts["generated"] = [str(text) for one in first["resps"] for text in one]
    elif task.OUTPUT_TYPE == "loglikelihood_rolling":
        facts["log_likelihoods"] = [float(one[0]) for one in first["resps"]]
    else:
        facts |= _choices(task, first)
    return Item.parse(facts)


def _prompt(task: Any, requests: Sequence[Sequence[Any]]) -> str:
    """The rendered prompt; that of the first choice, where each has another."""
    return "" if task.OUTPUT_TYPE == "loglikelihood_rolling" else str(requests[0][0])


def _target(task: Any, sample: Mapping[str, Any]) -> str:
    target = sample["target"]
    if task.OUTPUT_TYPE == "multiple_choice" and isinstance(target, int):
        texts = task.doc_to_choice(sample["doc"])
        return str(texts[target]) if 0 <= target < len(texts) else ""
    return str(target)


def _choices(task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Choices with their likelihoods. Requests beyond them measure a choice without its context."""
    requests, answers = sample["arguments"], [one[0] for one in sample["resps"]]
    count = len(requests)
    texts = None
    if task.OUTPUT_TYPE == "multiple_choice":
        texts = [str(text) for text in task.doc_to_choice(sample["doc"])]
        count = min(count, len(texts))
    same_context = len({str(request[0]) for request in requests[:count]}) == 1
    facts: dict[str, Any] = {
        "choices": [str(request[1 if same_context else 0]) for request in requests[:count]],
        "log_likelihoods": [float(answer[0]) for answer in answers[:count]],
        "greedy": [bool(answer[1]) for answer in answers[:count]],
    }
    if texts is not None:
        values = facts["log_likelihoods"]
        if "acc_norm" in sample["metrics"]:
            values = [value / max(1, len(text)) for value, text in zip(values, texts, strict=False)]
        facts["answer"] = values.index(max(values))
    return facts


def _scores(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for sample in samples:
        way = "" if sample["filter"] == "none" else f",{sample['filter']}"
        for metric in sample["metrics"]:
            value = _number(task, metric, sample[metric])
            if value is not None:
                found[f"{metric}{way}"] = value
    return found


def _number(task: Any, metric: str, value: Any) -> float | None:
    """A metric's value for one item; None where it has none by itself."""
    if isinstance(value, tuple):
        combine = task.aggregation().get(metric)
        value = None if combine is None else combine([value])
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
