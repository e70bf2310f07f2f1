"""`let` and ${}: numbers named once in a file, and sums of them wherever a number may stand."""

import ast
import operator
import warnings
from collections.abc import Callable
from typing import Any

from .errors import Problem, near
from .yaml import Document, Path, dotted

Number = int | float

LARGEST = 1e18
LONGEST = 200
OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
GRAMMAR = "use numbers, let.NAME, + - * / //, signs and parentheses"


class _ExpressionError(Exception):
    """What is wrong with an expression, and its fix."""


class _DoubtfulError(Exception):
    """A number whose own expression is wrong, and said to be."""


def fill(document: Document) -> list[str]:
    """Take `let` out of the document and put numbers where its expressions stand; what is wrong joins its problems.

    Returns the names that nothing used.
    """
    if not isinstance(document.data, dict):
        return []
    scope = _Scope(document)
    named = document.data.get("let", {})
    if not isinstance(named, dict):
        scope.wrong(("let",), "is not a mapping", "write NAME: number below it, indented")
        named = {}
    for name, value in named.items():
        scope.define(name, value)
    document.data = scope.filled({key: value for key, value in document.data.items() if key != "let"}, ())
    return [name for name in named if name not in scope.used]


class _Scope:
    """The numbers named so far, and which of them were used."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.numbers: dict[str, Number | None] = {}
        self.used: set[str] = set()

    def wrong(self, path: Path, message: str, fix: str) -> None:
        problem = Problem(dotted(path), message, fix, "Expression", *self.document.place(path))
        self.document.problems.append(problem)

    def define(self, name: str, value: Any) -> None:
        """A number, or an expression over the names above it."""
        path = ("let", name)
        value = self.filled(value, path)
        if not name.isidentifier():
            self.wrong(path, f"{name!r} cannot be a name in expressions", "use letters, digits and _")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            if not is_expression(value):  # else it is wrong already
                self.wrong(path, "is not a number", "write a number, or an expression such as ${let.a * 2}")
            value = None
        self.numbers[name] = value

    def filled(self, value: Any, path: Path) -> Any:
        """The value with numbers for expressions; one that is wrong stays as it is written."""
        if isinstance(value, dict):
            return {key: self.filled(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return tuple(self.filled(item, (*path, i)) for i, item in enumerate(value))
        if not is_expression(value):
            return value
        try:
            return self.number(value.strip()[2:-1])
        except _ExpressionError as error:
            message, fix = error.args
            self.wrong(path, f"{_shown(value)}: {message}", fix)
        except _DoubtfulError:
            pass
        if path[0] != "let":
            self.document.doubtful.add(path)
        return value

    def number(self, text: str) -> Number:
        """The expression's value; a whole one is an int, so that 256 / 2 can be a width."""
        if len(text) > LONGEST:
            raise _ExpressionError(f"has more than {LONGEST} characters", "name parts of it in let")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise _ExpressionError("is no expression", GRAMMAR) from None
        value = self.value(tree.body)
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def value(self, node: ast.expr) -> Number:
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return _bounded(value)
            case ast.Attribute(value=ast.Name(id="let"), attr=name):
                return self.named(name)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.value(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.value(operand)
            case ast.BinOp(op=op, left=left, right=right) if type(op) in OPERATORS:
                return self.combined(type(op), self.value(left), self.value(right))
        raise _ExpressionError(f"`{ast.unparse(node)}` may not stand in an expression", GRAMMAR)

    def named(self, name: str) -> Number:
        self.used.add(name)
        if name in self.numbers:
            number = self.numbers[name]
            if number is None:
                raise _DoubtfulError
            return number
        meant = near(name, self.numbers)
        known = ", ".join(f"let.{n}" for n in self.numbers) or "none is named above it"
        raise _ExpressionError(
            f"let.{name} is not named above it", f"did you mean let.{meant}?" if meant else f"there is: {known}"
        )

    def combined(self, op: type[ast.operator], left: Number, right: Number) -> Number:
        if op in (ast.Div, ast.FloorDiv) and right == 0:
            raise _ExpressionError("divides by zero", "correct the divisor")
        return _bounded(OPERATORS[op](left, right))


def is_expression(value: Any) -> bool:
    """Whether a value is a whole ${...}."""
    return isinstance(value, str) and value.strip().startswith("${") and value.strip().endswith("}")


def _bounded(value: Number) -> Number:
    if not abs(value) <= LARGEST:
        raise _ExpressionError(f"reaches beyond {LARGEST:g}", "use smaller numbers")
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
