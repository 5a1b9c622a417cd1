"""Networks that are right for some image sizes only: SizeCheck refuses all others.

A condition is a short text of arithmetic over ``batch``, ``height`` and ``width``: ``height % 2 == 0``.
It is parsed into a tree of integers and operators; nothing is evaluated as Python code.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from dsp_kernels.errors import DSPShapeError
from dsp_kernels.op.packed import PackedConv2d

_NAMES = ("batch", "height", "width")
_LONGEST, _MOST, _DEEPEST, _LARGEST = 200, 64, 12, 2**31
_COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class SizeCheck(nn.Module):
    """The identity on images (batch, channels, height, width) of allowed sizes.

    conditions: texts such as ``"height == 32"``, all of which must hold.
    Raises DSPShapeError for an invalid condition and, when called, for an image of another size.
    """

    def __init__(self, conditions: Sequence[str]) -> None:
        super().__init__()
        if not 1 <= len(conditions) <= _MOST:
            raise DSPShapeError(f"{len(conditions)} conditions on sizes; expected 1 to {_MOST}")
        self.conditions = tuple(conditions)
        self._parsed = tuple(_parse(condition) for condition in self.conditions)

    def forward(self, x: Tensor) -> Tensor:
        """x, of any dtype."""
        sizes = x.shape[0], x.shape[-2], x.shape[-1]
        for text, (compare, left, right) in zip(self.conditions, self._parsed, strict=True):
            if not compare(_value(left, sizes), _value(right, sizes)):
                raise DSPShapeError(
                    f"input has (batch, height, width) = {tuple(int(size) for size in sizes)}; this network "
                    f"is right only for {text} at this place"
                )
        return x

    def extra_repr(self) -> str:
        """The conditions."""
        return ", ".join(self.conditions)


def fixed_size(height: int, width: int) -> SizeCheck:
    """The check for images of this size only."""
    return SizeCheck((f"height == {height}", f"width == {width}"))


def needed_images(conditions: Iterable[str]) -> str:
    """In words: "images of 32 x 32", or "images with height % 2 == 0" for other conditions."""
    text = " and ".join(conditions)
    sizes = re.fullmatch(r"height == (\d+) and width == (\d+)", text)
    return f"images of {sizes[1]} x {sizes[2]}" if sizes else f"images with {text}"


class FixedSizeConv2d(nn.Module):
    """conv(x) + position_bias, for x of one size.

    check: for that size; x of another one raises DSPShapeError.
    position_bias: (out_channels, out_height, out_width), the contribution of removed constant channels. It
    varies near the border, where zeros are padded to those channels too.
    """

    def __init__(self, conv: nn.Conv2d | PackedConv2d, check: SizeCheck, position_bias: Tensor) -> None:
        super().__init__()
        self.conv = conv
        self.check = check
        self.position_bias = nn.Parameter(position_bias, next(conv.parameters(), position_bias).requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in_channels, height, width) -> (batch, out_channels, out_height, out_width)."""
        return self.conv(self.check(x)) + self.position_bias


def _parse(text: str) -> tuple[Any, ...]:
    """A comparison as (compare, left, right). Raises DSPShapeError for any other text."""
    try:
        if not isinstance(text, str) or len(text) > _LONGEST or not text.isascii():
            raise ValueError("expected a short text")
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.Compare) or len(tree.ops) != 1:
            raise ValueError("expected one comparison")
        compare = _COMPARISONS[type(tree.ops[0])]
        return compare, _term(tree.left, 0), _term(tree.comparators[0], 0)
    except (ValueError, SyntaxError, KeyError, RecursionError, MemoryError) as error:
        raise DSPShapeError(f"{str(text)[:80]!r} is no condition on sizes: {error!r}") from error


def _term(tree: ast.AST, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} deep")
    if isinstance(tree, ast.Constant) and type(tree.value) is int and tree.value < _LARGEST:
        return tree.value
    if isinstance(tree, ast.Name) and tree.id in _NAMES:
        return tree.id
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return operator.sub, 0, _term(tree.operand, depth + 1)
    if isinstance(tree, ast.BinOp):
        left, right = _term(tree.left, depth + 1), _term(tree.right, depth + 1)
        divides = isinstance(tree.op, ast.FloorDiv | ast.Mod)
        if divides and not (isinstance(right, int) and right > 0):
            raise ValueError("expected a positive number to divide by")
        return _ARITHMETIC[type(tree.op)], left, right
    raise ValueError(f"{type(tree).__name__} is not known")


def _value(term: Any, sizes: tuple[int, int, int]) -> int:
    if isinstance(term, int):
        return term
    if isinstance(term, str):
        return sizes[_NAMES.index(term)]
    function, left, right = term
    return function(_value(left, sizes), _value(right, sizes))
