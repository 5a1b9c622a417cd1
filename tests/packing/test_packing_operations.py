"""pack with every operation it supports, for images of any size or of one; unpack and dense_twin."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import masked
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d, fuse, load, save, swap
from dsp_kernels.errors import DSPFormatError, DSPShapeError
from dsp_kernels.graph.size_check import FixedSizeConv2d
from dsp_kernels.program.steps import TorchStep
from dsp_pruning import pack
from dsp_pruning.export import export_onnx, export_pt2
from dsp_pruning.packing.twin import dense_twin
from dsp_pruning.packing.unpack import unpack

WIDTH = 12


class Frozen(nn.Module):
    """torchvision's FrozenBatchNorm2d: statistics and weights are buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b, rv, rm = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        scale = w * (rv + 1e-5).rsqrt()
        return x * scale + (b - rm * scale)


class Net(nn.Module):
    """stem - norm - relu, then an operation given as a function, then a 1x1 or a padded 3x3 reader."""

    def __init__(self, middle: Callable[..., Tensor], kernel: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.other = nn.Conv2d(3, WIDTH, 1)
        self.gate = nn.Conv2d(WIDTH, WIDTH, 1)
        self.squeeze = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, WIDTH), nn.Sigmoid())
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.wide = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, groups=WIDTH, bias=False)
        self.grouped = nn.Conv2d(WIDTH, 8, 3, padding=1, groups=4)
        self.same = nn.Conv2d(WIDTH, WIDTH, 2, padding="same")
        self.reflect = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(WIDTH, 5, 2, stride=2)
        self.instance = nn.InstanceNorm2d(WIDTH, affine=True)
        self.layer = nn.GroupNorm(3, WIDTH)
        self.single = nn.GroupNorm(WIDTH, WIDTH)
        self.response = nn.LocalResponseNorm(3)
        self.prelu = nn.PReLU()
        self.shuffle = nn.ChannelShuffle(3)
        self.scale = nn.Parameter(torch.rand(1, WIDTH, 1, 1))
        self.gamma, self.beta = (nn.Parameter(torch.rand(WIDTH, 1, 1) - 0.5) for _ in range(2))
        self.slopes, self.slope = nn.PReLU(WIDTH), nn.Parameter(torch.rand(WIDTH) - 0.5)
        self.frozen, self.act_norm = Frozen(WIDTH), nn.BatchNorm2d(WIDTH)
        self.register_buffer("order", torch.tensor([7, 0, 5, 1, 11, 3, 9, 2]))
        self.up_grouped = nn.ConvTranspose2d(WIDTH, 8, 2, stride=2, groups=4)
        self.middle = middle
        self.reader = nn.LazyConv2d(6, kernel, padding=kernel // 2)
        self.classifier = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.stem(x)))
        takes_image = self.middle.__code__.co_argcount == 3
        y = self.middle(self, y, x) if takes_image else self.middle(self, y)
        return self.classifier(F.relu(self.reader(y)).mean((2, 3)))


def shuffle(x: Tensor) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, 3, channels // 3, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


def stochastic_depth(x: Tensor, p: float, mode: str, training: bool) -> Tensor:
    """torchvision's, where it is installed; it does nothing in eval mode."""
    torchvision = pytest.importorskip("torchvision")
    return torchvision.ops.stochastic_depth(x, p, mode, training)


def squeeze_excite(m: nn.Module, y: Tensor) -> Tensor:
    batch, channels, _, _ = y.size()
    gate = m.squeeze(F.adaptive_avg_pool2d(y, 1).view(batch, channels)).view(batch, channels, 1, 1)
    return y * gate.expand_as(y)


def by_function(norm: nn.Module, y: Tensor) -> Tensor:
    """As timm's BatchNormAct2d; the norm may also be plain buffers."""
    return F.relu(
        F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, 1e-3)
    )


