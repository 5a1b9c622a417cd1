"""Version 2 of the file: any network, written as its graph; descriptions that are hostile or wrong."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.graph_modules import Budget

IMAGE = torch.zeros(1, 3, 8, 8)


def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Wild(nn.Module):
    """Constructs of torchvision's networks: flags that follow the mode, shuffles, gates, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict({"block-0": nn.Conv2d(3, 8, 3, padding=1), "norm": nn.GroupNorm(2, 8)})
        )
        structure = GroupStructure.build(8, 8, [([0, 5, 2], [1, 7, 4]), ([1], [0])])
        self.packed = PackedConv2d(structure, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("shift", torch.rand(8))
        self.gate = nn.Conv2d(8, 8, 1)
        self.unused = nn.Linear(3, 2)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        batch, channels, height, width = x.shape
        shuffled = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
        left, right = shuffled.chunk(2, dim=1)
        y = self.packed(torch.cat((right, left), 1)) * self.scale + self.shift[None, :, None, None]
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y = F.dropout(F.gelu(y), 0.5, self.training)
        y = F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return {"logits": self.classifier(y[:, :, ::2].flatten(2).mean(-1)), "map": y}


def wild() -> nn.Module:
    torch.manual_seed(5)
    return nets.settled(Wild())


def assert_same(left: nn.Module, right: nn.Module) -> None:
    """Equal answers in both modes, equal statistics after a training step, to the last bit."""
    for training in (False, True):
        left.train(training)
        right.train(training)
        answers = []
        for model in (left, right):
            torch.manual_seed(3)
            answer = model(images())
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
    return wild() if name == "wild" else nets.make(name)


@pytest.mark.parametrize("name", [*nets.NAMES, "wild"])
def test_any_network_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    model, path = made(name), tmp_path / "net"
    dsp_kernels.save(model, path, IMAGE)
    loaded = dsp_kernels.load(path)
    assert not loaded.training
    assert loaded.example_shape == (1, 3, 8, 8)
    dsp_kernels.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    copied = copy.deepcopy(loaded)
    assert_same(loaded, model)
    assert_same(copied, made(name))


@pytest.mark.parametrize("name", ["residual", "branching"])
def test_a_loaded_network_is_an_ordinary_module(tmp_path: Path, name: str) -> None:
    model = nets.make(name)
    dsp_kernels.save(model, tmp_path / "net", IMAGE)
    loaded = dsp_kernels.load(tmp_path / "net")
    expected = model(images())
    fused = dsp_kernels.fuse(loaded, IMAGE)
    torch.testing.assert_close(fused(images()), expected)
    compiled = torch.compile(loaded, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images()), expected)
    exported = torch.export.export(loaded, (images(),)).module()
    assert torch.equal(exported(images()), expected)
    loaded.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    halved = copy.deepcopy(loaded).eval().to(torch.bfloat16)
    assert halved(images().bfloat16()).dtype == torch.bfloat16


def test_swapped_networks_are_files_too(tmp_path: Path) -> None:
    swapped = dsp_kernels.swap(nets.make("residual"))
    dsp_kernels.save(swapped, tmp_path / "net", IMAGE)
    loaded = dsp_kernels.load(tmp_path / "net")
    assert any(isinstance(module, dsp_kernels.FusedConv2d) for module in loaded.modules())
    assert torch.equal(loaded(images()), swapped(images()))
    assert not any(parameter.requires_grad for parameter in loaded.packed.parameters())


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.aux = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(4, 2)
        self.aux.register_buffer("mask", torch.rand(2))  # of a head that packing does not see

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x).mean((2, 3))
        return (self.head(y), self.aux(y)) if self.training else self.head(y)


def test_a_network_with_another_training_graph_is_for_evaluation(tmp_path: Path) -> None:
    model = Auxiliary().eval()
    dsp_kernels.save(model, tmp_path / "net")
    loaded = copy.deepcopy(dsp_kernels.load(tmp_path / "net"))
    assert torch.equal(loaded(images()), model(images()))
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(loaded.state_dict()["aux.mask"], model.aux.mask)
    with pytest.raises(DSPError, match="can only be evaluated"):
        loaded.train()
    dsp_kernels.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()


