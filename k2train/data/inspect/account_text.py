"""Account tables: tokens by subset, documents by subset, and samples per chunk, as text.

- Every heading with a meaning of its own is explained in a line below its table.

Alternatives considered:
- A page of documentation: the numbers are read where it is not at hand.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from k2train.text import UNKNOWN, brief, cells, clean, counted, number, percent, table

Facts = dict[str, Any]

_TOKENS = ["subset", "one pass", "repeat", "asked", "made", "difference", "", "of all"]
_TOKENS += ["tail", "held out"]
_ALWAYS = ("read", "used")
_LEGEND = {
    "one pass": "tokens of the used documents, each document once",
    "asked": "one pass times repeat, as far as limit_tokens and rows_per_chunk let it",
    "made": "tokens in the chunks, counted there",
    "difference": "made less asked: the tail, and what rounding to whole samples leaves",
    "tail": "tokens at the end of a subset that fill no sample, and are left out",
    "read": "documents of the subset's files: used, held out, or not used for one of the reasons "
    "beside it",
    "used": "what the chunks are made of, as far as limit_tokens and rows_per_chunk let it",
    "not chosen": "outside the interval `documents` of the recipe",
    "empty": "without any text",
    "filtered": "another value of a field than `where` of the recipe wants",
    "short": "below min_characters",
    "duplicates": "texts that were there before, in this subset or one above it",
    "held out copies": "texts to train on that are held out, here or in another subset: not used",
    "seen": "texts of the data that `seen` of the recipe names: not used",
    "rejected": "broken, not among those read; rejected.jsonl lists them",
    "shared ids": "documents with the id of an earlier one of their file, as far as seen; used "
    "like all others",
    "apart": "most less least: 1 at the most when all chunks are alike",
}


def account_lines(facts: Facts, every_chunk: bool) -> Iterator[str]:
    """Render the account; with `every_chunk` also a line per chunk."""
    yield (
        f"{facts['manifest']}: {counted(facts['num_chunks'], 'chunk')}, "
        f"{counted(facts['rows'], 'row')} of {facts['sequence_length']:,} = {facts['tokens']:,} "
        "tokens"
    )

    about = [f"recipe {clean(facts['name'])}"] if facts["name"] else []
    about += [f"seed {facts['seed']}"] if facts["seed"] is not None else []
    about += [
        f"vocabulary {facts['vocab_size']:,} ({facts['dtype']})",
        f"tokenizer {brief(facts['tokenizer_sha256'])}",
    ]
    about.append(f"sha256 {facts['manifest_sha256'][:12]}")
    about += [f"content {facts['content_sha256'][:12]}"] if facts["content_sha256"] else []
    yield "; ".join(about)

    if (targets := facts.get("targets")) is not None:
        yield (
            f"loss masks: {counted(targets, 'target')}, {percent(targets, facts['tokens'])} of the "
            "tokens are learned"
        )

    if held := facts["held_out"]:
        yield f"held out: {counted(held['rows'], 'row')}, {held['tokens']:,} tokens"

    yield from _titled("tokens", _TOKENS, _token_rows(facts))
    documents = _document_rows(facts["subsets"])
    # Imported data has no counts of documents.
    if documents[1]:
        yield from _titled("documents", *documents)
    yield from _titled("samples in a chunk", *_evenness(facts))

    if every_chunk:
        names = [item["subset"] for item in facts["subsets"]]
        keys = ["chunk", "rows", *(["targets"] if "targets" in facts else [])]
        rows = [[*cells(item, *keys), *cells(item["samples"], *names)] for item in facts["chunks"]]
        yield from ("", *table([*keys, *map(clean, names)], rows))


def _titled(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table with its title, and the meaning of the headings that are shown."""
    lines = table(heads, rows)
    yield from ("", title, *lines)
    explained = [head for head in heads if head in _LEGEND and head in lines[0]]
    if explained:
        width = max(map(len, explained))
        yield ""
        yield from (f"  {head.ljust(width)}  {_LEGEND[head]}" for head in explained)


def _token_rows(facts: Facts) -> list[list[str]]:
    subsets = facts["subsets"]
    # The sum of a column is unknown when any of its cells is.
    keys = ("one_pass", "asked", "made", "difference", "tail", "held_out")
    columns = {f"{key}_tokens": [item[f"{key}_tokens"] for item in subsets] for key in keys}
    total = {key: None if None in column else sum(column) for key, column in columns.items()}

    rows = []
    for item in [*subsets, {"subset": "all", "repeat": "", **total}]:
        repeat, asked, difference = item["repeat"], item["asked_tokens"], item["difference_tokens"]
        # A difference below 0.005 % of the request would print as zero.
        large = asked and abs(difference) * 20000 >= asked
        rows.append(
            [
                *cells(item, "subset", "one_pass_tokens"),
                f"{repeat:g}" if isinstance(repeat, int | float) else clean(repeat),
                *cells(item, "asked_tokens", "made_tokens"),
                UNKNOWN if difference is None else f"{difference:+,}",
                f"{100 * difference / asked:+.2f}%" if large else "",
                percent(item["made_tokens"], facts["tokens"]),
                *cells(item, "tail_tokens", "held_out_tokens"),
            ]
        )
    return rows


def _document_rows(subsets: Sequence[Facts]) -> tuple[list[str], list[list[str]]]:
    """Documents per subset, without a sum: subsets may read the same documents."""
    known = [item for item in subsets if item["documents"]["read"] is not None]
    kinds = [
        kind
        for kind in (known[0]["documents"] if known else ())
        if kind in _ALWAYS or any(item["documents"][kind] for item in known)
    ]
    rows = [[clean(item["subset"]), *cells(item["documents"], *kinds)] for item in known]
    heads = ["outside share" if kind == "outside" else kind.replace("_", " ") for kind in kinds]
    return ["subset", *heads], rows


def _evenness(facts: Facts) -> tuple[list[str], list[list[str]]]:
    rows = [
        (clean(item["subset"]), item["samples"], item["least_in_a_chunk"], item["most_in_a_chunk"])
        for item in facts["subsets"]
    ]
    # Without the held-out chunk, which comes last.
    sizes = [item["rows"] for item in facts["chunks"][: facts["num_chunks"]]]
    rows.append(("all", sum(sizes), min(sizes), max(sizes)))
    return ["subset", "in all", "least", "most", "apart"], [
        [name, *map(number, (total, low, high, high - low))] for name, total, low, high in rows
    ]