def padded_like(y: Tensor, x: Tensor) -> Tensor:
    """As U-Nets do before they concatenate."""
    down, right = (x.size(axis) - y.size(axis) for axis in (2, 3))
    return F.pad(y, [right // 2, right - right // 2, down // 2, down - down // 2])


def product_of_halves(m: nn.Module, y: Tensor) -> Tensor:
    left, right = y.chunk(2, 1)
    return left * right


# Operations with one parameter per channel, or that renumber channels.
OF_CHANNELS: dict[str, Callable[..., Tensor]] = {
    "prelu, slopes": lambda m, y: m.slopes(y - 0.5),
    "prelu by function": lambda m, y: F.prelu(y - 0.5, m.slope),
    "scale by a parameter": lambda m, y: y * m.scale,
    "scale and shift": lambda m, y: m.beta - y * m.gamma,
    "scale, reshaped": lambda m, y: y * m.slope[None, :, None, None].exp(),
    "norm by function": lambda m, y: by_function(m.act_norm, y),
    "norm by function, buffers": lambda m, y: by_function(m.frozen, y),
    "frozen norm": lambda m, y: F.relu(m.frozen(y)),
    "flipped channels": lambda m, y: y.flip(1),
    "flipped rows": lambda m, y: torch.flip(y, (2,)),
    "pixel unshuffle": lambda m, y: F.pixel_unshuffle(y[:, :, :12, :12], 2),
}
# Operations by which of the dead channels before them are removed.
BY_REMOVED: dict[str, dict[str, Callable[..., Tensor]]] = {
    "all": {
        "nothing": lambda m, y: y,
        "concat": lambda m, y, x: torch.cat([y, m.other(x), y], 1),
        "squeeze-excite": lambda m, y: y * torch.sigmoid(m.gate(y.mean((2, 3), keepdim=True))),
        "squeeze-excite, hard": lambda m, y: F.hardsigmoid(m.gate(F.adaptive_avg_pool2d(y, 1))).mul(y),
        # Gates of linear layers shrink with what they scale.
        "gate, view and expand_as": squeeze_excite,
        "gate, new axes": lambda m, y: y * m.squeeze(y.mean((2, 3)))[:, :, None, None],
        "gate, unsqueeze": lambda m, y: y * m.squeeze(y.flatten(2).mean(2)).unsqueeze(-1).unsqueeze(-1),
        "gate, amax": lambda m, y: y * m.squeeze(y.amax((2, 3))).reshape(y.size(0), -1, 1, 1),
        "gate, squeeze": lambda m, y: (
            y * m.squeeze(F.adaptive_max_pool2d(y, 1).squeeze(-1).squeeze(-1))[..., None, None]
        ),
        "sigmoid": lambda m, y: torch.sigmoid(y),
        "gelu, tanh, scalars": lambda m, y: 1 - F.gelu(torch.tanh(y) * 3 + 0.5) / 2,
        "prelu": lambda m, y: m.prelu(y - 1),
        "subtract the mean": lambda m, y: y - y.mean((2, 3), keepdim=True),
        "reflect padding": lambda m, y: m.reflect(y),
        "stochastic depth": lambda m, y: y + stochastic_depth(y, 0.2, "row", m.training),
        "dropouts": lambda m, y: F.dropout2d(F.dropout(y, 0.5, m.training), training=m.training),
        "max pool": lambda m, y: F.max_pool2d(y - 2, 3, 2, 1, ceil_mode=True),
        "average pool, padding not counted": lambda m, y: F.avg_pool2d(
            y, 3, 2, 1, ceil_mode=True, count_include_pad=False
        ),
        "average pool, ceil": lambda m, y: F.avg_pool2d(y, 3, 2, ceil_mode=True),
        "adaptive pool": lambda m, y: F.adaptive_avg_pool2d(y, (3, 5)),
        "pad, reflected": lambda m, y: F.pad(y, (1, 1, 2, 2), mode="reflect"),
        "interpolate": lambda m, y: F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False),
        # After an ellipsis these are columns, of which there are as many as channels.
        "cut columns": lambda m, y: y[..., 1:-1],
        "first columns": lambda m, y: y[:, ..., :8],
        "crop": lambda m, y: y[:, :, 1:-1, 1:],
        "strided": lambda m, y: y[..., ::2, 1::2],
        "one position": lambda m, y: y[:, :, 0, 0][:, :, None, None],
        **OF_CHANNELS,
        "repeated": lambda m, y: y.mean((2, 3), keepdim=True).expand(-1, -1, 3, 4),
        "interpolate like another": lambda m, y, x: F.interpolate(F.max_pool2d(y, 2), size=x.shape[2:]),
        "features as a map": lambda m, y: m.squeeze(y.mean((2, 3))).view(-1, WIDTH // 4, 2, 2),
        "tanh": lambda m, y: torch.tanh(y),
        "flattened": lambda m, y: y.flatten(2).view(y.size(0), y.size(1), y.size(2), y.size(3)),
    },
    "some": {
        "depthwise": lambda m, y: m.depthwise(y),
        "depthwise, two per channel": lambda m, y: F.relu(m.wide(y)),
        "same padding": lambda m, y: m.same(y),
        "transposed": lambda m, y: m.up(y),
        "transposed, grouped": lambda m, y: m.up_grouped(y),
        "pixel shuffle": lambda m, y: F.pixel_shuffle(y, 2),
        "index_select": lambda m, y: y.index_select(1, m.order),
        "index": lambda m, y: F.relu(y[:, m.order]),
        "instance norm": lambda m, y: F.relu(m.instance(y)),
        "group norm of single channels": lambda m, y: F.relu(m.single(y)),
        "average pool": lambda m, y: F.avg_pool2d(y, 3, 2, 1),
        "pad": lambda m, y: F.pad(y, (1, 2, 0, 1)),
        "pad like another": lambda m, y, x: padded_like(F.max_pool2d(y, 3, 2), x),
        "chunk": product_of_halves,
        "shuffle": lambda m, y: shuffle(y),
        "shuffle, module": lambda m, y: m.shuffle(y),
        "residual": lambda m, y, x: F.relu(y + m.other(x)),
        "twice": lambda m, y: m.gate(F.relu(m.gate(y))),
    },
    "none": {
        "grouped": lambda m, y: m.grouped(y),
        "group norm": lambda m, y: m.layer(y),
        "layer norm over channels": lambda m, y: F.layer_norm(y.permute(0, 2, 3, 1), (WIDTH,)).permute(
            0, 3, 1, 2
        ),
        "local response norm": lambda m, y: m.response(y),
        "split by numbers": lambda m, y: torch.cat(torch.split(y, [4, 8], 1)[::-1], 1),
        "slice": lambda m, y: y[:, 3:],
        "slice after an ellipsis": lambda m, y: y[..., 3:, :, :],
        "softmax": lambda m, y: y.softmax(1),
        "max with indices": lambda m, y: torch.max(y, 3, keepdim=True)[0],
        "permute": lambda m, y: y.permute(0, 1, 3, 2).permute(0, 1, 3, 2),
    },
}
OPERATIONS = {name: made for operations in BY_REMOVED.values() for name, made in operations.items()}
DEAD = (1, 2, 5, 9)


def net(name: str, kernel: int, seed: int, constant: float | None = None) -> nn.Module:
    """Random; four filters of the stem are pruned, and their norm makes them 0, 0 and two constants."""
    torch.manual_seed(seed)
    model = Net(OPERATIONS[name], kernel).eval()
    model(torch.zeros(1, 3, 12, 12))  # gives the reader its width
    model.double()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.5, 0.5)
        model.norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(model.norm.bias, -0.5, 0.5)
        model.stem.weight[list(DEAD)] = 0
        model.norm.weight[[1, 2]] = 0
        model.norm.bias[[1, 2]] = 0
        model.norm.bias[[5, 9]] = 2.0 if constant is None else constant
        if constant == 0:
            model.norm.weight[[5, 9]] = 0
        model.instance.bias[[1, 2]] = 0
        nn.init.uniform_(model.single.bias, -0.5, 0.5)
        model.single.bias[[1, 2]] = 0
        model.gate.weight[3:5] = 0
        model.other.weight[[1, 5]] = 0
        model.other.bias[1] = 0
        mask = (torch.rand(6, model.reader.in_channels) < 0.7)[:, :, None, None].double()
        model.reader.weight.mul_(mask)
    model.reader.register_buffer("mask", mask)
    return model


def images(batch: int, size: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


def test_a_convolution_called_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.reader = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.reader(input=torch.relu(self.first(input=x))).mean((2, 3))

    model = Named().double().eval()
    with torch.no_grad():
        model.reader.weight[:4, :4] = model.reader.weight[4:, 4:] = 0
    packed, x = pack(model, images(2)), images(2)
    assert isinstance(packed.reader, PackedConv2d)
    for other in (packed, fuse(packed, x), swap(copy.deepcopy(packed))):
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kernel", "fixed_size"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_outputs_are_those_of_the_masked_network(name: str, kernel: int, fixed_size: bool) -> None:
    model = net(name, kernel, seed=kernel)
    expected, packed = masked(model), pack(model, images(2), fixed_size=fixed_size)
    for size in (12,) if name == "permute" or fixed_size else (12, 17):
        x = images(3, size, kernel)
        torch.testing.assert_close(packed(x), expected(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(unpack(packed)(x), expected(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("removed", "name"), [(key, name) for key in BY_REMOVED for name in BY_REMOVED[key]])
def test_dead_channels_are_removed_where_possible(name: str, removed: str) -> None:
    """Zero channels are all removed, unless the operation keeps its channels: then the report names it."""
    model = net(name, 1, 0, constant=0.0)
    packed = pack(model, images(2))
    stem = packed.stem
    left = stem.out_channels
    assert left in {"all": {WIDTH - 4}, "some": set(range(WIDTH + 1)), "none": {WIDTH}}[removed], left
    barriers = [barrier for barrier in packed.packing.barriers if barrier.kept]
    assert bool(barriers) == (removed == "none" and name != "grouped"), barriers
    assert packed.norm.num_features == left
    over_channels = name in ("group norm", "local response norm")
    assert ("normalises over several channels together" in str(packed.packing)) == over_channels


PLAIN = ("flipped rows", "pixel unshuffle")
OTHER_ENTRIES = (
    *("index_select", "index", "transposed", "transposed, grouped", "pixel shuffle", "interpolate"),
    *("interpolate like another", "pad like another", "features as a map", "instance norm", "group norm"),
    *("group norm of single channels", "tanh"),
)


@pytest.mark.parametrize("name", [*OF_CHANNELS, *OTHER_ENTRIES])
def test_operations_on_channels_run_natively_in_files_and_in_onnx(tmp_path: Path, name: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, x = net(name, 1, 3).float(), images(2).float()
    packed = pack(model, x)
    assert not packed.packing.unsaved
    save(packed, tmp_path / "net", x)
    assert torch.equal(load(tmp_path / "net")(x), packed(x))
    fused = fuse(packed, x)
    torch.testing.assert_close(fused(x), packed(x), rtol=1e-4, atol=1e-4)
    plain = [step.describe() for step in fused.program.steps if isinstance(step, TorchStep)]
    assert bool(plain) == (name in PLAIN), plain
    export_onnx(packed, tmp_path / "net.onnx", x)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    (answer,) = session.run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), packed(x), rtol=1e-4, atol=1e-4)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name.endswith("weight")}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_loaded_network_has_a_twin_of_the_widths_before_packing(tmp_path: Path, name: str) -> None:
    model, x = net(name, 3, 1), images(2)
    try:
        save(pack(model, x), tmp_path / "net", x)
    except DSPFormatError:
        pytest.skip("a file cannot hold this operation")
    twin = dense_twin(pack(load(tmp_path / "net"), x))  # packed twice: the first widths count
    assert not any(isinstance(module, PackedConv2d) for module in twin.modules())
    original = shapes(model)
    assert all(shape == original[path] for path, shape in shapes(twin).items())
    assert twin(x).isfinite().all()


def test_a_network_that_pack_did_not_make_has_a_twin_of_its_present_widths() -> None:
    structure = GroupStructure.build(3, 6, [([0, 2], [0, 1, 4]), ([1], [2, 3])])
    packed = nn.Sequential(PackedConv2d(structure, 3, padding=1, bias=True), nn.ReLU())
    twin = dense_twin(packed)
    assert shapes(twin) == {"0.weight": (6, 3, 3, 3)}
    assert twin(torch.zeros(1, 3, 8, 8)).shape == (1, 6, 8, 8)


@pytest.mark.parametrize(
    ("widths", "words"),
    [
        ({"elsewhere": (3, 6, 1)}, "not in the network: 'elsewhere'"),
        ({"0": (3, 7, 2)}, "layer '0'"),
        ({"0": (2**20, 2**20, 1)}, "more than 1073741824 parameters"),
    ],
)
def test_widths_that_do_not_fit_are_refused(widths: dict[str, tuple[int, int, int]], words: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 1))
    network.dense_widths = widths
    with pytest.raises(DSPFormatError, match=words):
        dense_twin(network)


def padded() -> tuple[nn.Module, nn.Module, Tensor]:
    """A net with two zero channels and two constants in front of a zero-padded 3x3; masked; images."""
    model = net("nothing", 3, 0)
    return model, masked(model), images(3, 12)


def test_constants_before_zero_padding_are_folded_only_on_request() -> None:
    model, _, x = padded()
    plain, fixed = pack(model, x), pack(model, x, fixed_size=True)
    assert not any(isinstance(module, FixedSizeConv2d) for module in plain.modules())
    assert plain.stem.out_channels == WIDTH - 2
    assert fixed.stem.out_channels == WIDTH - 4
    assert isinstance(fixed.reader, FixedSizeConv2d)
    assert fixed.packing.layers["reader"].folded == (5, 9)
    border, middle = fixed.reader.position_bias[:, 0, 0], fixed.reader.position_bias[:, 5, 5]
    assert (border - middle).abs().max() > 0.01  # one bias per channel would be wrong


def test_all_forms_of_a_network_for_one_size_refuse_others(tmp_path: Path) -> None:
    model, dense, x = padded()
    packed = pack(model, x, fixed_size=True)
    save(packed, tmp_path / "net", x)
    loaded = load(tmp_path / "net")
    forms = (packed, loaded, fuse(packed, x), fuse(loaded, x), copy.deepcopy(packed), unpack(packed))
    assert torch.equal(loaded(x), packed(x))
    assert loaded.example_shape == (1, 3, 12, 12)
    assert shapes(dense_twin(loaded))["reader.conv.weight"] == model.reader.weight.shape
    for form in forms:
        torch.testing.assert_close(form(x), dense(x), rtol=0, atol=1e-12)
        for height, width in ((11, 12), (12, 13), (24, 24)):
            with pytest.raises(DSPShapeError, match="right only for"):
                form(torch.zeros(1, 3, height, width, dtype=x.dtype))
    save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()


@pytest.mark.parametrize(("stride", "dilation", "kernel"), [(2, 1, 3), (1, 2, 3), (2, 1, 5), (3, 2, 3)])
def test_constants_before_strides_and_dilations(stride: int, dilation: int, kernel: int) -> None:
    """With stride 2, images of 11 and of 12 give outputs of one size, but other borders."""
    model, _, x = padded()
    conv = nn.Conv2d(WIDTH, 6, kernel, stride, kernel // 2, dilation).double()
    conv.register_buffer("mask", (torch.rand(6, WIDTH) < 0.7)[:, :, None, None].double())
    model.reader = conv
    packed = pack(model, x, fixed_size=True)
    assert packed.stem.out_channels == WIDTH - 4
    torch.testing.assert_close(packed(x), masked(model)(x), rtol=0, atol=1e-12)
    with pytest.raises(DSPShapeError, match="height == 12"):
        packed(images(3, 11))


def test_a_network_for_one_size_trains_exports_and_packs_again(tmp_path: Path) -> None:
    model, dense, x = padded()
    packed = pack(model, x, fixed_size=True)
    export_pt2(packed, tmp_path / "net.pt2", x)
    torch.testing.assert_close(torch.export.load(tmp_path / "net.pt2").module()(x), dense(x))
    torch.testing.assert_close(pack(packed, x)(x), dense(x), rtol=0, atol=1e-12)  # a packed network again
    packed.train()(x).square().sum().backward()
    assert packed.reader.position_bias.grad is not None
    assert "reader.position_bias" in packed.state_dict()
