"""A recipe and its documents to a data folder: read, tokenize, hold out, pack, spread, write, account.

Everything that is chosen is chosen by a key, so the same recipe over the same documents gives the same bytes, and doing
it again finds that out from hashes and does nothing. Modification times were refused as the test of freshness: they
change when nothing does, and do not when a disk loses a block.
"""

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from k2train.data.manifest import Manifest
from k2train.data.prepare.documents import READERS, Document, Source
from k2train.data.prepare.mix import allocate, apportion, spread
from k2train.data.prepare.pack import Packed, pack
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.tokenizer import Tokenizer, train_tokenizer
from k2train.data.prepare.write import (
    ChunkPlan,
    FolderAside,
    damaged,
    existing,
    finish,
    require_pyarrow,
    write_chunk_files,
    write_sources,
)
from k2train.errors import DataError

# Part of the identity of a preparation: raise it when the same recipe would give other bytes.
ROAD = 1
ENCODE_BATCH = 64


@dataclass(frozen=True)
class Corpus:
    """All documents of the recipe's subsets, whatever their shares, each text once; and the sources they are from."""

    documents: dict[str, list[Document]]
    sources: dict[str, Source]
    duplicates: dict[str, int]


@dataclass
class Subset:
    """A subset on its way: encoded documents split into training and held out, then packed."""

    documents: list[Document]
    ids: list[list[int]]
    held_out: Packed | None = None
    training: Packed | None = None
    tokens_per_source: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for document, ids in zip(self.documents, self.ids, strict=True):
            count = self.tokens_per_source.get(document.source, 0)
            self.tokens_per_source[document.source] = count + len(ids) + 1

    @property
    def tokens(self) -> int:
        """All tokens, a `</s>` for each document included."""
        return sum(self.tokens_per_source.values())

    def split(self, held_out: set[str], sequence_length: int, seed: int) -> None:
        parts: dict[bool, list[int]] = {False: [], True: []}
        for i, document in enumerate(self.documents):
            parts[document.source in held_out].append(i)
        packs = [
            pack([self.documents[i] for i in parts[side]], [self.ids[i] for i in parts[side]], sequence_length, seed)
            for side in (False, True)
        ]
        self.training, self.held_out = packs


def prepare(recipe: Recipe, force: bool = False, progress: Progress | None = None) -> tuple[Manifest, bool]:
    """Make the data folder, or find it made: its manifest, and whether it was made now.

    Raises DataError when the folder holds something else (and `force` is not given), or the documents do not suffice.
    """
    require_pyarrow()
    progress = progress or Progress(None)
    before = existing(recipe.output) if not force else None
    if before is not None:
        _refuse_other(before, {"recipe_sha256": recipe.sha256, "road": ROAD})
    sources = {origin: READERS[kind].sources() for origin, kind in _origins(recipe).items()}
    inputs = sources_sha256(sources)
    if before is not None:
        _refuse_other(before, {"inputs_sha256": inputs})
    if before is not None and recipe.tokenizer.model.exists():
        # Before any text is parsed: starting again what is already done should cost a second.
        _refuse_other(before, {"tokenizer_sha256": Tokenizer.load(recipe.tokenizer.model).sha256})
        _refuse_damaged(before)
        return before, False
    corpus = read_corpus(recipe, sources, progress)
    tokenizer = obtain_tokenizer(recipe, corpus, progress)
    if before is not None:
        _refuse_other(before, {"tokenizer_sha256": tokenizer.sha256})
        _refuse_damaged(before)
        return before, False
    return _build(recipe, corpus, tokenizer, inputs, progress), True


def _origins(recipe: Recipe) -> dict[str, str]:
    """A kind of subset for each origin: subsets of one origin list the same sources."""
    return {READERS[subset.kind].origin: subset.kind for subset in recipe.subsets.values()}


def sources_sha256(sources: Mapping[str, Sequence[Source]]) -> str:
    """Identity of the documents: names and contents of all sources."""
    digest = hashlib.sha256()
    for source in sorted((s for listed in sources.values() for s in listed), key=lambda s: s.key):
        digest.update(f"{source.key}\0{hashlib.sha256(source.content).hexdigest()}\n".encode())
    return digest.hexdigest()


def _refuse_damaged(before: Manifest) -> None:
    if broken := damaged(before):
        raise DataError(
            f"{before.folder}: {', '.join(broken)} missing or not as the manifest says; --force prepares it anew"
        )


