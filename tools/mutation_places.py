"""Places where a program can be broken by one small edit: what `mutation_draw.py` draws from.

- An edit changes one operator, number, condition, argument or statement, as a slip of the hand
  does. It replaces the text of one node of the syntax tree.
- Left out is what changes no number: assertions, messages of errors, annotations, docstrings,
  text.

Alternatives considered:
- cosmic-ray and mutmut: most of their edits break the program at once (shifts of floats, operators
  of annotations), which any test sees, and the first brings twenty packages, a database among them.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
NAMES = {"min": "max", "max": "min", "amax": "amin", "any": "all", "all": "any"}
SILENT = (ast.Assert, ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)
"""Nodes in which nothing is edited."""


@dataclass(frozen=True)
class Edit:
    """Bytes `start` to `stop` of a file become `new`."""

    file: str
    line: int
    start: int
    stop: int
    old: str
    new: str
    kind: str

    @property
    def name(self) -> str:
        """File, line and kind, on one line."""
        return f"{self.file}:{self.line} {self.kind}"

    @property
    def is_the_same(self) -> bool:
        """Whether the edit writes the same program, as two equal arguments that are swapped do."""
        try:
            return ast.dump(ast.parse(self.old.strip())) == ast.dump(ast.parse(self.new))
        except SyntaxError:
            # A part of a statement: the edits of these change their words.
            return False

    def apply(self, root: Path) -> None:
        """Make the edit in the copy at `root`. Raises SyntaxError when no program is left."""
        path = root / self.file
        source = path.read_bytes()
        assert source[self.start : self.stop].decode() == self.old, f"{self.name}: another file"
        broken = source[: self.start] + self.new.encode() + source[self.stop :]
        compile(broken, self.file, "exec")
        path.write_bytes(broken)


def edits_of(root: Path, file: str) -> list[Edit]:
    """Every edit that can be made in a file, in its order."""
    source = (root / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    found = []
    for node, new, kind in _changes(ast.parse(source)):
        # An expression stands in parentheses, so that its neighbours bind as before.
        text = new if isinstance(new, str) else ast.unparse(new)
        text = f"({text})" if isinstance(node, ast.expr) and not isinstance(new, str) else text
        assert node.end_lineno is not None and node.end_col_offset is not None, "it was parsed"
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        old = source[begin:end].decode()
        found.append(Edit(file, node.lineno, begin, end, old, text, kind))
    return sorted(found, key=lambda edit: (edit.start, edit.stop, edit.kind))


Change = tuple[ast.expr | ast.stmt, ast.AST | str, str]


def _changes(tree: ast.AST) -> Iterator[Change]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, SILENT) or _is_type_checking(node):
            continue
        if isinstance(node, ast.expr | ast.stmt):
            yield from _changes_of(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AnnAssign | ast.arg):
            yield from _changes(_without_annotations(node))
        else:
            yield from _changes(node)


def _is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def _without_annotations(node: ast.AST) -> ast.Module:
    """The parts of a definition that are run: body, default values, the value of a field."""
    parts: list[ast.AST] = []
    if isinstance(node, ast.FunctionDef):
        parts = [*node.body, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
    elif isinstance(node, ast.ClassDef):
        parts = [*node.body]
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        parts = [node.value]
    return ast.Module(body=[_as_statement(part) for part in parts], type_ignores=[])


def _as_statement(node: ast.AST) -> ast.stmt:
    if isinstance(node, ast.stmt):
        return node
    assert isinstance(node, ast.expr), "a default or a value"
    # Any statement that is itself never edited.
    return ast.Return(value=node)


def _changes_of(node: ast.expr | ast.stmt) -> Iterator[Change]:
    match node:
        case ast.Compare(left, [operator], [right]):
            yield node, ast.Compare(left, [COMPARISONS[type(operator)]()], [right]), "comparison"
        case ast.BinOp(left, operator, right) if type(operator) in OPERATORS:
            if not _is_text(left) and not _is_text(right):
                yield node, ast.BinOp(left, OPERATORS[type(operator)](), right), "arithmetic"
        case ast.UnaryOp(ast.Not(), operand):
            yield node, operand, "negation"
        case ast.UnaryOp(ast.USub(), operand):
            yield node, operand, "sign"
        case ast.BoolOp(operator, values):
            other = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield node, ast.BoolOp(other, values), "and / or"
        case ast.Constant(bool() as value):
            yield node, str(not value), "true / false"
        case ast.Constant(int() | float() as value):
            yield node, repr(value + 1 if isinstance(value, int) else value * 2), "number"
        case ast.If(test) | ast.IfExp(test) | ast.While(test):
            yield test, ast.UnaryOp(ast.Not(), test), "condition"
        case ast.Subscript(value, ast.Slice(lower, upper, step)) if lower or upper:
            if lower is not None:
                yield node, ast.Subscript(value, ast.Slice(None, upper, step)), "slice"
            if upper is not None:
                yield node, ast.Subscript(value, ast.Slice(lower, None, step)), "slice"
        case ast.Expr(ast.Call()):
            yield node, "pass", "statement left out"
        case ast.AugAssign(target, operator, value):
            yield node, "pass", "statement left out"
            if type(operator) in OPERATORS:
                yield node, ast.AugAssign(target, OPERATORS[type(operator)](), value), "arithmetic"
        case ast.Call(function, [first, second, *rest], keywords):
            swapped = ast.Call(function, [second, first, *rest], keywords)
            if not _is_named(function, "isinstance", "getattr", "zip", "partial"):
                yield node, swapped, "arguments swapped"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        yield from _other_name(node.func)


def _other_name(function: ast.Name | ast.Attribute) -> Iterator[Change]:
    name = function.id if isinstance(function, ast.Name) else function.attr
    if name in NAMES:
        if isinstance(function, ast.Name):
            yield function, ast.Name(NAMES[name]), "min / max"
        else:
            yield function, ast.Attribute(function.value, NAMES[name]), "min / max"


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _is_named(node: ast.expr, *names: str) -> bool:
    return isinstance(node, ast.Name) and node.id in names
