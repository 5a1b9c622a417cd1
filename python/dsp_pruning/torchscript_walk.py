"""From the calls of a traced network of branches to a packed network.

The walk follows data, not module names: a *branch* is what comes of gathering channels, a convolution, a
norm and maybe a ReLU; branches that are concatenated, or added into one tensor at listed channels, become
one packed convolution.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.file.decode import LoadedNetwork
from dsp_pruning.torchscript_archive import Call, State

__all__ = ["NORM", "Branch", "Gathered", "Image", "Owner", "Scatter", "Walk", "copy_state"]


@dataclass(frozen=True)
class Owner:
    """A module of the archive."""

    path: str


@dataclass(frozen=True)
class Image:
    """A tensor of the network: the node that makes it, and its channels where they are known."""

    node: fx.Node
    channels: int | None


@dataclass(frozen=True)
class Gathered:
    """Some channels of a tensor."""

    source: Image
    index: tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """settings: stride, padding, dilation; norm: weight, bias, mean, variance."""

    source: Image
    index: tuple[int, ...]
    weight: State
    bias: State | None
    settings: tuple[Any, ...]
    norm: tuple[State, State, State, State] | None = None
    norm_settings: tuple[float, float] = (1e-5, 0.1)
    relu: bool = False


@dataclass(frozen=True)
class Scatter:
    """Branches that are added into a tensor, each at the channels of its list."""

    base: Image
    branches: tuple[Branch, ...]
    places: tuple[tuple[int, ...], ...]


@dataclass
class Walk:
    """own, x: names of the network itself and of its input; state: the archive's tensors.

    handlers: per kind of call a function of the walk and the operands, see ``torchscript_ops``.
    """

    own: str
    x: str
    state: dict[str, Tensor]
    handlers: Mapping[str, Callable[[Walk, list[Any]], Any]]
    values: dict[str, Any] = field(init=False)
    graph: fx.Graph = field(default_factory=fx.Graph, init=False)
    root: nn.Module = field(default_factory=nn.Module, init=False)
    placed: set[str] = field(default_factory=set, init=False)
    pooled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.values = {self.own: Owner(""), self.x: Image(self.graph.placeholder("x"), None)}

    def step(self, call: Call) -> None:
        """Follow one call. Raises DSPFormatError for one that no released network holds."""
        handler = self.handlers.get(call.kind.removesuffix("_"))
        if handler is None:
            raise DSPFormatError(f"{call.kind} is not known here")
        operands = (
            [call.value] if call.kind == "prim::Constant" else [self.values[name] for name in call.inputs]
        )
        if call.kind == "prim::GetAttr":
            operands.append(call.value)
        result = handler(self, operands)
        if call.kind.endswith("_"):  # in place: whoever reads the operand later reads the result
            self._replace(operands[0], result)
        for name, value in zip(call.outputs, result if len(call.outputs) > 1 else [result], strict=True):
            self.values[name] = value

    def network(self, output: str) -> LoadedNetwork:
        """The packed network whose answer is the value of this name."""
        self.graph.output(self.image(self.values[output]).node)
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)  # of a block that was pruned away whole, for example
        called = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        for path in self.placed - called:
            parent, _, name = path.rpartition(".")
            delattr(self.root.get_submodule(parent), name)
        first = next((m for m in self.root.modules() if isinstance(m, nn.Conv2d | PackedConv2d)), None)
        if first is None:
            raise DSPFormatError("it holds no convolution")
        size = 224 if self.pooled else 32
        meta = {
            "architecture": None,
            "example_shapes": ((1, first.in_channels, size, size),),
            "example_given": False,
            "modes": "both",
        }
        return LoadedNetwork(self.root, self.graph, meta)

    def image(self, value: Any) -> Image:
        """The tensor itself, made of its branches if it still is some."""
        if isinstance(value, Image):
            return value
        if isinstance(value, Gathered):
            raise DSPFormatError("gathered channels are read by something other than a convolution")
        if isinstance(value, Branch):
            made = self.joined([value], [range(value.weight.tensor.shape[0])], value.weight.tensor.shape[0])
        elif isinstance(value, Scatter):
            width = value.base.channels
            if width is None:
                raise DSPFormatError("branches are added into a tensor of unknown width")
            branch = self.joined(value.branches, value.places, width)
            made = Image(self.graph.call_function(torch.add, (value.base.node, branch.node)), width)
        else:
            raise DSPFormatError(f"a {type(value).__name__} stands where a tensor is expected")
        self._replace(value, made)
        return made

    def call(self, function: Callable[..., Any], value: Any, *arguments: Any) -> Image:
        """A function of one tensor that keeps its channels."""
        image = self.image(value)
        return Image(self.graph.call_function(function, (image.node, *arguments)), image.channels)

    def module(self, path: str, module: nn.Module, value: Any, channels: int | None) -> Image:
        """Put a module at a path and call it."""
        parent, name = self.root, path.rpartition(".")[2]
        for part in path.split(".")[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if name in parent._modules:
            raise DSPFormatError(f"layer {path!r} runs twice")
        parent.add_module(name, module)
        self.placed.add(path)
        return Image(self.graph.call_module(path, (self.image(value).node,)), channels)

    def _replace(self, old: Any, new: Any) -> None:
        for name, value in self.values.items():
            if value is old:
                self.values[name] = new

    def joined(self, branches: Sequence[Branch], places: Sequence[Sequence[int]], out_channels: int) -> Image:
        """One packed convolution, one norm and maybe a ReLU for branches of one source and one form."""
        first, path = branches[0], _joined_path([branch.weight.path for branch in branches])
        forms = {
            (id(b.source.node), b.settings, b.norm_settings, b.relu, b.norm is None, b.bias is None)
            for b in branches
        }
        kernels = {tuple(branch.weight.tensor.shape[2:]) for branch in branches}
        if len(forms) > 1 or len(kernels) > 1:
            raise DSPFormatError(
                f"the branches of {path!r} read different tensors or have different settings"
            )
        in_channels = first.source.channels
        if in_channels is None:
            in_channels = 1 + max((channel for branch in branches for channel in branch.index), default=0)
        try:
            structure = GroupStructure.build(
                in_channels,
                out_channels,
                [(b.index, tuple(p)) for b, p in zip(branches, places, strict=True)],
            )
            stride, padding, dilation = first.settings
            biased = first.bias is not None
            conv = PackedConv2d(structure, kernels.pop(), stride, padding, dilation, bias=biased)
        except DSPError as error:
            raise DSPFormatError(f"the branches of {path!r} do not fit together: {error}") from error
        with torch.no_grad():
            for branch, weight in zip(branches, conv.weights, strict=True):
                copy_state(weight, branch.weight)
            if conv.bias is not None:
                for branch, place in zip(branches, places, strict=True):
                    assert branch.bias is not None
                    conv.bias[list(place)] = branch.bias.tensor
        joined = self.module(path, conv, first.source, out_channels)
        if first.norm is not None:
            norm = nn.BatchNorm2d(out_channels, *first.norm_settings)
            # An absent channel is 0 before the norm and has to be 0 after it.
            for part, absent in (("weight", 0.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                getattr(norm, part).data.fill_(absent)
            for branch, place in zip(branches, places, strict=True):
                assert branch.norm is not None
                for part, tensor in zip(NORM, branch.norm, strict=True):
                    if tensor.tensor.shape != (len(place),):
                        raise DSPFormatError(f"{tensor.path} has shape {tuple(tensor.tensor.shape)}")
                    getattr(norm, part).data[list(place)] = tensor.tensor.detach()
            joined = self.module(_norm_path(path), norm, joined, out_channels)
        return self.call(torch.relu, joined) if first.relu else joined


NORM = ("weight", "bias", "running_mean", "running_var")


def _joined_path(paths: Sequence[str]) -> str:
    """``stage_1.0.conv_a`` for the branches ``stage_1.0.layers_a.{g}.0.weight``."""
    parts = [path.split(".") for path in paths]
    common = [column[0] for column in zip(*parts, strict=False) if len(set(column)) == 1]
    common = common[
        : next((n for n, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), None)
    ]
    if common and common[-1] == "weight":
        common.pop()
    while len(common) > 1 and common[-1].isdecimal():
        common.pop()
    return re.sub(r"layers_(\w+)$", r"conv_\1", ".".join(common)) or "conv"


def _norm_path(path: str) -> str:
    renamed = re.sub(r"conv_(\w+)$", r"bn_\1", path)
    return renamed if renamed != path else f"{path}_norm"


def copy_state(target: Tensor, source: State) -> None:
    """Fill a parameter from the archive's state. Raises DSPFormatError for another shape."""
    if target.shape != source.tensor.shape:
        raise DSPFormatError(
            f"{source.path} has shape {tuple(source.tensor.shape)}; expected {tuple(target.shape)}"
        )
    with torch.no_grad():
        target.copy_(source.tensor)
