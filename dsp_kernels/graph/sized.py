"""Tracing for the example's size: each operation also runs on fake tensors, so sizes are Python numbers."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor

from dsp_kernels.graph.capture import Proxy, Tracer

_PLAIN = (bool, int, float, str, type(None))
_UNKNOWN = object()  # the result of an operation that does not run on the larger image
_VALUES = "what it does there depends on the values of a tensor; move that out of forward()"
_BATCH = "what it does there depends on the number of images; move that out of forward()"


class SizedTracer(Tracer):
    """Traces a model of one input for the height and width of its example.

    An operation runs for three inputs: two images, many images and two larger images. A number that is the
    same for two and many is a Python number for forward(); what depends on the number of images stays a
    proxy. uses_size: whether such a number depends on height or width.
    """

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.uses_size = False
        self._mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        image = example.shape[1:]
        larger = (image[0], 2 * image[1] + 128, 2 * image[2] + 192)  # other sizes after any usual stride
        with self._mode:
            self._inputs = [example.new_empty(shape) for shape in ((2, *image), (67, *image), (2, *larger))]

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        logs = fake_tensor.log.disabled
        fake_tensor.log.disabled = True  # an operation that fails for the larger image is no error
        try:
            with _forward_is_a_call(self, root):
                return super().trace(root, concrete_args)
        finally:
            fake_tensor.log.disabled = logs

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        if target in (operator.eq, operator.ne) and any(isinstance(_value(a), torch.Size) for a in args):
            equal = _same_sizes(*args)
            if equal is not None:
                return equal is (target is operator.eq)
        values = [self._run(kind, target, args, kwargs, probe) for probe in range(3)]
        if kind != "placeholder" and isinstance(values[0], _PLAIN):
            operands: list[Any] = []
            # An element of a shape depends on nothing but itself.
            if target is not operator.getitem:
                fx.node.map_aggregate((args, kwargs), operands.append)
            if values[0] == values[1] and not any(_depends(operand, 1) for operand in operands):
                by_size = values[0] != values[2] or any(_depends(operand, 2) for operand in operands)
                self.uses_size = self.uses_size or by_size
                return values[0]
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        proxy.values = values
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _SizedProxy(node, self)

    def length_of(self, obj: fx.Proxy) -> int:
        values: Any = obj.values
        lengths = [-1 if value is _UNKNOWN else len(value) for value in values]
        if lengths[0] != lengths[1]:
            raise fx.proxy.TraceError(_BATCH)
        self.uses_size = self.uses_size or lengths[0] != lengths[2]
        return lengths[0]

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = _value(obj)
        if isinstance(value, tuple | list | dict):
            return bool(self.length_of(obj))
        raise fx.proxy.TraceError(_VALUES if isinstance(value, Tensor) else _BATCH)

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any, probe: int) -> Any:
        if kind == "placeholder":
            if target.startswith("**"):
                return {}
            is_image = not any(node.op == "placeholder" for node in self.graph.nodes)
            own = [self._inputs[probe]] if is_image else list(args)
            return tuple(own) if target.startswith("*") else own[0] if own else None
        self.executing = True
        try:
            if kind == "get_attr":
                return operator.attrgetter(target)(self.root)
            args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: _known(a, probe))
            with self._mode, torch.no_grad():
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                run = self.root.get_submodule(target) if kind == "call_module" else target
                return run(*args, **kwargs)
        except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException) as error:
            raise fx.proxy.TraceError(_VALUES) from error
        except Exception:
            if probe < 2:
                raise
            return _UNKNOWN
        finally:
            self.executing = False


class _SizedProxy(Proxy):
    """values: the results for the three inputs of a SizedTracer."""

    values: Sequence[Any] = ()

    def __getattr__(self, name: str) -> Any:
        if callable(getattr(self.values[0], name)):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __index__(self) -> int:
        raise fx.proxy.TraceError(_VALUES if isinstance(self.values[0], Tensor) else _BATCH)

    __int__ = __float__ = __index__


def _value(a: Any) -> Any:
    return a.values[0] if isinstance(a, _SizedProxy) else a


def _known(a: Any, probe: int) -> Any:
    value = a.values[probe] if isinstance(a, _SizedProxy) else a
    if value is _UNKNOWN:
        raise LookupError
    return value


def _depends(a: Any, probe: int) -> bool:
    """Whether a number or size depends on the number of images (probe 1) or on their size (probe 2)."""
    value = _value(a)
    if not isinstance(a, _SizedProxy) or isinstance(value, Tensor):
        return False
    # A number that does not depend on the number of images is no proxy.
    return a.values[probe] != value if isinstance(value, torch.Size) else isinstance(value, _PLAIN)


def _same_sizes(left: Any, right: Any) -> bool | None:
    """Whether two shapes are equal; None if that depends on the number of images."""
    left, right = (tuple(a) if isinstance(_value(a), tuple) else a for a in (left, right))
    if not isinstance(left, tuple) or not isinstance(right, tuple) or len(left) != len(right):
        return False
    pairs = list(zip(left, right, strict=True))
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        return False
    same = all(a is b or getattr(a, "values", a) == getattr(b, "values", b) for a, b in pairs)
    return True if same else None


@contextmanager
def _forward_is_a_call(tracer: SizedTracer, root: nn.Module) -> Iterator[None]:
    """Record ``module.forward(x)`` of a leaf module without hooks as ``module(x)``."""
    patched = []
    for path, module in root.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if path and tracer.is_leaf_module(module, path) and not hooked:

            def entry(*args: Any, _module: nn.Module = module, **kwargs: Any) -> Any:
                if tracer.is_outside():
                    return type(_module).forward(_module, *args, **kwargs)
                return tracer.create_proxy("call_module", tracer.path_of_module(_module), args, kwargs)

            vars(module)["forward"] = entry
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del vars(module)["forward"]
