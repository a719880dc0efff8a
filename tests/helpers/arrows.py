"""What a source text reaches: its imports at any depth, and the modules that its commands run.

A command is a list, a tuple or the arguments of a call in which "-m" is followed by a name or "-c"
by a program. What only tells a user what to type is one string, and no command.
"""

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

AT_THE_TOP = "at the top"
IN_A_FUNCTION = "inside a function"
FOR_TYPES = "under TYPE_CHECKING"
BY_NAME = "by its name in a string"
BY_M = "by -m"
IN_C = "in a -c program"
SHELLS = {"sh", "bash", "/bin/sh", "/bin/bash"}
IMPORTERS = {"import_module", "__import__", "resolve_name", "run_module"}
UNREADABLE = "?"  # a program after -c that is not written out


@dataclass(frozen=True, kw_only=True)
class Arrow:
    """One use of another module, ours or not: `target` is a dotted name, and `how` is one of the
    above.
    """

    line: int
    target: str
    how: str


def module_name(path: Path, repo: Path) -> str:
    """The dotted name of a file; of an __init__.py the package's."""
    parts = path.relative_to(repo).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def arrows(source: str, package: str = "") -> list[Arrow]:
    """Everything that a source text imports or runs; `package` is what relative imports start from."""
    tree = ast.parse(source)
    visitor = _Visitor(package, _constants(tree))
    visitor.visit(tree)
    return visitor.found


class _Visitor(ast.NodeVisitor):
    """Walks a tree and remembers how what it sees comes to run."""

    def __init__(self, package: str, constants: dict[str, str]) -> None:
        self.package = package
        self.constants = constants
        self.found: list[Arrow] = []
        self.how = AT_THE_TOP

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = ".".join(filter(None, [self._parent(node.level), node.module]))
        for alias in node.names:
            self._add(node, f"{base}.{alias.name}")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_inside(node, IN_A_FUNCTION)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_inside(node, IN_A_FUNCTION)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_inside(node, IN_A_FUNCTION)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)
            return
        before = self.how
        self.how = FOR_TYPES
        for statement in node.body:
            self.visit(statement)
        self.how = before
        for statement in node.orelse:
            self.visit(statement)

    def visit_List(self, node: ast.List) -> None:
        self._command(node, node.elts)

    def visit_Tuple(self, node: ast.Tuple) -> None:
        self._command(node, node.elts)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func).rpartition(".")[2]
        first = self._text(node.args[0]) if node.args else None
        if name in IMPORTERS and first is not None:
            self._add(node, first.partition(":")[0], BY_NAME)
        if name == "split":  # "python -m x".split(), shlex.split("python -m x")
            words = node.func.value if isinstance(node.func, ast.Attribute) else node.func
            text = self._text(words) if first is None else first
            self._words(node, [ast.Constant(word) for word in (text or "").split()])
        self._command(node, node.args)

    def _visit_inside(self, node: ast.AST, how: str) -> None:
        before = self.how
        if before == AT_THE_TOP:
            self.how = how
        self.generic_visit(node)
        self.how = before

    def _command(self, node: ast.expr, elements: Sequence[ast.expr]) -> None:
        self._words(node, elements)
        self.generic_visit(node)

    def _words(self, node: ast.expr, elements: Sequence[ast.expr]) -> None:
        words = [self._text(element) for element in elements]
        for k, word in enumerate(words):
            after = words[k + 1] if k + 1 < len(words) else None
            if word == "-m" and after is not None and _is_module(after):
                self._add(node, after, BY_M)
            elif word is not None and word.startswith("-m") and _is_module(word[2:]):
                self._add(node, word[2:], BY_M)
            elif word == "-c" and k + 1 < len(words) and (k == 0 or words[k - 1] not in SHELLS):
                self._program(node, after)

    def _program(self, node: ast.expr, text: str | None) -> None:
        """What a program after -c reaches; one that is put together elsewhere is named as
        unreadable.
        """
        try:
            reached = arrows(text if text is not None else "(")
        except SyntaxError:
            self._add(node, UNREADABLE, IN_C)
            return
        for arrow in reached:
            self._add(node, arrow.target, IN_C)

    def _text(self, node: ast.expr) -> str | None:
        """A string that is written out: here, as an f-string, or as a constant of this file."""
        if isinstance(node, ast.Name):
            return self.constants.get(node.id)
        return _string(node)

    def _parent(self, level: int) -> str:
        parts = self.package.split(".")
        return ".".join(parts[: len(parts) - level + 1]) if level else ""

    def _add(self, node: ast.stmt | ast.expr, target: str, how: str = "") -> None:
        self.found.append(Arrow(line=node.lineno, target=target, how=how or self.how))


def _string(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    # What is filled in becomes a name, so that the rest can be parsed.
    if isinstance(node, ast.JoinedStr):
        return "".join(_string(part) or "filled_in" for part in node.values)
    return None


def _constants(tree: ast.AST) -> dict[str, str]:
    """Every name of the file that a string is assigned to."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and (text := _string(node.value)) is not None:
            found |= {target.id: text for target in node.targets if isinstance(target, ast.Name)}
    return found


def _is_module(word: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", word) is not None


def is_standard(target: str) -> bool:
    """Part of Python itself."""
    return target.partition(".")[0] in sys.stdlib_module_names


def modules_of(repo: Path, packages: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The name and the file of every module in these folders."""
    for package in packages:
        for path in sorted((repo / package).rglob("*.py")):
            yield module_name(path, repo), path
