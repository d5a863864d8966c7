"""EU public summary of training content (Article 53(1)(d), Regulation 2024/1689), as JSON and text.

- Sections and questions follow the template of the European Commission's AI Office, annex to
  C(2025) 5235 of 24 July 2025. Its headings are kept, its questions are shortened.
- Answered is what manifests and ledgers know. Every other question stays open and is listed.
- Whether a source is public, licensed, crawled, of users or synthetic is on no record: the subsets
  of the mixture are named, and their kind stays open.

Alternatives considered:
- "No" where nothing is recorded: a summary that was never checked would read as a statement.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from k2train.proofs.facts import Stage, is_path

TITLE = "Public Summary of Training Content for General-Purpose AI models"
SIZES = (
    (10**9, "less than 1 billion tokens"),
    (10**13, "1 billion to 10 trillion tokens"),
    (None, "more than 10 trillion tokens"),
)
"""The template's ranges for text: first number above the range, and its words."""
OPEN = "open: not on record"


class Question(NamedTuple):
    """A question of the template."""

    key: str
    section: str
    text: str


SECTIONS = {
    "1": "General information",
    "1.1": "Provider identification",
    "1.2": "Model identification",
    "1.3": "Modalities, overall training data size and other characteristics",
    "2": "List of data sources",
    "2.1": "Publicly available datasets",
    "2.2": "Private non-publicly available datasets obtained from third parties",
    "2.2.1": "Datasets commercially licensed by rightsholders or their representatives",
    "2.2.2": "Private datasets obtained from other third parties",
    "2.3": "Data crawled and scraped from online sources",
    "2.4": "User data",
    "2.5": "Synthetic data",
    "2.6": "Other sources of data",
    "3": "Data processing aspects",
    "3.1": "Respect of reservation of rights from text and data mining exception or limitation",
    "3.2": "Removal of illegal content",
    "3.3": "Other information",
}
QUESTIONS = (
    Question("provider", "1.1", "Provider name and contact details"),
    Question("representative", "1.1", "Authorised representative name and contact details"),
    Question("models", "1.2", "Versioned model name(s)"),
    Question("dependencies", "1.2", "Model dependencies"),
    Question("placed_on_market", "1.2", "Date of placement on the Union market"),
    Question("modalities", "1.3", "Modalities"),
    Question("text_size", "1.3", "Training data size, text"),
    Question("text_content", "1.3", "Types of content, text"),
    Question("latest_collection", "1.3", "Latest date of data acquisition or collection"),
    Question("continuous", "1.3", "Continuous training on new data after that date"),
    Question("languages", "1.3", "Linguistic characteristics"),
    Question("other_characteristics", "1.3", "Other relevant characteristics"),
    Question("public_datasets", "2.1", "Publicly available datasets used"),
    Question("public_list", "2.1", "Large publicly available datasets, and the others in general"),
    Question("licensed", "2.2.1", "Commercial licensing agreements with rightsholders"),
    Question("third_parties", "2.2.2", "Private datasets obtained from other third parties"),
    Question("crawlers", "2.3", "Crawlers used by the provider or on its behalf"),
    Question("crawled", "2.3", "Names, purposes, behaviour, period, content and top domains"),
    Question("model_users", "2.4", "Data of user interactions with the model used"),
    Question("service_users", "2.4", "Data of user interactions with other services used"),
    Question("synthetic", "2.5", "Synthetic data created by the provider or on its behalf"),
    Question("other_sources", "2.6", "Other sources of data"),
    Question("recorded_sources", "2.6", "Subsets of the mixture on record, their kind left open"),
    Question("code_of_practice", "3.1", "Signatory of the Code of Practice"),
    Question("reservations", "3.1", "Measures to respect reservations of rights"),
    Question("illegal_content", "3.2", "Measures to avoid or remove illegal content"),
    Question("processing", "3.3", "Other information about data processing"),
)

Json = dict[str, Any]


