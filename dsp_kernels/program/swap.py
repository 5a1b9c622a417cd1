"""swap(model): the packed convolutions of any model become fused ones, in place."""

from collections import Counter

import torch
from torch import nn

from dsp_kernels.errors import DSPError
from dsp_kernels.graph.network import call_graph
from dsp_kernels.op.dense import fold_batch_norm
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.run.convs import BACKENDS


def swap(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Replace every PackedConv2d in ``model`` by a FusedConv2d, in place, and return the model.

    The batch norm after a packed convolution is folded in and replaced by an identity if nothing else reads
    the convolution, both run once in forward(), neither has hooks and the norm is in eval mode. A method
    other than forward() that runs the convolution alone then sees the norm folded in. In a model that
    torch.fx cannot trace the norms stay. A model that is a PackedConv2d itself is not changed: the fused
    module is returned.

    backend: "auto" or the name of one. Raises DSPError if the model is in training mode, DSPBackendError if
    the backend cannot run on the model's device.

    >>> import torch, dsp_kernels
    >>> structure = dsp_kernels.GroupStructure.build(3, 4, [([0, 2], [0, 3]), ([1], [1])])
    >>> net = torch.nn.Sequential(dsp_kernels.PackedConv2d(structure, 3), torch.nn.BatchNorm2d(4)).eval()
    >>> x = torch.randn(2, 3, 8, 8)
    >>> y = net(x)
    >>> torch.allclose(dsp_kernels.swap(net)(x), y, atol=1e-5)
    True
    >>> [type(module).__name__ for module in net]
    ['FusedConv2d', 'Identity']
    """
    if model.training:
        raise DSPError("swap() makes a model for inference; call model.eval() first")
    if isinstance(model, PackedConv2d):
        return _fused(model, None, backend)
    norms = _following_norms(model)
    packed = [module for module in model.modules() if isinstance(module, PackedConv2d)]
    made: dict[nn.Module, nn.Module] = {conv: _fused(conv, norms.get(conv), backend) for conv in packed}
    made |= {norm: nn.Identity() for norm in norms.values()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    return model


def _fused(conv: PackedConv2d, norm: nn.BatchNorm2d | None, backend: str) -> FusedConv2d:
    constant = next(conv.parameters(), None)
    if constant is not None and backend != "auto":
        BACKENDS.choose(backend, conv.spec, constant.dtype, constant.device, torch.contiguous_format)
    if norm is None:
        return FusedConv2d(conv.spec, list(conv.weights), conv.bias, backend).eval()
    return FusedConv2d(*fold_batch_norm(conv.spec, list(conv.weights), conv.bias, norm), backend).eval()


def _following_norms(model: nn.Module) -> dict[nn.Module, nn.BatchNorm2d]:
    """Convolution -> the norm that can be folded into it; empty for a model that cannot be traced."""
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
            and not any(m._forward_hooks or m._forward_pre_hooks for m in (conv, norm))
            and not any(name == path or name.startswith(f"{path}.") for name in read)
            and uses[id(conv)] == uses[id(norm)] == 1
        ):
            found[conv] = norm
    return found
