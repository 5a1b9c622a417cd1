"""swap(model): the packed convolutions of any model become fused ones, in place."""

from collections import Counter
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import fx, nn

from dsp_kernels.errors import DSPError
from dsp_kernels.graph.network import call_graph
from dsp_kernels.graph.operations.pointwise import BATCH_NORM_ARGUMENTS
from dsp_kernels.op.dense import Conv, Norm, batch_norm_affine, fold_affine
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.run.convs import BACKENDS


def swap(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Replace every PackedConv2d in ``model`` by a FusedConv2d, in place, and return the model.

    The batch norm after a packed convolution is folded in and replaced by an identity if nothing else reads
    the convolution, both run once in forward(), neither has hooks and the norm is in eval mode. So is one
    that a module calls as a function (timm): the module is replaced by the rest of its forward(). A method
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
    norms, replaced = _following_norms(model)
    packed = [module for module in model.modules() if isinstance(module, PackedConv2d)]
    made: dict[nn.Module, nn.Module] = {conv: _fused(conv, norms.get(conv), backend) for conv in packed}
    made |= replaced
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    return model


def _fused(conv: PackedConv2d, norm: nn.BatchNorm2d | Norm | None, backend: str) -> FusedConv2d:
    constant = next(conv.parameters(), None)
    if constant is not None and backend != "auto":
        BACKENDS.choose(backend, conv.spec, constant.dtype, constant.device, torch.contiguous_format)
    layer: Conv = conv.spec, tuple(conv.weights), conv.bias
    if norm is not None:
        assert norm.running_var is not None
        dtype = norm.running_var.dtype if constant is None else constant.dtype
        layer = fold_affine(layer, *batch_norm_affine(norm), dtype)
    return FusedConv2d(*layer, backend).eval()


_Norms = dict[nn.Module, nn.BatchNorm2d | Norm]


def _following_norms(model: nn.Module) -> tuple[_Norms, dict[nn.Module, nn.Module]]:
    """Convolution -> the norm that can be folded into it; module of a norm -> what remains of it.

    Both are empty for a model that cannot be traced.
    """
    norms: _Norms = {}
    remaining: dict[nn.Module, nn.Module] = {}
    graph = call_graph(model)
    if graph is None:
        return norms, remaining
    called = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    uses = Counter(id(module) for module in called.values())
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for node, conv in called.items():
        once = len(node.users) == uses[id(conv)] == 1
        if not isinstance(conv, PackedConv2d) or not once or _has_hooks(conv):
            continue
        reader = next(iter(node.users))
        norm, path = called.get(reader), str(reader.target)
        if reader.target is F.batch_norm:
            found = _norm_by_function(model, reader)
            if found is not None:
                norms[conv], owner, rest = found
                remaining[owner] = rest
        elif (
            isinstance(norm, nn.BatchNorm2d)
            and type(norm).forward is nn.BatchNorm2d.forward
            and norm.running_mean is not None
            and not norm.training
            and not _has_hooks(norm)
            and not any(name == path or name.startswith(f"{path}.") for name in read)
            and uses[id(norm)] == 1
        ):
            norms[conv], remaining[norm] = norm, nn.Identity()
    return norms, remaining


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _norm_by_function(model: nn.Module, call: fx.Node) -> tuple[Norm, nn.Module, nn.Module] | None:
    """The norm of a call of F.batch_norm, the module whose forward() begins with it, and the rest of that."""
    given = dict(zip(BATCH_NORM_ARGUMENTS, call.args, strict=False)) | call.kwargs
    nodes = [given.get(name) for name in BATCH_NORM_ARGUMENTS[1:5]]
    held = [node for node in nodes if isinstance(node, fx.Node)]
    owners = {str(node.target).rpartition(".")[0] for node in held}
    if given.get("training", False) is not False or nodes[0] is None or len(owners) != 1:
        return None
    if any(node.op != "get_attr" or len(node.users) != 1 for node in held):
        return None
    path = owners.pop()
    owner = model.get_submodule(path)
    # Its own forward() makes the call, not that of a module around it, which would read its tensors again.
    calls_itself = next(reversed(call.meta.get("nn_module_stack", {})), "") == path
    if not calls_itself or owner is model or owner.training or _has_hooks(owner):
        return None
    graph = call_graph(owner)
    if graph is None:
        return None
    x, *others = graph.nodes
    norms = [node for node in others if node.target is F.batch_norm]
    if len(norms) != 1 or list(x.users) != norms or norms[0].args[:1] != (x,):
        return None
    norms[0].replace_all_uses_with(x)
    graph.erase_node(norms[0])
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    values = (attrgetter(str(node.target))(model) if isinstance(node, fx.Node) else None for node in nodes)
    return Norm._make((*values, given.get("eps", 1e-5))), owner, fx.GraphModule(owner, graph).eval()