def _refuse_other(before: Manifest, wanted: Mapping[str, Any]) -> None:
    found = {**before.facts, "tokenizer_sha256": before.tokenizer_sha256}
    words = {
        "recipe_sha256": "another recipe",
        "road": "another version of the preparation",
        "inputs_sha256": f"other documents (Python {before.facts.get('python')})",
        "tokenizer_sha256": "another tokenizer",
    }
    for key, value in wanted.items():
        if found.get(key) != value:
            raise DataError(
                f"{before.folder} was prepared from {words[key]} ({key} {str(found.get(key))[:12]}, now "
                f"{str(value)[:12]}): name another output, or give --force to replace it"
            )


def read_corpus(recipe: Recipe, sources: Mapping[str, Sequence[Source]], progress: Progress) -> Corpus:
    """Take the documents of every source; a text that was already seen in its subset is counted and left out.

    Duplicates go by the order of names over all sources, not over the share: otherwise one text, standing in two files,
    could be trained on in both stages, or be held out and trained on.
    """
    corpus = Corpus({}, {source.key: source for listed in sources.values() for source in listed}, {})
    for name, subset in recipe.subsets.items():
        reader = READERS[subset.kind]
        documents: dict[bytes, Document] = {}
        count = 0
        for source in progress.over(f"read {name}", sources[reader.origin], unit="sources"):
            for title, text in reader.texts(source):
                count += 1
                digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
                documents.setdefault(digest, Document(name, source.key, title, text))
        corpus.documents[name] = list(documents.values())
        corpus.duplicates[name] = count - len(documents)
    return corpus


def obtain_tokenizer(recipe: Recipe, corpus: Corpus, progress: Progress) -> Tokenizer:
    """Load the recipe's tokenizer, or train it on the whole corpus when its file is absent and the recipe says how."""
    path, train = recipe.tokenizer.model, recipe.tokenizer.train
    if not path.exists() and train is not None:
        progress.say(f"train tokenizer: {train.vocab_size} pieces, to {path}")
        # By kind, not by the recipe's order, so that every recipe over this corpus trains the same model.
        names = sorted(recipe.subsets, key=lambda name: (recipe.subsets[name].kind, name))
        texts = (document.text for name in names for document in corpus.documents[name])
        train_tokenizer(texts, train.vocab_size).save(path)
    tokenizer = Tokenizer.load(path)
    if train is not None and tokenizer.base_size != train.vocab_size:
        raise DataError(
            f"tokenizer.train.vocab_size ({train.vocab_size}) is not that of {path} ({tokenizer.base_size}): "
            f"set it so, or name another tokenizer.model"
        )
    return tokenizer


def _encode(recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, progress: Progress) -> dict[str, Subset]:
    threads = min(4, os.cpu_count() or 1)
    subsets = {}
    for name, subset in recipe.subsets.items():
        low, high = subset.share
        inside = {key for key, source in corpus.sources.items() if low <= source.place < high}
        documents = [document for document in corpus.documents[name] if document.source in inside]
        ids: list[list[int]] = []
        batches = range(0, len(documents), ENCODE_BATCH)
        for start in progress.over(f"encode {name}", batches, unit="batches"):
            texts = [document.text for document in documents[start : start + ENCODE_BATCH]]
            ids += tokenizer.encode_all(texts, threads)
        subsets[name] = Subset(documents, ids)
    return subsets


