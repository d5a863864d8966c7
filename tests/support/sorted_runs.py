"""A small corpus as sorted runs, and the expected chunks computed in a slow and simple way.

The division into tasks and runs is a parameter.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from k2train.data.document_keys import document_key64
from k2train.data.manifest import chunk_dtype
from k2train.data.prepare.allocate.mixture import keyed_permutation
from k2train.data.prepare.encode.run_writer import RunWriter
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.source import (
    Source,
    first_position,
    split_position,
    text_hash,
    text_position,
)
from k2train.data.prepare.workspace import HELD_OUT, EncodeTask, Workspace, read_json, write_json
from k2train.data.tokenizer import Tokenizer

VOCAB = 300
EOS = 2


@dataclass(frozen=True)
class Text:
    """A document; its tokens, `</s>` at the end, are decided by `content`."""

    origin: str
    file: str
    ordinal: int
    length: int
    content: int
    fim: int = 0

    @property
    def source(self) -> str:
        return f"{self.origin}/{self.file}"

    @property
    def name(self) -> str:
        return f"d{self.ordinal}é"

    @property
    def position(self) -> int:
        return split_position(self.source)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(str((self.content, self.length)).encode()).digest()

    @property
    def tokens(self) -> list[int]:
        words = np.random.Philox(key=self.content).random_raw(self.length - 1)
        return [*(3 + words % (VOCAB - 3)).tolist(), EOS]

    @property
    def text(self) -> int:
        return text_hash(self.digest)


def recipe_of(tmp_path: Path, subsets: Mapping[str, Mapping[str, Any]], **keys: Any) -> Recipe:
    content = {
        "name": "small",
        "output": tmp_path / "out",
        "seed": 5,
        "sequence_length": 8,
        "chunks": 2,
        "tokenizer": {"model": tmp_path / "t.model"},
        "subsets": {
            name: {
                "kind": "jsonl",
                "split_by": "source",
                "origin": name,
                "paths": [f"{name}/*"],
                **subset,
            }
            for name, subset in subsets.items()
        },
    }

    return Recipe.model_validate(content | keys)


def workspace_of(
    tmp_path: Path,
    recipe: Recipe,
    texts: Mapping[str, Sequence[Text]],
    tasks: int = 1,
    capacity: int = 10**6,
    vocab: int = VOCAB,
) -> Workspace:
    """A work folder as the encode tasks leave it.

    The sources of each subset are spread over `tasks` tasks; a run holds `capacity` tokens.
    """
    named = SimpleNamespace(files={"tokenizer.model": b"none"}, vocab_size=vocab)
    tokenizer = cast(Tokenizer, named)
    groups: list[tuple[EncodeTask, list[Text]]] = []
    for name in recipe.subsets:
        for number in range(tasks):
            files = sorted({text.file for text in texts[name]})[number::tasks]
            sources = tuple(Source(recipe.origin_of(name), file) for file in files)
            inside = sorted(
                (t for t in texts[name] if t.file in files), key=lambda t: (t.file, t.ordinal)
            )
            groups.append((EncodeTask((name,), sources), inside))

    workspace = Workspace.create(
        tmp_path / "out.work", tmp_path / "out.tmp", recipe, tokenizer, [task for task, _ in groups]
    )
    workspace.__dict__["tokenizer"] = tokenizer
    for number, (task, inside) in enumerate(groups):
        write_runs(workspace, number, task.subsets[0], inside, capacity, vocab)

    return workspace


def write_runs(
    workspace: Workspace,
    number: int,
    name: str,
    texts: Iterable[Text],
    capacity: int,
    vocab: int = VOCAB,
) -> None:
    subset = workspace.recipe.subsets[name]
    folder = workspace.run_folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    seed = workspace.recipe.seed

    writer = RunWriter(folder / "000", name, subset.passes, seed, chunk_dtype(vocab), capacity)
    counts = dict.fromkeys(
        ("documents_read", "rejected", "documents", "outside", "short", "not_chosen"), 0
    )
    for text in texts:
        counts["documents_read"] += 1
        outside = not is_inside(workspace.recipe, name, text)
        counts["outside" if outside else "documents"] += 1
        if outside and not subset.drop_duplicates:
            continue
        ids = [] if outside else [np.array(text.tokens, dtype=np.uint32)]
        place = place_of(workspace.recipe, name, text)
        writer.add(text.source, text.ordinal, text.name.encode(), ids, place, text.text, text.fim)

    writer.flush()
    for run in (run for runs in writer.runs for run in runs):
        run["path"] = (folder / run["path"]).relative_to(workspace.folder).as_posix()
    write_json(
        workspace.encode_record(number), {"subsets": {name: {**counts, "passes": writer.runs}}}
    )


def place_of(recipe: Recipe, name: str, text: Text) -> int:
    by_text = recipe.subsets[name].split_by == "text"
    return text_position(text.digest) if by_text else text.position


def is_inside(recipe: Recipe, name: str, text: Text) -> bool:
    low, high = recipe.subsets[name].share
    return first_position(low) <= place_of(recipe, name, text) < first_position(high)


@dataclass(frozen=True)
class Expected:
    """Expected chunk: `rows` `[n, s]`, provenance lines, boundaries, and the sources it used."""

    rows: list[list[int]]
    pieces: list[dict[str, Any]]
    boundaries: list[int]
    sources: set[str]


def kept_texts(recipe: Recipe, name: str, texts: Mapping[str, Sequence[Text]]) -> list[Text]:
    """Texts in the share, each once over all subsets that drop duplicates.

    The first is that of the subset named first, there by source and ordinal.
    """
    drops = [name for name, subset in recipe.subsets.items() if subset.drop_duplicates]
    rank = {t.source: i for i in reversed(range(len(drops))) for t in texts[drops[i]]}
    ordered = sorted(
        (t for other in drops for t in texts[other]),
        key=lambda t: (rank[t.source], t.source, t.ordinal),
    )
    first: dict[int, tuple[str, int]] = {}
    for text in ordered:
        first.setdefault(text.text, (text.source, text.ordinal))
    return [
        text
        for text in sorted(texts[name], key=lambda t: (t.source, t.ordinal))
        if is_inside(recipe, name, text)
        and (name not in drops or first[text.text] == (text.source, text.ordinal))
    ]


def texts_on_side(
    recipe: Recipe,
    name: str,
    texts: Mapping[str, Sequence[Text]],
    boundaries: Mapping[str, int],
    held_out: bool,
) -> list[Text]:
    """Texts that are held out, or trained on: those that no subset holds out."""
    held = {
        other: [
            text
            for text in kept_texts(recipe, other, texts)
            if place_of(recipe, other, text) >= boundaries[other]
        ]
        for other in recipe.subsets
    }
    if held_out:
        return held[name]
    known = {text.text for found in held.values() for text in found}
    return [text for text in kept_texts(recipe, name, texts) if text.text not in known]


def stream_of(
    recipe: Recipe, name: str, texts: Iterable[Text], passes: int
) -> list[tuple[int, Text, int, int]]:
    """Each token of the subset's stream as (pass, document, offset, id)."""
    stream = []
    for number in range(passes):
        keyed = sorted(
            texts,
            key=lambda t: (
                document_key64(recipe.seed, name, number, t.source, t.name),
                t.source,
                t.ordinal,
            ),
        )
        for text in keyed:
            stream += [(number, text, offset, token) for offset, token in enumerate(text.tokens)]

    return stream


