"""What must hold between the keys of a config: `loss.weights.edge + loss.weights.ssim <= 0.5`."""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from kintsugi.errors import ConfigError

_BINARY: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_UNARY: Mapping[type[ast.AST], Callable[[Any], Any]] = {ast.Not: operator.not_, ast.USub: operator.neg}
_KEYS = (ast.Name, ast.Attribute, ast.Subscript)
_ALLOWED = (
    *_KEYS, *_BINARY, *_UNARY, ast.Constant, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.boolop,
    ast.expr_context,
)  # fmt: skip


class Constraint:
    """A comparison of dotted keys and constants, with + - * /, and, or, not, and `key[level]`.

    Raises:
        ConfigError: the text is no such comparison.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._body = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ConfigError(f"constraint '{text}': {error.msg}: write it as 'loss.weights.edge <= 0.3'") from error
        for node in ast.walk(self._body):
            if not isinstance(node, _ALLOWED):
                told = f"'{ast.unparse(node)}'" if isinstance(node, ast.expr) else type(node).__name__
                raise ConfigError(f"constraint '{text}': {told} is not allowed, only keys, numbers and + - * /")
        negated = isinstance(self._body, ast.UnaryOp) and isinstance(self._body.op, ast.Not)
        if not negated and not isinstance(self._body, ast.Compare | ast.BoolOp):
            raise ConfigError(f"constraint '{text}': compares nothing: write it as 'loss.weights.edge <= 0.3'")

    def holds(self, tree: Mapping[str, Any]) -> bool:
        """Whether it holds for a config as nested mappings.

        Raises:
            ConfigError: a key does not exist, or its value does not fit what is done with it.
        """
        return bool(self._value(self._body, tree))

    def check(self, tree: Mapping[str, Any]) -> None:
        """Make sure that a config has every key, those too that `and` and `or` pass over.

        Raises:
            ConfigError: a key does not exist.
        """
        for node in ast.walk(self._body):
            if isinstance(node, _KEYS):
                self._value(node, tree)

    def _value(self, node: ast.AST, tree: Mapping[str, Any]) -> Any:
        try:
            return _value(node, tree)
        except (KeyError, IndexError) as error:
            raise ConfigError(f"constraint '{self.text}': there is no setting {error}") from error
        except (TypeError, ZeroDivisionError) as error:
            raise ConfigError(f"constraint '{self.text}': {error}") from error


def _value(node: ast.AST, tree: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return tree[node.id]
        case ast.Attribute():
            return _value(node.value, tree)[node.attr]
        case ast.Subscript():
            return _value(node.value, tree)[_value(node.slice, tree)]
        case ast.UnaryOp():
            return _UNARY[type(node.op)](_value(node.operand, tree))
        case ast.BinOp():
            return _BINARY[type(node.op)](_value(node.left, tree), _value(node.right, tree))
        case ast.BoolOp():
            found = (bool(_value(part, tree)) for part in node.values)
            return all(found) if isinstance(node.op, ast.And) else any(found)
        case ast.Compare():
            values = [_value(part, tree) for part in (node.left, *node.comparators)]
            pairs = zip(node.ops, values, values[1:], strict=False)
            return all(_BINARY[type(op)](left, right) for op, left, right in pairs)
        case _:
            raise TypeError(f"'{ast.unparse(node)}' is not allowed here")
