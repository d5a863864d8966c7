"""The Python standard library as documents: real text that every user already has.

- A code file, a docstring, and a page of the language reference are one document each.
- A docstring belongs to its file, so that training and validation never separate the two.
- Alternatives considered: installed packages; they differ from machine to machine.
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

# Distributions differ in which tests and bundled packages they ship.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
TOPICS_FILE = "pydoc_data/topics.py"
MIN_DOCSTRING_CHARACTERS = 80


def stdlib_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_sources(root: Path | None = None) -> list[Source]:
    """List the Python files of the standard library.

    Leaves out tests, installed packages, and files that the build generated.
    """
    root = root or stdlib_root()
    found = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        generated = name.name.startswith("_sysconfigdata") or name.as_posix() == TOPICS_FILE
        # Links lead to files of the distribution, such as sitecustomize.py, not of the library.
        if SKIPPED_FOLDERS.isdisjoint(name.parts[:-1]) and not generated and not path.is_symlink():
            found.append(Source("stdlib", name.as_posix(), str(path), path.stat().st_size))
    return sorted(found, key=lambda source: source.name)


def topic_sources() -> list[Source]:
    """List the pages of the language reference that `help()` shows, each a source of its own."""
    return [Source("topics", name, "", len(topic_page(name))) for name in sorted(topics)]


def topic_page(name: str) -> bytes:
    """Content of a page of the language reference."""
    return topics[name].encode()


def decode(content: bytes) -> str:
    """Decode a code file by its declared encoding.

    Raises SyntaxError, UnicodeDecodeError or LookupError when it is not in that encoding.
    """
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return content.decode(encoding)


def docstrings(name: str, text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, title, docstring) of each docstring of at least 80 characters.

    The title is `file.py:Class.method`. Raises what `ast.parse` raises: SyntaxError, ValueError,
    RecursionError, MemoryError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)

    seen: dict[str, int] = {}
    for path, node in _definitions(tree):
        found = ast.get_docstring(node)
        if found and len(found) >= MIN_DOCSTRING_CHARACTERS:
            # Redefined names (property setters, platform branches) get a number.
            seen[path] = seen.get(path, 0) + 1
            yield (
                node.body[0].lineno,
                f"{name}:{path}" + (f"#{seen[path]}" if seen[path] > 1 else ""),
                found,
            )


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Documented]]:
    """Yield (dotted name, node) of the module and of every class and function in it."""
    # An explicit stack, since generated code nests deeper than Python recurses.
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            path = f"{path}.{node.name}" if path else node.name
            yield path, node
        elif isinstance(node, ast.Module):
            yield path, node
        stack += [(path, child) for child in reversed(list(ast.iter_child_nodes(node)))]
