"""The standard library of the running interpreter as documents: real text that every user already has.

A file of code is one document, a docstring is one, and so is a page of the language reference. A docstring belongs to
the file it stands in, so that the two never part between training and validation. Packages that happen to be installed
were refused: they differ from machine to machine.
"""

import ast
import io
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from k2train.data.prepare.source import Source

# Tests and bundled packages are no part of the library, and distributions differ in which of them they ship.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
TOPICS_FILE = "pydoc_data/topics.py"
MIN_DOCSTRING_CHARACTERS = 80


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
            found.append(Source("stdlib", name.as_posix(), str(path), path.stat().st_size))
    return sorted(found, key=lambda source: source.name)


def topic_sources() -> list[Source]:
    """The pages of the language reference that `help()` shows; each page is a source of its own."""
    return [Source("topics", name, "", len(topic_page(name))) for name in sorted(topics)]


def topic_page(name: str) -> bytes:
    """Content of a page of the reference."""
    return topics[name].encode()


def decode(content: bytes) -> str:
    """Text of a file of code. Raises SyntaxError, UnicodeDecodeError or LookupError: it is not what it declares."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return content.decode(encoding)


def docstrings(name: str, text: str) -> Iterator[tuple[int, str, str]]:
    """(line, title, docstring) of each of at least 80 characters; the title is `file.py:Class.method`.

    Raises what `ast.parse` raises: SyntaxError, ValueError, RecursionError, MemoryError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    seen: dict[str, int] = {}
    for path, node in _definitions(tree):
        found = ast.get_docstring(node)
        if found and len(found) >= MIN_DOCSTRING_CHARACTERS:
            # Redefined names (property setters, platform branches) are told apart by their count.
            seen[path] = seen.get(path, 0) + 1
            yield (
                node.body[0].lineno,
                f"{name}:{path}" + (f"#{seen[path]}" if seen[path] > 1 else ""),
                found,
            )


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Documented]]:
    # A stack of our own: generated code nests deeper than Python recurses.
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            path = f"{path}.{node.name}" if path else node.name
            yield path, node
        elif isinstance(node, ast.Module):
            yield path, node
        stack += [(path, child) for child in reversed(list(ast.iter_child_nodes(node)))]