class Tied(nn.Module):
    """One weight in two layers, one norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
        self.convs[1].weight = self.convs[0].weight
        self.norm = nn.BatchNorm2d(3)
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.convs[1](self.norm(self.convs[0](x))))


def test_what_is_one_tensor_stays_one(tmp_path: Path) -> None:
    model = nets.settled(Tied())
    dsp_kernels.save(model, tmp_path / "net", IMAGE)
    loaded = copy.deepcopy(dsp_kernels.load(tmp_path / "net"))
    assert torch.equal(loaded(images()), model(images()))
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert loaded.convs[1].weight is loaded.convs[0].weight
    assert loaded.convs[1].bias is not loaded.convs[0].bias
    assert loaded.again.running_mean is loaded.norm.running_mean
    assert loaded.again.weight is loaded.norm.weight
    for x in (model, loaded):
        x.train()(images()).square().sum().backward()
    assert torch.equal(loaded.norm.running_var, model.norm.running_var)
    torch.testing.assert_close(loaded.convs[0].weight.grad, model.convs[0].weight.grad)


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 3, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def _masked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    model[0].register_buffer("mask", torch.ones(3, 3, 1, 1))
    return model


REFUSED = {
    "masks": (_masked, "layer '0' carries mask, which no Conv2d has"),
    "function": (lambda: Calls(torch.special.erf), "special_erf|erf"),
    "method": (lambda: Calls(lambda x: x.cholesky()), "cholesky"),
    "attribute": (lambda: Calls(lambda x: x.grad_fn), "reads an attribute"),
    "module": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Bilinear(1, 1, 1)), "Bilinear"),
    "constant": (lambda: Calls(lambda x: x.to(torch.complex64)), "complex64"),
    "control flow": (lambda: Calls(lambda x: x if x.sum() > 0 else -x), "cannot be traced"),
    "two inputs": (lambda: nn.Bilinear(3, 3, 3), "takes 2 inputs, the example has 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_save_names_what_a_file_cannot_hold(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(DSPFormatError, match=message):
        dsp_kernels.save(make(), tmp_path / "net", IMAGE)
    assert not list(tmp_path.iterdir())


def test_an_example_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DSPFormatError, match=r"does not run on an input of shape \(1, 4, 8, 8\)"):
        dsp_kernels.save(wild(), tmp_path / "net", torch.zeros(1, 4, 8, 8))
    # 8 x 8 is the only usual size that its linear layer takes.
    dsp_kernels.save(nets.make("pre-activation"), tmp_path / "net")
    assert dsp_kernels.load(tmp_path / "net").example_shape == (1, 3, 8, 8)


Header = dict[str, Any]
HUGE = 10**12


def _find(header: Header, key: str, name: str) -> dict[str, Any]:
    return next(call for call in header["calls"] if call.get(key) == name)


def _call(kind: str, name: str, **changes: Any) -> Callable[[Header], Any]:
    return lambda header: _find(header, kind, name).update(changes)


def _module(path: str, **changes: Any) -> Callable[[Header], Any]:
    return lambda header: header["modules"][path].update(changes)


def _first(*calls: dict[str, Any]) -> Callable[[Header], Any]:
    """Put calls after the input; the others keep reading what they read."""

    def shifted(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"node"} and value["node"]:
                return {"node": value["node"] + len(calls)}
            return {key: shifted(item) for key, item in value.items()}
        return [shifted(item) for item in value] if isinstance(value, list) else value

    return lambda header: header.update(
        calls=[header["calls"][0], *calls, *(shifted(call) for call in header["calls"][1:])]
    )


X = {"node": 0}


def _sizes(condition: Any) -> Callable[[Header], Any]:
    def change(header: Header) -> None:
        header["modules"]["sizes"] = {"class": "SizeCheck", "conditions": [condition]}
        _first({"module": "sizes", "args": [X]})(header)

    return change


def _squares(count: int) -> list[dict[str, Any]]:
    size = {"method": "size", "args": [X, 2]}
    return [
        size,
        *({"function": "operator.mul", "args": [{"node": n}, {"node": n}]} for n in range(1, count + 1)),
    ]


def _deep(depth: int) -> Any:
    value: Any = X
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, tuple[Callable[[Header], Any], str]] = {
    "function of no table": (
        _call("function", "torch.cat", function="os.system"),
        "'os.system', which is not",
    ),
    "builtin": (_call("function", "torch.cat", function="eval"), "not known"),
    "module as function": (_call("module", "gate", module="shift"), "not known"),
    "container called": (_call("module", "gate", module="stem"), "not known"),
    "method of no table": (_call("method", "chunk", method="__reduce__"), "not known"),
    "method of a number": (_first({"method": "abs", "args": [3]}), "not known"),
    "hidden attribute": (_first({"function": "getattr", "args": [X, "__class__"]}), "reads an attribute"),
    "attribute of a node": (_first({"function": "getattr", "args": [X, X]}), "reads an attribute"),
    "code as a keyword": (_call("method", "chunk", kwargs={"dim=1)\nimport os#": 1}), "name is no name"),
    "python's keyword": (_call("method", "chunk", kwargs={"if": 1}), "name is no name"),
    "code as a path": (
        lambda h: h["modules"].update({'x", os.system("id"))#': {"class": "ReLU", "inplace": False}}),
        "is no path",
    ),
    "dunder path": (lambda h: h["modules"].update({"__class__": {"class": "Module"}}), "has already"),
    "path of the network itself": (
        lambda h: h["modules"].update({"graph": {"class": "Module"}}),
        "has already",
    ),
    "path taken twice": (lambda h: h["tensors"].update({"gate": "parameter"}), "not in the file"),
    "path inside a layer": (
        lambda h: h["modules"].update({"gate.inner": {"class": "Module"}}),
        "lies inside",
    ),
    "later call": (_call("function", "torch.cat", args=[[{"node": 10**6}]]), "only read earlier ones"),
    "call of itself": (_first({"function": "torch.relu", "args": [{"node": 1}]}), "only read earlier ones"),
    "negative call": (_first({"function": "torch.relu", "args": [{"node": -1}]}), "only read earlier ones"),
    "deep argument": (_call("function", "torch.cat", args=[_deep(40)]), "nested more than"),
    "long text": (_first({"method": "to", "args": [X, "a" * 500]}), "text of 500 characters"),
    "huge number": (_first({"function": "torch.add", "args": [X, 2**80]}), "more than 63 bits"),
    "unknown form": (
        _first({"function": "torch.relu", "args": [{"lambda": "x"}]}),
        "no argument has that form",
    ),
    "no output": (lambda h: h["calls"].pop(), "inputs and end with"),
    "two inputs": (_first({"input": 0}), "inputs and end with"),
    "output in the middle": (_first({"output": X}), "expected a name|not known"),
    "calls that are no list": (lambda h: h.update(calls={}), "no calls"),
    "too many calls": (lambda h: h.update(calls=[{"input": 0}] * 60_000), "expected at most"),
    "modes": (lambda h: h.update(modes="always"), "expected both or eval"),
    "example of terabytes": (lambda h: h.update(example_shape=[1, 3, HUGE, HUGE]), "four sizes"),
    "example of gigabytes": (lambda h: h.update(example_shape=[1, 3, 60_000, 60_000]), "four sizes"),
    "class of no table": (_module("gate", **{"class": "Bilinear"}), "'Bilinear' is unknown"),
    "foreign setting": (_module("gate", hook="x"), "expected"),
    "huge features": (_module("classifier", in_features=HUGE), "no Linear has that"),
    "large features": (_module("classifier", in_features=10**9), "has shape"),
    "huge width": (
        _module("packed", structure={"in_channels": 8, "out_channels": HUGE, "groups": []}),
        "of this size",
    ),
    "index out of range": (
        _module(
            "packed", structure={"in_channels": 8, "out_channels": 8, "groups": [[[8], [0]], [[1], [1]]]}
        ),
        "holds 8, but",
    ),
    "huge kernel": (_module("gate", kernel_size=[10**6, 10**6]), "has shape"),
    "huge padding": (_module("gate", padding=[10**6, 10**6]), "alive at one time"),
    "huge packed padding": (_module("packed", padding=[50_000, 50_000]), "alive at one time"),
    "padding for nobody": (
        _first({"function": "torch.nn.functional.pad", "args": [X, [10**5] * 4]}),
        "alive",
    ),
    "huge resize": (
        _first({"function": "torch.nn.functional.interpolate", "args": [X, [10**6, 10**6]]}),
        "alive at one time",
    ),
    "expanded": (_first({"method": "expand", "args": [X, 10**9, 3, 8, 8]}), "does not run|alive"),
    "many values at one time": (
        lambda h: (
            _first(*({"function": "torch.nn.functional.pad", "args": [X, [500] * 4]} for _ in range(20)))(h),
            h["calls"][-1].update(output=[{"node": n} for n in range(1, 21)]),
        ),
        "alive at one time",
    ),
    "bignum": (_first(*_squares(40)), "operations on sizes"),
    "repeated text": (_first({"function": "operator.mul", "args": ["a", HUGE]}), "calls and numbers"),
    "repeated list": (_first({"function": "operator.mul", "args": [[1], HUGE]}), "calls and numbers"),
    "repeated sizes": (
        _first(
            {"function": "getattr", "args": [X, "shape"]},
            {"function": "operator.mul", "args": [{"node": 1}, HUGE]},
        ),
        "of \\['Size', 'int'\\]",
    ),
    "sizes as a tensor": (
        _first(
            {"function": "getattr", "args": [X, "shape"]},
            {"method": "numel", "args": [{"node": 1}]},
        ),
        "is called of a Size",
    ),
    "channels that do not fit": (_call("module", "gate", args=[X]), "does not run on an input"),
    "loose tensor of another kind": (lambda h: h["tensors"].update(scale="code"), "a parameter or a buffer"),
    "integers as a parameter": (
        lambda h: h["tensors"].update({"shift": "parameter", "scale": "buffer", "nothing": "buffer"}),
        "'nothing' is not in the file",
    ),
    "code as a condition": (_sizes("__import__('os').system('id') == 0"), "is no condition"),
    "a power as a condition": (_sizes("height ** 9 == 0"), "is no condition"),
    "a division by a size": (_sizes("height // width == 0"), "is no condition"),
    "a deep condition": (_sizes("-" * 150 + "height == 0"), "is no condition"),
    "a condition that is no text": (_sizes(3), "is no condition"),
    "a condition of other sizes": (_sizes("height == 9"), "does not run on an input"),
    "tied to nothing": (lambda h: h.update(tied={"scale": "nothing"}), "expected two tensors"),
    "tied to another shape": (lambda h: h.update(tied={"scale": "unused.bias"}), "cannot be the same tensor"),
    "tied in a circle": (lambda h: h.update(tied={"scale": "scale"}), "expected two tensors"),
    "ties of no form": (lambda h: h.update(tied=[["scale"]]), "expected two tensors"),
    "missing tensor": (lambda h: h["tensors"].pop("unused.bias"), "not of this model: \\['unused.bias'"),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Header, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("template") / "net"
    dsp_kernels.save(wild(), path, IMAGE)
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["dsp_kernels"]), load_file(path)


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_hostile_graphs(
    template: tuple[Header, dict[str, Tensor]], tmp_path: Path, name: str
) -> None:
    change, message = HOSTILE[name]
    header, tensors = copy.deepcopy(template[0]), template[1]
    change(header)
    save_file(tensors, tmp_path / "net", metadata={"dsp_kernels": json.dumps(header)})
    with pytest.raises(DSPFormatError, match=message):
        dsp_kernels.load(tmp_path / "net")


def test_the_template_itself_loads(template: tuple[Header, dict[str, Tensor]], tmp_path: Path) -> None:
    """So that every refusal above is due to its change; unknown parts of a header are ignored."""
    header = copy.deepcopy(template[0]) | {"comment": "of a later writer"}
    _first(*_squares(3))(header)
    save_file(template[1], tmp_path / "net", metadata={"dsp_kernels": json.dumps(header)})
    assert torch.equal(dsp_kernels.load(tmp_path / "net")(images())["map"], wild()(images())["map"])


def test_widths_of_all_layers_share_one_budget() -> None:
    budget = Budget(widths=20, tensors=3)
    structure = GroupStructure.dense(6, 4).to_dict()
    budget.spend(structure, "first")
    budget.spend(structure, "second")
    with pytest.raises(DSPFormatError, match="'third': in_channels is 6; expected 1 to 0"):
        budget.spend(structure, "third")


class _Rows(nn.Module):
    """Channel attention along the channels, as ECA-Net has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.along = nn.Conv2d(3, 4, 3), nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        gate = self.along(y.mean((2, 3)).unsqueeze(1)).sigmoid().squeeze(1)
        return y * gate[:, :, None, None]