def _choose_held_out(recipe: Recipe, corpus: Corpus, subsets: Mapping[str, Subset]) -> tuple[dict[str, int], set[str]]:
    """Held-out rows of each subset, in proportion to its part in the whole, and the sources they need.

    Sources are taken from the far end of the share until each subset has enough; they come whole.
    """
    if recipe.held_out is None:
        return dict.fromkeys(subsets, 0), set()
    rows, length = recipe.held_out.rows, recipe.sequence_length
    available = _limited(recipe, {name: subset.tokens // length for name, subset in subsets.items()})
    rows_wanted = rows + recipe.chunks * recipe.rows_per_chunk if recipe.rows_per_chunk else None
    taken = allocate(available, rows_wanted, _fill(recipe))
    quota = apportion(rows, taken)
    chosen: set[str] = set()
    for name, subset in subsets.items():
        by_place = sorted(subset.tokens_per_source, key=lambda key: (corpus.sources[key].place, key), reverse=True)
        found = 0
        for key in by_place:
            # Sources chosen for another subset of the same files count: they are held out from this one too.
            if found < quota[name] * length or key in chosen:
                chosen.add(key)
                found += subset.tokens_per_source[key]
        if found < quota[name] * length:
            raise DataError(f"subset {name} has too little for {quota[name]} held-out rows of {length}: lower held_out")
    return quota, chosen


def _limited(recipe: Recipe, samples: Mapping[str, int]) -> dict[str, int]:
    limits = {name: subset.limit_tokens for name, subset in recipe.subsets.items()}
    length = recipe.sequence_length
    return {n: count if (most := limits[n]) is None else min(count, most // length) for n, count in samples.items()}


def _fill(recipe: Recipe) -> str | None:
    return next((name for name, subset in recipe.subsets.items() if subset.fill), None)


def _build(recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, inputs: str, progress: Progress) -> Manifest:
    subsets = _encode(recipe, corpus, tokenizer, progress)
    held_rows, held_sources = _choose_held_out(recipe, corpus, subsets)
    for subset in subsets.values():
        subset.split(held_sources, recipe.sequence_length, recipe.seed)
    training = {name: _packed(subset.training) for name, subset in subsets.items()}
    available = _limited(recipe, {name: part.samples for name, part in training.items()})
    wanted = recipe.chunks * recipe.rows_per_chunk if recipe.rows_per_chunk else None
    counts = allocate(available, wanted, _fill(recipe))
    width = max(3, len(str(recipe.chunks - 1)))
    plans = [ChunkPlan(f"chunk_{i:0{width}d}", part) for i, part in enumerate(spread(counts, recipe.chunks))]
    vocab = tokenizer.vocab_size
    with FolderAside(recipe.output) as folder:
        chunks = [
            write_chunk_files(folder, plan, training, recipe.seed, vocab)
            for plan in progress.over("write", plans, unit="chunks")
        ]
        held_out = None
        if recipe.held_out is not None:
            parts = {name: _packed(subset.held_out) for name, subset in subsets.items()}
            plan = ChunkPlan("held_out", {name: range(rows) for name, rows in held_rows.items()})
            held_out = write_chunk_files(folder, plan, parts, recipe.seed, vocab)
        used = {
            "training": {d.source for name, part in training.items() for d in part.used(counts[name])},
            "held_out": held_sources,
        }
        facts = {
            "name": recipe.name,
            "recipe_sha256": recipe.sha256,
            "inputs_sha256": inputs,
            "sources_sha256": write_sources(folder, used),
            "road": ROAD,
            "python": platform.python_version(),
            "seed": recipe.seed,
            "dropped_tail_tokens": {name: part.tail_tokens for name, part in training.items()},
            "account": _account(recipe, corpus, subsets, counts, held_rows),
        }
        finish(
            folder,
            chunks,
            held_out,
            tokenizer_sha256=tokenizer.sha256,
            sequence_length=recipe.sequence_length,
            vocab_size=vocab,
            facts=facts,
        )
    result = existing(recipe.output)
    assert result is not None, "the folder just renamed has a manifest"
    return result


def _packed(part: Packed | None) -> Packed:
    assert part is not None, "subsets are split before they are used"
    return part


def _account(
    recipe: Recipe,
    corpus: Corpus,
    subsets: Mapping[str, Subset],
    counts: Mapping[str, int],
    held_rows: Mapping[str, int],
) -> dict[str, dict[str, int]]:
    """Where every token of a subset went: `tokens` = used + unused + tail + held out (used and unused)."""
    account = {}
    for name, subset in subsets.items():
        training, held_out = _packed(subset.training), _packed(subset.held_out)
        length = recipe.sequence_length
        account[name] = {
            "documents": len(subset.documents),
            "duplicates_in_all_shares": corpus.duplicates[name],
            "tokens": subset.tokens,
            "used_samples": counts[name],
            "used_tokens": counts[name] * length,
            "unused_tokens": (training.samples - counts[name]) * length,
            "tail_tokens": training.tail_tokens,
            "held_out_tokens": held_rows[name] * length,
            "held_out_unused_tokens": len(held_out.tokens) - held_rows[name] * length,
        }
    return account


def account_table(manifest: Manifest) -> list[str]:
    """The account as lines of text."""
    account: dict[str, dict[str, int]] = manifest.facts["account"]
    per_chunk = {
        name: [info.tokens_per_subset.get(name, 0) // manifest.sequence_length for info in manifest.chunks]
        for name in account
    }
    heads = ("subset", "documents", "tokens", "samples", "a chunk", "held out", "unused tokens", "tail tokens")
    rows: list[Sequence[str]] = [heads]
    for name, item in account.items():
        low, high = min(per_chunk[name]), max(per_chunk[name])
        unused = item["unused_tokens"] + item["held_out_unused_tokens"]
        numbers = (item["documents"], item["tokens"], item["used_samples"])
        held = item["held_out_tokens"] // manifest.sequence_length
        each = f"{low}" if low == high else f"{low}-{high}"
        rows.append([name, *(f"{n:,}" for n in numbers), each, f"{held:,}", f"{unused:,}", f"{item['tail_tokens']:,}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
