"""Where documents come from: named readers that list sources, and read a source into documents.

A source is the unit of splitting: two stages and the held-out part never share one, so a docstring lies on the same
side as the file it stands in. Splitting by document was refused, since then the held-out docstring would be trained on
inside its file. The demo's readers draw on the standard library of the running interpreter: real text that every user
already has. A reader for another kind of corpus is one more entry in `READERS`.
"""

import ast
import hashlib
import io
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

# Tests and bundled packages are no part of the library, and distributions differ in which of them they ship.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
TOPICS_FILE = "pydoc_data/topics.py"
SHORTEST_DOCSTRING = 80


@dataclass(frozen=True)
class Source:
    """One file, or one page of a reference. `origin` and `name` together name it in every stage."""

    origin: str
    name: str
    content: bytes

    @property
    def key(self) -> str:
        return f"{self.origin}/{self.name}"

    @property
    def place(self) -> float:
        """A point in [0, 1) that only the name decides, so that shares of any two recipes cut the same line.

        Not keyed by the recipe's seed: two stages with different seeds must still be disjoint.
        """
        digest = hashlib.sha256(b"k2train source place\0" + self.key.encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48


@dataclass(frozen=True)
class Document:
    """A text to be learnt; `name` is unique within its subset."""

    subset: str
    source: str
    name: str
    text: str


@dataclass(frozen=True)
class Reader:
    """How a kind of subset finds its sources, sorted by name, and what it takes from one: (name, text) pairs."""

    origin: str
    sources: Callable[[], list[Source]]
    texts: Callable[[Source], Iterator[tuple[str, str]]]


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_sources(root: Path | None = None) -> list[Source]:
    """Python files of the standard library, without tests, installed packages and what the build generated."""
    root = root or stdlib_root()
    found = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        generated = name.name.startswith("_sysconfigdata") or name.as_posix() == TOPICS_FILE
        # Distributions link in files from outside, as sitecustomize.py: the machine's, not the library's.
        if SKIPPED_FOLDERS.isdisjoint(name.parts[:-1]) and not generated and not path.is_symlink():
            found.append(Source("stdlib", name.as_posix(), path.read_bytes()))
    return sorted(found, key=lambda source: source.name)


def topic_sources() -> list[Source]:
    """The pages of the language reference that `help()` shows; each page is a source of its own."""
    return [Source("topics", name, topics[name].encode()) for name in sorted(topics)]


def code_text(source: Source) -> Iterator[tuple[str, str]]:
    """The whole file; nothing when it is empty or not in the encoding it declares."""
    text = _decode(source.content)
    if text.strip():
        yield source.name, text


def docstring_texts(source: Source) -> Iterator[tuple[str, str]]:
    """Docstrings of at least 80 characters, named `file.py:Class.method`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(_decode(source.content))
        except (SyntaxError, ValueError):
            return
    seen: dict[str, int] = {}
    for path, node in _definitions(tree, ""):
        text = ast.get_docstring(node)
        if text and len(text) >= SHORTEST_DOCSTRING:
            # Redefined names (property setters, platform branches) are told apart by their count.
            seen[path] = seen.get(path, 0) + 1
            yield f"{source.name}:{path}" + (f"#{seen[path]}" if seen[path] > 1 else ""), text


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(tree: ast.Module, path: str) -> Iterator[tuple[str, Documented]]:
    # A stack of our own: generated code nests deeper than Python recurses.
    stack: list[tuple[str, ast.AST]] = [(path, tree)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            path = f"{path}.{node.name}" if path else node.name
            yield path, node
        elif isinstance(node, ast.Module):
            yield path, node
        stack += [(path, child) for child in reversed(list(ast.iter_child_nodes(node)))]


def page_text(source: Source) -> Iterator[tuple[str, str]]:
    """The page as it is."""
    yield source.name, source.content.decode()


def _decode(content: bytes) -> str:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return ""


READERS = {
    "stdlib_code": Reader("stdlib", stdlib_sources, code_text),
    "stdlib_docstrings": Reader("stdlib", stdlib_sources, docstring_texts),
    "stdlib_topics": Reader("topics", topic_sources, page_text),
}
