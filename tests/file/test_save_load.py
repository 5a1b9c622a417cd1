"""save and load: networks come back as they were, and what a file cannot hold is named."""

import copy
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_pruning import pack


def assert_same(left: nn.Module, right: nn.Module) -> None:
    """Equal answers in both modes, equal statistics after a training step, to the last bit."""
    x = nets.example(3).to(next(left.parameters()).dtype)
    for training in (False, True):
        answers = []
        for model in (left.train(training), right.train(training)):
            torch.manual_seed(3)
            answer = model(x)
            answers.append(answer if isinstance(answer, dict) else {"": answer})
        assert answers[0].keys() == answers[1].keys()
        for name in answers[0]:
            assert torch.equal(answers[0][name], answers[1][name]), (training, name)
    expected = left.state_dict()
    assert list(expected) == list(right.state_dict())
    for name, tensor in right.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert dict(left.named_parameters()).keys() == dict(right.named_parameters()).keys()


def made(name: str) -> nn.Module:
    return nets.wild() if name == "wild" else nets.make(name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in (*nets.NAMES, "wild")),
        *(("residual", dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_any_network_comes_back_as_it_was(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model, path = made(name).to(dtype), tmp_path / "net"
    model.dense_widths = {next(path for path, _ in model.named_modules() if path): (3, 9, 1)}
    dsp_kernels.save(model, path, nets.IMAGE)
    loaded = dsp_kernels.load(path)
    assert not loaded.training
    assert loaded.example_shape == (1, 3, 8, 8)
    dsp_kernels.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    copied = copy.deepcopy(loaded)
    assert copied.dense_widths == model.dense_widths
    assert_same(loaded, model)
    assert_same(copied, made(name).to(dtype))


def test_copies_keep_hooks_and_attributes(tmp_path: Path) -> None:
    dsp_kernels.save(nets.make("residual"), tmp_path / "net", nets.IMAGE)
    loaded, seen = dsp_kernels.load(tmp_path / "net"), []
    loaded.note = "mine"
    loaded.register_forward_pre_hook(lambda *_: seen.append(1))
    copied = copy.deepcopy(loaded)
    copied(nets.example(3))
    assert (copied.note, seen) == ("mine", [1])


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    path, model = tmp_path / "net", nets.make("residual")
    if there:
        dsp_kernels.save(model, path, nets.IMAGE)
    before = path.read_bytes() if there else b""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            dsp_kernels.save(model, path, nets.IMAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before] * there


@pytest.mark.parametrize("name", ["residual", "branching"])
def test_a_loaded_network_is_an_ordinary_module(tmp_path: Path, name: str) -> None:
    model = nets.make(name)
    dsp_kernels.save(model, tmp_path / "net", nets.IMAGE)
    loaded = dsp_kernels.load(tmp_path / "net")
    expected = model(nets.example(3))
    fused = dsp_kernels.fuse(loaded, nets.IMAGE)
    torch.testing.assert_close(fused(nets.example(3)), expected)
    compiled = torch.compile(loaded, fullgraph=True, backend="eager")
    assert torch.equal(compiled(nets.example(3)), expected)
    exported = torch.export.export(loaded, (nets.example(3),)).module()
    assert torch.equal(exported(nets.example(3)), expected)
    loaded.train()(nets.example(3)).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    halved = copy.deepcopy(loaded).eval().to(torch.bfloat16)
    assert halved(nets.example(3).bfloat16()).dtype == torch.bfloat16


def test_swapped_networks_can_be_saved(tmp_path: Path) -> None:
    swapped = dsp_kernels.swap(nets.make("residual"))
    dsp_kernels.save(swapped, tmp_path / "net", nets.IMAGE)
    loaded = dsp_kernels.load(tmp_path / "net")
    assert any(isinstance(module, dsp_kernels.FusedConv2d) for module in loaded.modules())
    assert torch.equal(loaded(nets.example(3)), swapped(nets.example(3)))
    assert not any(parameter.requires_grad for parameter in loaded.packed.parameters())


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.aux = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(4, 2)
        self.aux.register_buffer("mask", torch.rand(2))  # pack does not reach this head

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x).mean((2, 3))
        return (self.head(y), self.aux(y)) if self.training else self.head(y)


def test_a_network_with_another_training_graph_is_for_evaluation(tmp_path: Path) -> None:
    model = Auxiliary().eval()
    dsp_kernels.save(model, tmp_path / "net")
    loaded = copy.deepcopy(dsp_kernels.load(tmp_path / "net"))
    assert torch.equal(loaded(nets.example(3)), model(nets.example(3)))
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(loaded.state_dict()["aux.mask"], model.aux.mask)
    with pytest.raises(DSPError, match="can only be evaluated"):
        loaded.train()
    dsp_kernels.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
        self.convs[1].weight = self.convs[0].weight
        self.norm = nn.BatchNorm2d(3)
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.convs[1](self.norm(self.convs[0](x))))


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    model = nets.settled(Tied())
    dsp_kernels.save(model, tmp_path / "net", nets.IMAGE)
    loaded = copy.deepcopy(dsp_kernels.load(tmp_path / "net"))
    assert torch.equal(loaded(nets.example(3)), model(nets.example(3)))
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert loaded.convs[1].weight is loaded.convs[0].weight
    assert loaded.convs[1].bias is not loaded.convs[0].bias
    assert loaded.again.running_mean is loaded.norm.running_mean
    assert loaded.again.weight is loaded.norm.weight
    for x in (model, loaded):
        x.train()(nets.example(3)).square().sum().backward()
    assert torch.equal(loaded.norm.running_var, model.norm.running_var)
    torch.testing.assert_close(loaded.convs[0].weight.grad, model.convs[0].weight.grad)


def _masked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    model[0].register_buffer("mask", torch.ones(3, 3, 1, 1))
    return model


REFUSED = {
    "masks": (_masked, "layer '0' carries mask, which no Conv2d has"),
    "function": (lambda: nets.ConvThen(torch.special.erf), "special_erf|erf"),
    "method": (lambda: nets.ConvThen(lambda x: x.cholesky()), "cholesky"),
    "attribute": (lambda: nets.ConvThen(lambda x: x.grad_fn), "reads an attribute"),
    "module": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Bilinear(1, 1, 1)), "Bilinear"),
    "constant": (lambda: nets.ConvThen(lambda x: x.to(torch.complex64)), "complex64"),
    "control flow": (nets.Undecided, "cannot be traced"),
    "two inputs": (lambda: nn.Bilinear(3, 3, 3), "takes 2 inputs, the example has 1"),
    "fused": (
        lambda: dsp_kernels.fuse(nets.make("pools"), nets.IMAGE),
        "holds no parameters: save the packed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_save_names_what_a_file_cannot_hold(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(DSPFormatError, match=message):
        dsp_kernels.save(make(), tmp_path / "net", nets.IMAGE)
    assert not list(tmp_path.iterdir())


def test_an_example_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DSPFormatError, match=r"does not run on an input of shape \(1, 4, 8, 8\)"):
        dsp_kernels.save(nets.wild(), tmp_path / "net", torch.zeros(1, 4, 8, 8))
    # Without an example: 8 x 8 is the only usual size that its linear layer takes.
    dsp_kernels.save(nets.make("pre-activation"), tmp_path / "net")
    assert dsp_kernels.load(tmp_path / "net").example_shape == (1, 3, 8, 8)


