"""swap(model): every PackedConv2d of any model becomes a FusedConv2d, in place."""

from __future__ import annotations

from collections import Counter

from torch import nn

from dsp_kernels.errors import DSPError
from dsp_kernels.graph.network import call_graph
from dsp_kernels.op.folding import fold_batch_norm
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.program.planner import conv_spec_of

__all__ = ["swap"]


def swap(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Replace every PackedConv2d in ``model`` by its fused module, and return the model.

    A batch norm that directly follows a packed convolution, alone reads it and runs once, is folded in and
    replaced by an identity. This needs a model that torch.fx can trace; in others the norms stay, and so do
    norms with hooks or in training mode. What forward() does in eval mode counts: a method that runs the
    convolution and not its norm sees the norm folded in. A model that is itself a PackedConv2d cannot be
    replaced in place: the fused module is returned.

    backend: "auto" or the name of one. Raises DSPError if the model is in training mode.
    """
    if model.training:
        raise DSPError("swap() makes a model for inference; call model.eval() first")
    if isinstance(model, PackedConv2d):
        return _fused(model, None, backend)
    norms = _following_norms(model)
    made: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, PackedConv2d):
                if id(child) not in made:
                    made[id(child)] = _fused(child, norms.get(child), backend)
                setattr(parent, name, made[id(child)])
    folded = set(norms.values())
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in folded:
                setattr(parent, name, nn.Identity())
    return model


def _fused(conv: PackedConv2d, norm: nn.BatchNorm2d | None, backend: str) -> FusedConv2d:
    read = conv_spec_of(conv)
    assert not isinstance(read, str)  # every PackedConv2d has a spec
    spec, weights, bias = read
    if norm is not None:
        spec, weights, bias = fold_batch_norm(spec, weights, bias, norm)
    return FusedConv2d(spec, weights, bias, backend).eval()


def _following_norms(model: nn.Module) -> dict[nn.Module, nn.BatchNorm2d]:
    """Convolution -> the norm that can be folded into it. Empty for a model that cannot be traced."""
    graph = call_graph(model)
    if graph is None:
        return {}
    called = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    uses = Counter(id(module) for module in called.values())
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    found: dict[nn.Module, nn.BatchNorm2d] = {}
    for node, conv in called.items():
        if not isinstance(conv, PackedConv2d) or len(node.users) != 1:
            continue
        reader = next(iter(node.users))
        norm, path = called.get(reader), str(reader.target)
        if (
            isinstance(norm, nn.BatchNorm2d)
            and type(norm).forward is nn.BatchNorm2d.forward
            and norm.running_mean is not None
            and not norm.training
            and not any(_has_hooks(module) for module in (conv, norm))
            and not any(name == path or name.startswith(f"{path}.") for name in read)
            and uses[id(conv)] == uses[id(norm)] == 1
        ):
            found[conv] = norm
    return found


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