OPERATIONS: dict[str, Callable[[], nn.Module]] = {
    "power": lambda: Calls(lambda x: x**2),
    "matrix product": lambda: Calls(lambda x: x.flatten(2).transpose(1, 2) @ x.flatten(2)),
    "choice": lambda: Calls(lambda x: torch.where(x > 0, x, x.exp())),
    "normalise": lambda: Calls(lambda x: nn.functional.normalize(x, dim=1)),  # hands on out=None
    "one dimension": _Rows,
    "hard shrink": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardshrink(0.3)),
    "round the corner": lambda: nn.Sequential(nn.CircularPad2d(1), nn.Conv2d(3, 4, 3)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_other_networks_are_known(tmp_path: Path, name: str) -> None:
    model = OPERATIONS[name]().eval()
    dsp_kernels.save(model, tmp_path / "net", IMAGE)
    assert torch.equal(dsp_kernels.load(tmp_path / "net")(images()), model(images()))


FURTHER: dict[str, tuple[Callable[[Header], Any], str]] = {
    "no shape of the second": (lambda h: h.pop("further_shapes"), "2 inputs"),
    "three shapes": (lambda h: h["further_shapes"].append([1, 3]), "2 inputs"),
    "huge": (lambda h: h.update(further_shapes=[[1, HUGE]]), "further inputs"),
    "of text": (lambda h: h.update(further_shapes="ab"), "further inputs"),
    "too many": (lambda h: h.update(further_shapes=[[1, 1]] * 99), "further inputs"),
    "an older version": (lambda h: h.update(version=2), "2 inputs"),
    "one input twice": (lambda h: h["calls"][1].update(input=0), "numbered"),
    "an input late": (lambda h: h["calls"].insert(0, h["calls"].pop(2)), "first calls|earlier"),
}


class _Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x) + y[:, :, None, None]


@pytest.mark.parametrize("name", FURTHER)
def test_refuses_hostile_inputs(tmp_path: Path, name: str) -> None:
    path = tmp_path / "net"
    dsp_kernels.save(_Two(), path, (IMAGE, torch.zeros(1, 3)))
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["dsp_kernels"])
    assert (header["version"], header["readable_from"]) == (3, 3)
    change, words = FURTHER[name]
    change(header)
    save_file({}, path, metadata={"dsp_kernels": json.dumps(header)})
    with pytest.raises(DSPFormatError, match=words):
        dsp_kernels.load(path)


def test_a_fused_layer_of_other_channels_is_refused(tmp_path: Path) -> None:
    """Its groups read channels that are there, so that only the width itself tells."""
    path = tmp_path / "net"
    dsp_kernels.save(dsp_kernels.swap(nets.make("residual")), path, IMAGE)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["dsp_kernels"])
    fused = next(m for m in header["modules"].values() if m["class"] == "FusedConv2d")
    fused["structure"]["in_channels"] += 100
    save_file(load_file(path), path, metadata={"dsp_kernels": json.dumps(header)})
    with pytest.raises(DSPFormatError, match="channels reads a value of shape"):
        dsp_kernels.load(path)
