"""swap: packed convolutions of any model become fused ones, in place, with the same answers."""

import copy

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels import FusedConv2d, PackedConv2d
from dsp_kernels.errors import DSPBackendError, DSPError, DSPShapeError


def swapped() -> tuple[nn.Module, nn.Module]:
    model = nets.make("residual").double()
    return dsp_kernels.swap(copy.deepcopy(model)), model


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_answers(batch: int, layout: torch.memory_format) -> None:
    fused, model = swapped()
    x = nets.example(batch, torch.float64).contiguous(memory_format=layout)
    torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-12)


WAYS = {
    "packed": lambda net, x: net,
    "swapped": lambda net, x: dsp_kernels.swap(net),
    "fused, eager": lambda net, x: dsp_kernels.fuse(net, x, backend="eager"),
    "fused": dsp_kernels.fuse,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("last", [nn.ReLU(), nn.Tanh()], ids=["native", "plain PyTorch"])
def test_maps_come_out_in_the_memory_format_of_the_input(way: str, last: nn.Module) -> None:
    net = nn.Sequential(PackedConv2d(nets.MIXED, 3, padding=1, bias=True), last).eval()
    x = torch.randn(2, 6, 5, 5)
    expected, run = net(x), WAYS[way](net, x)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = run(x.contiguous(memory_format=layout))
        assert y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


def test_it_replaces_in_place_and_folds_the_norm() -> None:
    model = nets.make("residual")
    assert dsp_kernels.swap(model) is model
    assert isinstance(model.packed, FusedConv2d)
    assert isinstance(model.packed_norm, nn.Identity)
    assert isinstance(model.strided_norm, nn.Identity)
    assert isinstance(model.norm, nn.BatchNorm2d)  # follows an ordinary convolution
    assert not any(isinstance(module, PackedConv2d) for module in model.modules())
    # Two channels are absent and hold the norm's shift: one more group, which reads nothing.
    assert model.packed.spec.structure.groups[-1].in_index == ()
    assert not model.packed.spec.structure.absent


class NormAct(nn.BatchNorm2d):
    """As timm's: a norm with a forward() of its own."""

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return F.relu(F.batch_norm(x, *statistics, self.weight, self.bias, self.training, 0.1, self.eps))


def test_a_norm_by_function_is_folded_and_torch_fx_traces_the_rest() -> None:
    model = nets.settled(nn.Sequential(PackedConv2d(nets.MIXED, 3, padding=1), NormAct(8))).double()
    x = torch.randn(2, model[0].in_channels, 8, 8, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    swapped = dsp_kernels.swap(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in swapped.modules())
    torch.testing.assert_close(swapped(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.fx.symbolic_trace(swapped)(x), expected, rtol=0, atol=1e-12)


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = PackedConv2d(nets.MIXED, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class ReadByHand(nn.Module):
    """The tensors of a norm whose own forward() never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = PackedConv2d(nets.MIXED, 3, padding=1)
        self.norm = NormAct(8)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(PackedConv2d(nets.MIXED, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > -1e9 else self.body[0](x)


def called_twice() -> nn.Module:
    conv = PackedConv2d(dsp_kernels.GroupStructure.build(4, 4, [([1, 2], [0, 3])]), 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(4), conv)


@pytest.mark.parametrize(
    ("model", "channels"),
    [(ReadTwice(), 6), (ReadByHand(), 6), (Untraceable(), 6), (called_twice(), 4)],
    ids=["read twice", "read by hand", "untraceable", "called twice"],
)
def test_a_norm_that_cannot_be_folded_stays(model: nn.Module, channels: int) -> None:
    model = nets.settled(model.double())
    x = torch.randn(2, channels, 8, 8, dtype=torch.float64)
    expected = model(x)
    dsp_kernels.swap(model)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert any(isinstance(module, FusedConv2d) for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_a_packed_conv_itself_is_returned_fused() -> None:
    conv = PackedConv2d(nets.MIXED, 3, padding=1, bias=True, dtype=torch.float64).eval()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(dsp_kernels.swap(conv)(x), conv(x), rtol=0, atol=1e-12)


def test_changed_weights_take_effect() -> None:
    fused, _ = swapped()
    x = nets.example(dtype=torch.float64)
    before = fused(x)
    with torch.no_grad():
        fused.packed.weights[0].mul_(2)
    assert not torch.equal(fused(x), before)
    state = fused.state_dict()
    other, _ = swapped()
    other(x)  # packs its weights
    other.load_state_dict(state)
    assert torch.equal(other(x), fused(x))
    torch.testing.assert_close(
        copy.deepcopy(other).float()(x.float()), fused(x).float(), rtol=1e-3, atol=1e-3
    )


def test_residual_and_gradient_go_through_the_op() -> None:
    conv = dsp_kernels.swap(PackedConv2d(nets.MIXED, 3, padding=1, bias=True).double().eval())
    fused = FusedConv2d(conv.spec.with_activation("relu"), list(conv.weights), conv.bias)
    x = torch.randn(1, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(1, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        planned = fused(x, residual)
    torch.testing.assert_close(fused(x, residual), planned)
    assert torch.autograd.gradcheck(fused, (x, residual))


def test_compiles_in_one_graph() -> None:
    fused, model = swapped()
    x = nets.example(4, torch.float64)
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True)(x)
    torch.testing.assert_close(compiled, model(x), rtol=0, atol=1e-12)


def test_a_swapped_network_can_be_fused() -> None:
    fused, model = swapped()
    network = dsp_kernels.fuse(fused, nets.example(dtype=torch.float64))
    torch.testing.assert_close(
        network(nets.example(3, torch.float64)), model(nets.example(3, torch.float64)), rtol=0, atol=1e-12
    )
    assert "plain PyTorch:" not in network.explain()


def test_what_is_refused() -> None:
    with pytest.raises(DSPError, match=r"call model\.eval\(\) first"):
        dsp_kernels.swap(nets.make("residual").train())
    fused, _ = swapped()
    with pytest.raises(DSPShapeError, match="expected \\(batch, 6"):
        fused.packed(torch.zeros(1, 7, 5, 5, dtype=torch.float64))
    with pytest.raises(DSPShapeError, match="must match"):
        fused.packed(torch.zeros(1, 6, 5, 5))
    with pytest.raises(DSPBackendError, match="'warp' is unknown"):
        dsp_kernels.swap(nets.make("residual"), backend="warp")


@pytest.mark.parametrize(
    "why",
    ["hook on the convolution", "hook on the norm", "norm in training mode", "function in training mode"],
)
def test_a_norm_with_hooks_or_in_training_mode_is_not_folded(why: str) -> None:
    model = nets.make("residual")
    seen: list[int] = []
    if "hook" in why:
        module = model.packed if "convolution" in why else model.packed_norm
        module.register_forward_hook(lambda *_: seen.append(1))
    else:
        model.packed_norm.train()
        model.packed_norm.__class__ = NormAct if "function" in why else nn.BatchNorm2d
    dsp_kernels.swap(model)
    assert isinstance(model.packed_norm, nn.BatchNorm2d)
    assert isinstance(model.strided_norm, nn.Identity)


def test_computes_in_its_weights_dtype_under_autocast() -> None:
    model = nets.make("residual")
    expected = model(nets.example())
    dsp_kernels.swap(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(nets.example())
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("setting", ["inference mode", "data"])
def test_weights_whose_changes_are_not_counted(setting: str) -> None:
    structure = dsp_kernels.GroupStructure.build(3, 4, [([0, 2], [3, 1])])
    with torch.inference_mode(setting == "inference mode"):
        fused = dsp_kernels.swap(PackedConv2d(structure, 1).eval())
        x = torch.randn(1, 3, 4, 4)
        fused(x)
        fused.weights[0].data.zero_()
        if setting == "data":
            fused.reset_plan()
        assert fused(x).abs().max() == 0