class _Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.along = nn.Conv2d(3, 4, 3), nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        gate = self.along(y.mean((2, 3)).unsqueeze(1)).sigmoid().squeeze(1)
        return y * gate[:, :, None, None]


class _Unpooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(self.conv(x)))


class _Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embedding = nn.Conv2d(3, 4, 3), nn.Embedding(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.embedding(torch.arange(y.shape[3])).t()[:, None]


OPERATIONS: dict[str, Callable[[], nn.Module]] = {
    "power": lambda: nets.ConvThen(lambda x: x**2),
    "matrix product": lambda: nets.ConvThen(lambda x: x.flatten(2).transpose(1, 2) @ x.flatten(2)),
    "choice": lambda: nets.ConvThen(lambda x: torch.where(x > 0, x, x.exp())),
    "normalise": lambda: nets.ConvThen(lambda x: nn.functional.normalize(x, dim=1)),  # passes out=None
    "one dimension": _Rows,
    "repeat": lambda: nets.ConvThen(lambda x: x.repeat(1, 2, 1, 1) + x.repeat_interleave(2, 1)),
    "einsum": lambda: nets.ConvThen(lambda x: torch.einsum("nchw,ndhw->ncd", x, x)),
    "positions": lambda: nets.ConvThen(
        lambda x: x + torch.linspace(0, 1, x.shape[3]) + torch.arange(x.shape[2])[:, None] + x.new_zeros(1)
    ),
    "counted mask": lambda: nets.ConvThen(lambda x: x + (~(x > 0)).cumsum(2, dtype=torch.float32)),
    "constants": lambda: nets.ConvThen(lambda x: x * torch.arange(4.0).view(4, 1, 1) + torch.tensor([2.0])),
    "deviation and unfold": lambda: nets.ConvThen(
        lambda x: nn.functional.unfold(x - x.std(1, keepdim=True), 2)
    ),
    "unpooling": _Unpooling,
    "embedding": _Positions,
    "hard shrink": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardshrink(0.3)),
    "circular padding": lambda: nn.Sequential(nn.CircularPad2d(1), nn.Conv2d(3, 4, 3)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_other_networks_are_known(tmp_path: Path, name: str) -> None:
    model = OPERATIONS[name]().eval()
    dsp_kernels.save(model, tmp_path / "net", nets.IMAGE)
    assert torch.equal(dsp_kernels.load(tmp_path / "net")(nets.example(3)), model(nets.example(3)))


def test_a_change_after_pack_is_saved(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.settings = nn.Conv2d(3, 4, 3), {"scale": 1.0}

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * self.settings["scale"]

    x = torch.randn(1, 3, 8, 8)
    packed = pack(Scaled().eval(), x)
    packed.settings["scale"] = 2.0
    dsp_kernels.save(packed, tmp_path / "net.safetensors", x)
    torch.testing.assert_close(dsp_kernels.load(tmp_path / "net.safetensors")(x), packed(x))
