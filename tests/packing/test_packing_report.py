"""The packing report, constants, modules that run twice, and unpack."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_packing_operations import images
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels import GroupStructure, PackedConv2d, load, save
from dsp_kernels.errors import DSPPruningError, DSPVerificationError
from dsp_pruning import pack
from dsp_pruning.packing.unpack import unpack


class Heads(nn.Module):
    """Two outputs, and an auxiliary head that runs in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 6, 1)
        self.second = nn.Conv2d(8, 6, 1)
        self.aux = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        x = F.relu(self.stem(x))
        y = F.relu(self.first(x))
        found: dict[str, Tensor | list[Tensor]] = {"sums": [self.second(x).sum(1), y.mean((2, 3)).sum(1)]}
        if self.training:
            found["aux"] = self.aux(y)
        return found


def heads() -> nn.Module:
    torch.manual_seed(0)
    model = Heads().double().eval()
    with torch.no_grad():
        for conv, dead in ((model.stem, [0, 3]), (model.first, [2])):
            conv.weight[dead] = 0
            conv.bias[dead] = 0
    return model


def test_maps_every_layer_to_its_original_channels() -> None:
    packed = pack(heads(), images(2))
    layers = packed.packing.layers
    assert layers["stem"].out_keep == (1, 2, 4, 5, 6, 7)
    assert layers["first"].in_keep == layers["second"].in_keep == layers["stem"].out_keep
    assert (layers["stem"].in_channels, layers["stem"].out_channels) == (3, 8)
    assert packed.packing.removed == 2
    model = heads()
    rows = list(layers["stem"].out_keep)
    assert torch.equal(packed.stem.weights[0], model.stem.weight[rows])


def test_a_head_that_runs_in_training_keeps_its_input() -> None:
    model = heads()
    packed = pack(model, images(2))
    got, expected = packed.train()(images(3)), model.train()(images(3))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert packed.first.out_channels == 6
    assert any("'aux', which runs in training only" in b.reason for b in packed.packing.barriers if b.kept)


@pytest.mark.parametrize(
    ("middle", "words"),
    [(nn.Softmax(1), "Softmax '1'"), (torch.jit.script(nn.ReLU()), r"scripted (torch.jit), which cannot be")],
)
def test_a_barrier_names_the_operation_and_counts_what_it_keeps(middle: nn.Module, words: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), middle, nn.Conv2d(8, 4, 1)).double().eval()
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias[:3] = 0
    packed = pack(model, images(2))
    (barrier,) = [barrier for barrier in packed.packing.barriers if barrier.kept]
    assert barrier.kept == 3
    assert words in barrier.reason
    assert words in str(packed.packing)
    assert packed[0].structure.absent == (0, 1, 2)


def test_constants_are_folded_where_no_zeros_are_padded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight[[0, 2]] = 0
        model[0].bias[[0, 2]] = torch.tensor([3.0, -3.0], dtype=torch.float64)
    packed = pack(model, images(2))
    assert packed.packing.layers["2"].folded == (0,)  # relu makes a zero of the other one
    assert packed[0].out_channels == 2
    torch.testing.assert_close(packed[2].bias, 3 * model[2].weight[:, 0].sum((1, 2)), rtol=0, atol=1e-12)
    torch.testing.assert_close(packed(images(3)), model(images(3)), rtol=0, atol=1e-12)