def expected_chunk(
    workspace: Workspace, texts: Mapping[str, Sequence[Text]], chunk: str
) -> Expected:
    """Expected rows: all documents sorted, concatenated, and cut at the plan's sample ranges."""
    recipe, plan = workspace.recipe, read_json(workspace.folder / "plan" / "plan.json")
    length = recipe.sequence_length
    samples: list[tuple[str, list[tuple[int, Text, int, int]]]] = []

    for name, subset in recipe.subsets.items():
        side = texts_on_side(recipe, name, texts, plan["held_out_places"], chunk == HELD_OUT)
        stream = stream_of(recipe, name, side, 1 if chunk == HELD_OUT else subset.passes)
        samples += [
            (name, stream[k * length : (k + 1) * length])
            for ranges in plan["chunks"][chunk][name]
            for k in range(*ranges)
        ]

    order = keyed_permutation(len(samples), recipe.seed, f"rows of {chunk}").tolist()
    expected = Expected([], [], [], set())
    for row, position in enumerate(order):
        name, tokens = samples[position]
        assert len(tokens) == length
        expected.rows.append([token for *_, token in tokens])

        before: tuple[int, Text] | None = None
        for start, (number, text, offset, _) in enumerate(tokens):
            expected.sources.add(text.source)
            if (number, text) == before:
                expected.pieces[-1]["length"] += 1
                continue

            before = (number, text)
            if start:
                expected.boundaries.append(row * length + start)
            facts = {"row": row, "start": start, "length": 1, "subset": name, "source": text.source}
            facts |= {
                "document": text.name,
                "offset": offset,
                "fim": ("none", "psm", "spm")[text.fim],
            }
            expected.pieces.append(facts | {"repeat": number})

    return expected
