"""Corpus, recipe and workspace of the data benches, and one row of their table.

- The text is the standard library of the Python that runs this.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from k2train.data.prepare.encode.vocabulary import obtain_tokenizer
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.recipe import Recipe
from k2train.data.prepare.sources.listing import encode_tasks, list_sources
from k2train.data.prepare.sources.stdlib import stdlib_root
from k2train.data.prepare.workspace import Workspace


@dataclass(frozen=True)
class Figure:
    """One row of the table: subject, baseline, their medians with a unit, and the target if any."""

    what: str
    against: str
    mine: float
    theirs: float
    unit: str
    aim: str = "-"

    @property
    def ratio(self) -> float:
        """Subject over baseline."""
        return self.mine / self.theirs


def library_texts() -> list[str]:
    """Read Python files of the standard library."""
    paths = sorted(stdlib_root().glob("*.py")) + sorted(stdlib_root().glob("*/*.py"))
    texts = (
        path.read_text("utf-8", errors="replace") for path in paths if "packages" not in str(path)
    )
    return [text for text in texts if text][:700]


def write_corpus(path: Path, copies: int) -> int:
    """Write the standard library `copies` times as jsonl; return the file's size in bytes.

    Documents have some 3,000 characters.
    """
    with path.open("w", encoding="utf-8") as stream:
        for copy in range(copies):
            for number, text in enumerate(library_texts()):
                for start in range(0, len(text), 3000):
                    stream.write(
                        json.dumps(
                            {"id": f"{copy}/{number}/{start}", "text": text[start : start + 3000]}
                        )
                        + "\n"
                    )
    return path.stat().st_size


def make_recipe(folder: Path, name: str, copies: int, **changes: object) -> Recipe:
    """Recipe over `copies` of the standard library in one jsonl file; all share one tokenizer."""
    corpus = folder / f"corpus_{copies}"
    corpus.mkdir(exist_ok=True)
    if not (corpus / "part.jsonl").exists():
        write_corpus(corpus / "part.jsonl", copies)

    tree: dict[str, object] = {
        "name": name,
        "output": folder / name,
        "seed": 1,
        "sequence_length": 256,
        "chunks": 2,
        "tokenizer": {
            "model": folder / "tokenizer.model",
            "train": {"vocab_size": 4096, "max_bytes": 2**23},
        },
        "subsets": {
            "code": {
                "kind": "jsonl",
                "paths": [str(corpus / "*.jsonl")],
                "origin": "bench",
                "id_key": "id",
            }
        },
    }
    return Recipe.model_validate(tree | changes)


def workspace_of(recipe: Recipe, folder: Path) -> Workspace:
    """Create a workspace whose sources are listed and cut into tasks."""
    listing = list_sources(recipe)
    tokenizer = obtain_tokenizer(recipe, listing, Progress(None))
    return Workspace.create(
        folder, folder / "out.tmp", recipe, tokenizer, encode_tasks(recipe, listing)
    )