def test_constants_that_cancel_are_not_lost() -> None:
    """A filter that sums two constants to 0 with its bias is 0, though its kernels and bias are not."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)).double()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = 2
        model[1].weight.copy_(torch.tensor([[3.0, 0.0], [1.0, 1.0]])[:, :, None, None])
        model[1].bias.copy_(torch.tensor([-6.0, 1.0]))
    packed = pack(model.eval(), images(2))
    assert packed[1].out_channels == 1
    torch.testing.assert_close(packed(images(3)), model(images(3)), rtol=0, atol=1e-12)


def test_constants_made_of_constants() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)
            self.read_a, self.read_b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            return self.read_a(a) + self.read_b(self.b(a))

    torch.manual_seed(0)
    model = Chain().double().eval()
    with torch.no_grad():
        model.a.weight[0] = 0
        model.a.bias[0] = 2
        model.b.weight[0, 1] = 0
        model.b.bias[0] = 1
    packed = pack(model, images(2))
    assert packed.b.structure.groups[0].in_index == ()
    assert (packed.a.out_channels, packed.b.out_channels) == (2, 2)
    torch.testing.assert_close(packed(images(3)), model(images(3)), rtol=0, atol=1e-12)


def test_the_bias_of_an_absent_channel_stays_without_effect() -> None:
    conv = PackedConv2d(GroupStructure.build(3, 4, [((0, 2), (1, 3))]), 3, padding=1, bias=True)
    model = nn.Sequential(conv, nn.Softmax(1), nn.Conv2d(4, 2, 1)).double().eval()
    with torch.no_grad():
        conv.bias.fill_(5.0)
    for made in (pack(model, images(2)), unpack(pack(model, images(2)))):
        torch.testing.assert_close(made(images(3)), model(images(3)), rtol=0, atol=1e-12)


class Twice(nn.Module):
    """One convolution runs on two tensors, once under a second name."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.shared = nn.Conv2d(6, 5, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(5)
        self.alias = self.shared
        self.head = nn.Conv2d(10, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        return self.head(torch.cat([F.relu(self.norm(self.shared(a))), F.relu(self.norm(self.alias(b)))], 1))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_module_that_runs_twice_loses_what_no_run_needs(seed: int, kernel: int) -> None:
    torch.manual_seed(seed)
    model = Twice(kernel).double().eval()
    with torch.no_grad():
        for conv, dead in ((model.a, [0, 1, 2]), (model.b, [1, 2, 4])):
            conv.weight[dead] = 0
            conv.bias[dead] = 0
        model.a.bias[2] = 1.0  # a constant in one run only
        model.norm.running_mean.normal_()
        model.norm.bias.normal_()
        model.shared.weight[[0, 3]] = 0
        model.shared.weight[4] = 0  # what this filter makes is 0 in the run where it reads 1, by its bias
        model.shared.weight[4, 2] = 1 / kernel**2
        model.shared.bias[4] = -1
        model.norm.bias[4] = 5
        model.head.weight[:, [1, 6]] = 0
    packed = pack(model, images(2))
    assert packed.shared is packed.alias
    assert packed.shared.in_channels == 5  # only channel 1 is zero in both runs
    assert packed.shared.out_channels <= 4
    torch.testing.assert_close(packed(images(3)), model(images(3)), rtol=0, atol=1e-12)
    back = unpack(packed)
    assert back.shared is back.alias
    torch.testing.assert_close(back(images(3)), model(images(3)), rtol=0, atol=1e-12)


def gated(seed: int = 0) -> nn.Module:
    """A gate and a depthwise convolution, traced without sizes in the code."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
            self.gate = nn.Conv2d(8, 8, 1)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.depthwise(F.relu(self.norm(self.stem(x))))
            return self.head(x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))).mean((2, 3))

    torch.manual_seed(seed)
    model = Gated().double().eval()
    mask = torch.ones(8, 3, 1, 1, dtype=torch.float64)
    mask[[1, 6]] = 0
    mask[2:5, 0] = 0
    model.stem.register_buffer("mask", mask)
    with torch.no_grad():
        model.stem.weight.mul_(mask)
        model.norm.weight[[1, 6]] = 0
        model.norm.bias[[1, 6]] = 0
    return model


def test_is_an_ordinary_module() -> None:
    model = gated()
    x = images(2)
    packed = pack(model, x)
    assert (packed.depthwise.groups, packed.depthwise.in_channels, packed.gate.out_channels) == (6, 6, 6)
    expected = packed(x)
    again = copy.deepcopy(packed)
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(x), expected)
    torch.testing.assert_close(packed(x.to(memory_format=torch.channels_last)), expected)
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(dsp_kernels.fuse(packed, x)(x), expected)
    assert pickle.loads(pickle.dumps(packed.packing)) == packed.packing


def test_unpack_gives_masks_and_widths_back() -> None:
    model = gated()
    dense = unpack(pack(model, images(2)))
    assert not [module for module in dense.modules() if isinstance(module, PackedConv2d)]
    assert torch.equal(dense.stem.mask, model.stem.mask)
    assert dense.depthwise.groups == 8
    assert dense.stem.weight.shape == model.stem.weight.shape
    repacked = pack(dense, images(2))
    assert repacked.stem.structure == pack(model, images(2)).stem.structure
    with pytest.raises(DSPPruningError, match="Conv2d carries no PackingReport"):
        unpack(nn.Conv2d(3, 3, 1))


def test_a_depthwise_convolution_with_one_channel_left_is_unpacked() -> None:
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 4, 1)
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        model[0].weight[1:] = 0
    packed = pack(model, images(2))
    assert (packed[1].groups, unpack(packed)[1].groups) == (1, 8)
    torch.testing.assert_close(unpack(packed)(images(3)), model(images(3)), rtol=0, atol=1e-12)


def test_pack_and_save_trace_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In eval and in training mode; a changed network is traced again."""
    traces, trace = [], torch.fx.Tracer.trace
    monkeypatch.setattr(torch.fx.Tracer, "trace", lambda *a, **k: traces.append(1) or trace(*a, **k))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(), nn.Conv2d(8, 4, 1)).double().eval()
    packed = pack(model, images(1))
    save(packed, tmp_path / "net", images(1))
    assert len(traces) == 2
    packed[1] = nn.Sigmoid()
    save(packed, tmp_path / "net", images(1))
    assert torch.equal(load(tmp_path / "net")(images(1)), packed(images(1)))


def test_random_answers_are_named() -> None:
    class Random(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x))

    with pytest.raises(DSPVerificationError, match="differ from call to call"):
        pack(Random(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).double().eval(), images(1))
