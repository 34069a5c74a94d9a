"""Arithmetic in recipes: `eval(0.5 * num_epochs)`, and nothing that is not arithmetic.

Recipes come from strangers: an expression is parsed, and only numbers, names of variables, + - * / // % **, and the
functions abs, float, int, max, min and round mean anything. Results are bounded, so that none takes long to compute.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

_EVAL = re.compile(r"\s*eval\((.*)\)\s*", re.DOTALL)
_MAX_LENGTH = 500
_MAX_NUMBER = 1e18

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "float": float, "int": int, "max": max, "min": min, "round": round,
}  # fmt: skip


class ExpressionError(ValueError):
    """What is wrong with an expression."""


def is_expression(value: Any) -> bool:
    """Whether a value is wholly `eval(...)`."""
    return isinstance(value, str) and _EVAL.fullmatch(value) is not None


class Variables:
    """The variables of a recipe, which may be expressions of one another in any order.

    Args:
        values: by name, as they are written.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)
        self._known: dict[str, Any] = {}
        self._pending: list[str] = []

    def resolve(self, value: Any) -> Any:
        """The value with all expressions in it computed, also inside lists and mappings.

        Raises:
            ExpressionError: one is not arithmetic, names no variable, or variables depend on themselves.
        """
        if is_expression(value):
            match = _EVAL.fullmatch(value)
            assert match is not None
            return self._evaluate(match[1].strip())
        if isinstance(value, list):
            return [self.resolve(each) for each in value]
        if isinstance(value, dict):
            return {self.resolve(key): self.resolve(each) for key, each in value.items()}
        return value

    def _look_up(self, name: str) -> Any:
        if name in self._known:
            return self._known[name]
        if name not in self._values:
            known = ", ".join(map(str, self._values))
            raise ExpressionError(
                f"no variable {name!r}; " + (f"the variables are {known}" if known else "the recipe has none")
            )
        if name in self._pending:
            raise ExpressionError(f"variables depend on themselves: {' -> '.join([*self._pending, name])}")
        self._pending.append(name)
        try:
            self._known[name] = self.resolve(self._values[name])
        finally:
            self._pending.pop()
        return self._known[name]

    def _evaluate(self, source: str) -> Any:
        if source.isidentifier() and source not in _FUNCTIONS:
            return self._look_up(source)  # also a text, a list or a mapping
        if len(source) > _MAX_LENGTH:
            raise ExpressionError(f"an expression may have {_MAX_LENGTH} characters, this one has {len(source)}")
        try:
            tree = ast.parse(source, mode="eval").body
            return self._number(tree)
        except ExpressionError as error:
            raise ExpressionError(f"eval({source}): {error}") from None
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ExpressionError(f"eval({source}) is not arithmetic") from None
        except ZeroDivisionError:
            raise ExpressionError(f"eval({source}) divides by zero") from None
        except (TypeError, OverflowError) as error:
            raise ExpressionError(f"eval({source}): {error}") from None

    def _number(self, node: ast.expr) -> int | float:
        if isinstance(node, ast.Constant):
            value = node.value
        elif isinstance(node, ast.Name):
            value = self._look_up(node.id)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            value = _power(self._number(node.left), self._number(node.right))
        elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            value = _BINARY[type(node.op)](self._number(node.left), self._number(node.right))
        elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
            value = _UNARY[type(node.op)](self._number(node.operand))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            arguments = [self._number(argument) for argument in node.args]
            keywords = {keyword.arg: self._number(keyword.value) for keyword in node.keywords if keyword.arg}
            if len(keywords) < len(node.keywords):
                raise ExpressionError("** is a power here")
            value = _FUNCTIONS[node.func.id](*arguments, **keywords)
        else:
            functions = ", ".join(_FUNCTIONS)
            raise ExpressionError(
                f"only numbers, variables, + - * / // % ** and {functions} are allowed, not {ast.unparse(node)!r}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ExpressionError(f"{ast.unparse(node)} is not a number but {value!r}")
        if not math.isfinite(value) or abs(value) > _MAX_NUMBER:
            raise ExpressionError(f"{ast.unparse(node)} is larger than {_MAX_NUMBER:g}")
        return value


def _power(base: float, exponent: float) -> float:
    # As a float it cannot grow beyond bounds; exact where it is small.
    result = float(base) ** float(exponent)
    if isinstance(result, complex):
        raise ExpressionError(f"{base} ** {exponent} is not a real number")
    if isinstance(base, int) and isinstance(exponent, int) and exponent >= 0 and abs(result) <= _MAX_NUMBER:
        return base**exponent
    return result