def content_summary(stages: Sequence[Stage]) -> Json:
    """Return the summary: its questions in the template's order, answers, and what is open."""
    answers = dict(_answers(stages))
    listed = [{**question._asdict(), "answer": answers.get(question.key)} for question in QUESTIONS]
    return {
        "title": TITLE,
        "regulation": "Regulation (EU) 2024/1689, Article 53(1)(d)",
        "template": "C(2025) 5235, annex, 24 July 2025",
        "version": "generated from the record of the training",
        "last_update": datetime.now(UTC).strftime("%d/%m/%y"),
        "questions": listed,
        "open": [f"{one['section']} {one['text']}" for one in listed if one["answer"] is None],
    }


def summary_markdown(summary: Json) -> str:
    """Return a summary as Markdown, section by section. Raises ValueError."""
    try:
        lines = [
            f"# {summary['title']}",
            "",
            f"{summary['regulation']}; template: {summary['template']}.",
            "",
            f"Version: {summary['version']}. Last update: {summary['last_update']}.",
        ]
        for number, title in SECTIONS.items():
            lines += ["", f"{'#' * (2 + number.count('.'))} {number}. {title}", ""]
            for one in summary["questions"]:
                if one["section"] == number:
                    lines.append(f"- **{one['text']}**: {_answer_text(one['answer'])}")
        lines += ["", "## Open", "", "The record of the training does not know:", ""]
        lines += [f"- {line}" for line in summary["open"]]
    except (TypeError, LookupError):
        raise ValueError("is no summary of training content") from None
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _answer_text(answer: Any) -> str:
    if answer is None:
        return f"_{OPEN}_"
    if isinstance(answer, list):
        return "".join(f"\n  - {one}" for one in answer)
    return str(answer)


def _answers(stages: Sequence[Stage]) -> Iterator[tuple[str, Any]]:
    yield "models", [_versions(stage) for stage in stages]
    first, config = stages[0].transition, stages[0].view.config
    if first is None and config is not None and config.run.init_from is None:
        yield "dependencies", "None: the weights began at random values."
    elif first is not None:
        yield "dependencies", f"Weights of an earlier model, after its step {first.parent_step:,}."

    if not all(stage.chunks for stage in stages):
        return
    yield "modalities", "Text."
    tokens = _tokens(stages)
    total = tokens.total()
    words = next(words for end, words in SIZES if end is None or total < end)
    yield "text_size", f"{words} ({total:,} tokens, after processing and before training)"
    yield "text_content", [f"{name}: {count:,} tokens" for name, count in tokens.most_common()]
    recipes = _recipes(stages)
    yield "recorded_sources", [_source(name, recipes) for name in tokens]
    if processing := list(_processing(stages)):
        yield "processing", processing


def _versions(stage: Stage) -> str:
    names = [one.event.checkpoint for one in stage.checkpoints]
    if not names:
        return stage.name
    shown = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
    return f"{stage.name}, {shown}"


def _tokens(stages: Sequence[Stage]) -> Counter[str]:
    """Tokens of the chunks that were read, by subset; older manifests do not divide all."""
    found: Counter[str] = Counter()
    for stage in stages:
        for info in stage.chunks:
            found.update(info.tokens_per_subset)
            rest = info.tokens - sum(info.tokens_per_subset.values())
            if rest > 0:
                found["(not divided by subset)"] += rest
    return found


def _recipes(stages: Sequence[Stage]) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for stage in stages:
        recipe = stage.data.facts.recipe if stage.data else None
        for name, subset in (recipe.subsets if recipe else {}).items():
            found[name] = subset.model_dump()
    return found


def _source(name: str, recipes: dict[str, Json]) -> str:
    recipe = recipes.get(name, {})
    known = [
        f"{words} {value}"
        for key, words in (("origin", "origin:"), ("kind", "read as"))
        if (value := recipe.get(key)) and not is_path(value)
    ]
    return f"{name}: {', '.join(known)}" if known else f"{name}: origin not on record"


def _processing(stages: Sequence[Stage]) -> Iterator[str]:
    for stage in stages:
        account = stage.data.facts.account if stage.data else None
        counts: Counter[str] = Counter()
        for item in (account or {}).values():
            counts.update({k: int(v) for k, v in item.items() if "documents" in k and v})
        if counts:
            shown = ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in sorted(counts.items()))
            yield f"{stage.name}, account of the preparation: {shown}"
