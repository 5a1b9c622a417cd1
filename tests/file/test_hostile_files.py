"""load refuses damaged, foreign and hostile files, and says what is wrong with them."""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels import GroupStructure
from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.decode import Budget

Header = dict[str, Any]
HUGE = 10**12


def _find(header: Header, key: str, name: str) -> dict[str, Any]:
    return next(call for call in header["calls"] if call.get(key) == name)


def _call(kind: str, name: str, **changes: Any) -> Callable[[Header], Any]:
    return lambda header: _find(header, kind, name).update(changes)


def _module(path: str, **changes: Any) -> Callable[[Header], Any]:
    return lambda header: header["modules"][path].update(changes)


def _set(**parts: Any) -> Callable[[Header], Any]:
    return lambda header: header.update(parts)


def _add(path: str, kind: str = "Module", **settings: Any) -> Callable[[Header], Any]:
    return lambda header: header["modules"].update({path: {"class": kind, **settings}})


def _fn(name: str, *args: Any) -> dict[str, Any]:
    return {"function": name, "args": [*args]}


def _structure(**parts: Any) -> Callable[[Header], Any]:
    return lambda header: header["modules"]["packed"]["structure"].update(parts)


def _widths(widths: Any) -> tuple[Callable[[Header], Any], str]:
    return _set(dense_widths=widths), "dense_widths of .*; expected three sizes"


def _first(*calls: dict[str, Any]) -> Callable[[Header], Any]:
    """Insert calls after the input and renumber the others."""

    def shifted(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"node"} and value["node"]:
                return {"node": value["node"] + len(calls)}
            return {key: shifted(item) for key, item in value.items()}
        return [shifted(item) for item in value] if isinstance(value, list) else value

    return lambda header: header.update(
        calls=[header["calls"][0], *calls, *(shifted(call) for call in header["calls"][1:])]
    )


X, Y, Z = ({"node": number} for number in range(3))
LONG = _fn("torch.zeros", [2**20])


def _sizes(condition: Any) -> Callable[[Header], Any]:
    def change(header: Header) -> None:
        header["modules"]["sizes"] = {"class": "SizeCheck", "conditions": [condition]}
        _first({"module": "sizes", "args": [X]})(header)

    return change


def _squares(count: int) -> list[dict[str, Any]]:
    size = {"method": "size", "args": [X, 2]}
    return [size, *(_fn("operator.mul", {"node": n}, {"node": n}) for n in range(1, count + 1))]


def _deep(depth: int) -> Any:
    value: Any = X
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, tuple[Callable[[Header], Any], str]] = {
    "version 1": (_set(version=1), "version 1, which is no longer read"),
    "later version": (_set(readable_from=5), "this dsp_kernels reads version 4"),
    "version of text": (_set(version="2"), "expected whole numbers"),
    "other format": (_set(format="weights"), "packed model"),
    "unknown function": (_call("function", "torch.cat", function="os.system"), "'os.system', which is not"),
    "builtin": (_call("function", "torch.cat", function="eval"), "not known"),
    "module as function": (_call("module", "gate", module="shift"), "not known"),
    "container called": (_call("module", "gate", module="stem"), "not known"),
    "unknown method": (_call("method", "chunk", method="__reduce__"), "not known"),
    "method of a number": (_first({"method": "abs", "args": [3]}), "not known"),
    "hidden attribute": (_first(_fn("getattr", X, "__class__")), "reads an attribute"),
    "attribute of a node": (_first(_fn("getattr", X, X)), "reads an attribute"),
    "code as a keyword": (_call("method", "chunk", kwargs={"dim=1)\nimport os#": 1}), "name is no name"),
    "python's keyword": (_call("method", "chunk", kwargs={"if": 1}), "name is no name"),
    "code as a path": (_add('x", os.system("id"))#', "ReLU", inplace=False), "is no path"),
    "dunder path": (_add("__class__"), "has already"),
    "path of the network itself": (_add("graph"), "has already"),
    "attribute of the network itself": (_add("dense_widths"), "has already"),
    "path inside a layer": (_add("gate.inner"), "inside a module that is no"),
    "tensor of no data": (lambda h: h["tensors"].update({"gate": "parameter"}), "not in the file"),
    "later call": (_call("function", "torch.cat", args=[[{"node": 10**6}]]), "only read earlier ones"),
    "call of itself": (_first(_fn("torch.relu", {"node": 1})), "only read earlier ones"),
    "negative call": (_first(_fn("torch.relu", {"node": -1})), "only read earlier ones"),
    "deep argument": (_call("function", "torch.cat", args=[_deep(40)]), "nested more than"),
    "long text": (_first({"method": "to", "args": [X, "a" * 500]}), "expected 64 characters"),
    "huge number": (_first(_fn("torch.add", X, 2**80)), "or 63 bits"),
    "unknown form": (_first(_fn("torch.relu", {"lambda": "x"})), "no argument has that form"),
    "no output": (lambda h: h["calls"].pop(), "inputs and end with"),
    "two inputs": (_first({"input": 0}), "inputs and end with"),
    "output in the middle": (_first({"output": X}), "expected a name|not known"),
    "calls that are no list": (_set(calls={}), "no calls"),
    "too many calls": (_set(calls=[{"input": 0}] * 60_000), "expected at most"),
    "modes": (_set(modes="always"), "expected both or eval"),
    "example of terabytes": (_set(example_shape=[1, 3, HUGE, HUGE]), "four sizes"),
    "example of gigabytes": (_set(example_shape=[1, 3, 60_000, 60_000]), "four sizes"),
    "unknown class": (_module("gate", **{"class": "Bilinear"}), "'Bilinear' is unknown"),
    "foreign setting": (_module("gate", hook="x"), "expected"),
    "huge features": (_module("classifier", in_features=HUGE), "no Linear has that"),
    "large features": (_module("classifier", in_features=10**9), "has shape"),
    "huge width": (_structure(out_channels=HUGE), "in a file of this size"),
    "width of text": (_structure(in_channels="8"), "in_channels is '8'"),
    "groups that are no list": (_structure(groups=7), "no group structure"),
    "more groups than tensors": (_structure(groups=[[[0], [0]]] * 99), "more groups than tensors"),
    "index out of range": (_structure(groups=[[[8], [0]], [[1], [1]]]), "holds 8, but"),
    "negative index": (_structure(groups=[[[-1], [0]], [[1], [1]]]), "holds -1"),
    "index of text": (_structure(groups=[["0", [0]], [[1], [1]]]), "expected an integer"),
    "output channel in two groups": (_structure(groups=[[[0], [1]], [[1], [1]]]), "in group 0 and"),
    "other group count": (_structure(groups=[[[0, 5, 2], [1, 7, 4]]]), "not of this model"),
    "dense widths of no form": _widths([3]),
    "dense widths of text": _widths({"gate": "abc"}),
    "dense widths of nothing": _widths({"elsewhere": [1, 1, 1]}),
    "huge dense widths": _widths({"gate": [HUGE, 8, 1]}),
    "huge kernel": (_module("gate", kernel_size=[10**6, 10**6]), "has shape"),
    "huge padding": (_module("gate", padding=[10**6, 10**6]), "alive at one time"),
    "huge packed padding": (_module("packed", padding=[50_000, 50_000]), "alive at one time"),
    "huge padding that is unused": (_first(_fn("torch.nn.functional.pad", X, [10**5] * 4)), "alive"),
    "huge resize": (_first(_fn("torch.nn.functional.interpolate", X, [10**6, 10**6])), "alive at one time"),
    "expanded": (_first({"method": "expand", "args": [X, 10**9, 3, 8, 8]}), "does not run|alive"),
    "huge constant": (_first(_fn("torch.zeros", [HUGE])), "alive at one time"),
    "huge range": (_first(_fn("torch.arange", HUGE)), "alive at one time"),
    "constant elsewhere": (_first(_fn("torch.ones", [9]) | {"kwargs": {"device": "cpu"}}), "names a device"),
    "repeated map": (_first({"method": "repeat", "args": [X, HUGE, 1, 1, 1]}), "alive at one time"),
    "huge windows": (_first(_fn("torch.nn.functional.unfold", X, 3, 1, 10**6)), "alive at one time"),
    "huge table of words": (
        _first(
            _fn("torch.arange", 2**20),
            _fn("torch.zeros", [1, 2**20]),
            _fn("torch.nn.functional.embedding", Y, Z),
        ),
        "alive at one time",
    ),
    "huge sum inside a product": (
        _first(LONG, _fn("torch.zeros", [2**20, 2]), _fn("torch.einsum", "a,b,ac,bc->c", *[Y, Y, Z, Z])),
        "alive at one time",
    ),
    "huge window inside a norm": (
        _first(_fn("torch.nn.functional.local_response_norm", X, 2**30)),
        "alive at one time",
    ),
    "many parts": (_first(LONG, _fn("torch.split", Y, 1)), "more than 65536 parts"),
    "many empty parts": (_first(_fn("torch.zeros", [0, HUGE]), _fn("torch.unbind", Y, 1)), "65536 parts"),
    "many tensors at one time": (
        lambda h: (
            _first(*(_fn("torch.nn.functional.pad", X, [500] * 4) for _ in range(20)))(h),
            h["calls"][-1].update(output=[{"node": n} for n in range(1, 21)]),
        ),
        "alive at one time",
    ),
    "bignum": (_first(*_squares(40)), "operations on sizes"),
    "repeated text": (_first(_fn("operator.mul", "a", HUGE)), "expected numbers and tensors"),
    "repeated list": (_first(_fn("operator.mul", [1], HUGE)), "expected numbers and tensors"),
    "repeated sizes": (
        _first(_fn("getattr", X, "shape"), _fn("operator.mul", {"node": 1}, HUGE)),
        "of \\['Size', 'int'\\]",
    ),
    "sizes as a tensor": (
        _first(_fn("getattr", X, "shape"), {"method": "numel", "args": [{"node": 1}]}),
        "is called on a Size",
    ),
    "channels that do not fit": (_call("module", "gate", args=[X]), "does not run on an input"),
    "loose tensor of another kind": (lambda h: h["tensors"].update(scale="code"), "a parameter or buffer"),
    "code as a condition": (_sizes("__import__('os').system('id') == 0"), "is no condition"),
    "a power as a condition": (_sizes("height ** 9 == 0"), "is no condition"),
    "a division by a size": (_sizes("height // width == 0"), "is no condition"),
    "a deep condition": (_sizes("-" * 150 + "height == 0"), "is no condition"),
    "a condition that is no text": (_sizes(3), "is no condition"),
    "a condition of other sizes": (_sizes("height == 9"), "does not run on an input"),
    "tied to nothing": (_set(tied={"scale": "nothing"}), "expected two tensors"),
    "tied to another shape": (_set(tied={"scale": "unused.bias"}), "cannot be the same tensor"),
    "tied in a circle": (_set(tied={"scale": "scale"}), "expected two tensors"),
    "ties of no form": (_set(tied=[["scale"]]), "expected two tensors"),
    "missing tensor": (lambda h: h["tensors"].pop("unused.bias"), "not of this model: \\['unused.bias'"),
}


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["dsp_kernels"]), load_file(path)


def write(path: Path, header: Header, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path, metadata={"dsp_kernels": json.dumps(header)})
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Header, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("template") / "net"
    dsp_kernels.save(nets.wild(), path, nets.IMAGE)
    return read(path)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_description(template: tuple[Header, dict[str, Tensor]], tmp_path: Path, name: str) -> None:
    change, message = HOSTILE[name]
    header = copy.deepcopy(template[0])
    change(header)
    with pytest.raises(DSPFormatError, match=message):
        dsp_kernels.load(write(tmp_path / "net", header, template[1]))


def test_the_description_loads_without_these_changes(
    template: tuple[Header, dict[str, Tensor]], tmp_path: Path
) -> None:
    """A later version that says it is compatible may add keys."""
    header = copy.deepcopy(template[0]) | {"version": 9, "readable_from": 2, "licence": "a new key"}
    _first(*_squares(3))(header)
    loaded, x = dsp_kernels.load(write(tmp_path / "net", header, template[1])), nets.example(3)
    assert torch.equal(loaded(x)["map"], nets.wild()(x)["map"])


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("classifier.bias"), "missing: \\['classifier.bias'\\]"),
    "foreign": (lambda t: t.update(spy=torch.zeros(1)), "not of this model: \\['spy'\\]"),
    "shape": (
        lambda t: t.update({"stem.norm.weight": torch.zeros(5)}),
        "'stem.norm.weight' has shape \\[5\\]; expected \\[8\\]",
    ),
    "integers": (lambda t: t.update({"stem.norm.weight": torch.zeros(8).long()}), "has dtype torch.int64"),
    "two dtypes": (lambda t: t.update(shift=torch.zeros(8).double()), "several floating dtypes"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit(
    template: tuple[Header, dict[str, Tensor]], tmp_path: Path, name: str
) -> None:
    (change, message), tensors = TENSORS[name], dict(template[1])
    change(tensors)
    with pytest.raises(DSPFormatError, match=message):
        dsp_kernels.load(write(tmp_path / "net", template[0], tensors))


@pytest.mark.parametrize("line", ["\n", "\r"])
def test_the_name_of_a_tensor_is_never_code(
    template: tuple[Header, dict[str, Tensor]], tmp_path: Path, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name = line.join(
        ['gate.w")', 'getattr(__import__("os"), "system")("echo ran")', "def g(self, x):", '    ("']
    )
    header, tensors = copy.deepcopy(template[0]), template[1] | {name: torch.zeros(1)}
    _first({"tensor": name})(header)
    with pytest.raises(DSPFormatError, match="not known here"):
        dsp_kernels.load(write(tmp_path / "net", header, tensors))
    assert "ran" not in capfd.readouterr().out


def test_widths_of_all_layers_share_one_budget() -> None:
    budget = Budget(widths=20, tensors=3)
    structure = GroupStructure.dense(6, 4).to_dict()
    budget.spend(structure, "first")
    budget.spend(structure, "second")
    with pytest.raises(DSPFormatError, match="'third': in_channels is 6; expected 1 to 0"):
        budget.spend(structure, "third")


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


def _values(grid: Any, call: str = "0") -> Callable[[Header], Any]:
    return lambda header: header["quantization"]["values"].update({call: grid})


def _recorded(**parts: Any) -> Callable[[Header], Any]:
    return lambda header: header["quantization"].update(parts)


QUANTIZED: dict[str, tuple[Callable[[Header], Any], str]] = {
    "later definition": (_recorded(definition=2), "by definition '2' of integer"),
    "no definition": (lambda h: h["quantization"].pop("definition"), "by definition 'None'"),
    "record of text": (_set(quantization="u8"), "by definition 'None'"),
    "kept layers of no form": (_recorded(keep=[3]), "expected names"),
    "an unknown kept layer": (_recorded(keep=["nothing"]), "no layer of this network"),
    "every layer kept": (
        _recorded(keep=["stem", "packed", "back", "strided", "shortcut"]),
        "is quantised by|no",
    ),
    "scales of no form": (_recorded(values=[]), "expected one for each value"),
    "no scale of a value": (_recorded(values={}), "is quantised by None"),
    "a scale of no call": (_values([0.1, 0, 255], "999"), "'999', which the file does not hold"),
    "a scale of no number": (_values([0.1, 0, 255], "-1"), "'-1', which the file does not hold"),
    **{
        f"scale {scale}": (_values([scale, -4892, 4892]), "expected a positive scale")
        for scale in (0.0, -0.1, 1e-300, 1e300, math.inf, math.nan, True, "1", None, 10**400)
    },
    "levels of no integers": (_values([0.1, -4892.0, 4892.0]), "expected a positive scale"),
    "levels that are no range": (_values([0.1, 255, 0]), "expected a positive scale"),
    "more levels than are exact": (_values([0.1, -4893, 4893]), "expected at most 4892"),
    "an image of bytes": (_values([0.1, 0, 255]), "is quantised by"),
    "a huge number of levels": (_values([0.1, -(2**31), 2**31]), "expected a positive scale"),
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Header, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("quantized") / "net"
    dsp_kernels.save(dsp_kernels.quantize(nets.make("residual"), nets.example(4)), path)
    return read(path)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_hostile_record_of_a_quantised_network(
    quantized: tuple[Header, dict[str, Tensor]], tmp_path: Path, name: str
) -> None:
    change, words = QUANTIZED[name]
    header = copy.deepcopy(quantized[0])
    change(header)
    with pytest.raises(DSPFormatError, match=words):
        dsp_kernels.load(write(tmp_path / "net", header, quantized[1]))


def test_the_image_of_a_quantised_network_cannot_take_gigabytes(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Conv2d(1, 64, 1), nn.ReLU(), nn.Conv2d(64, 1, 1)).eval()
    dsp_kernels.save(dsp_kernels.quantize(wide, torch.randn(2, 1, 8, 8)), tmp_path / "net")
    header, tensors = read(tmp_path / "net")
    header["example_shape"] = [1, 1, 2048, 2048]  # load runs the network on it
    with pytest.raises(DSPFormatError, match="elements alive at one time"):
        dsp_kernels.load(write(tmp_path / "hostile", header, tensors))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_are_not_finite_cannot_be_quantised(
    quantized: tuple[Header, dict[str, Tensor]], tmp_path: Path, name: str
) -> None:
    tensors = quantized[1] | {f"back_norm.{name}": torch.full((6,), math.nan)}
    with pytest.raises(DSPFormatError, match="'back': weights or scales are too large"):
        dsp_kernels.load(write(tmp_path / "net", quantized[0], tensors))


class _Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x) + y[:, :, None, None]


@pytest.mark.parametrize("name", FURTHER)
def test_a_hostile_description_of_several_inputs(tmp_path: Path, name: str) -> None:
    path = tmp_path / "net"
    dsp_kernels.save(_Two(), path, (nets.IMAGE, torch.zeros(1, 3)))
    header, tensors = read(path)
    assert (header["version"], header["readable_from"]) == (3, 3)
    change, words = FURTHER[name]
    change(header)
    with pytest.raises(DSPFormatError, match=words):
        dsp_kernels.load(write(path, header, tensors))


def test_a_fused_layer_of_other_channels_is_refused(tmp_path: Path) -> None:
    """Its groups read only channels that exist."""
    path = tmp_path / "net"
    dsp_kernels.save(dsp_kernels.swap(nets.make("residual")), path, nets.IMAGE)
    header, tensors = read(path)
    fused = next(m for m in header["modules"].values() if m["class"] == "FusedConv2d")
    fused["structure"]["in_channels"] += 100
    with pytest.raises(DSPFormatError, match="channels reads a tensor of shape"):
        dsp_kernels.load(write(path, header, tensors))


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    for metadata, message in (
        (None, r"not one that dsp_kernels\.save wrote"),
        ({"dsp_kernels": "{"}, "not JSON"),
        ({"dsp_kernels": "[" * 100_000}, "readable"),
    ):
        save_file({"a": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(DSPFormatError, match=message):
            dsp_kernels.load(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(DSPFormatError, match=r"not a readable safetensors file \(it is a zip archive"):
        dsp_kernels.load(path)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        dsp_kernels.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        dsp_kernels.load(tmp_path / "nothing")


def test_every_truncation(tmp_path: Path) -> None:
    path = tmp_path / "net"
    dsp_kernels.save(nets.make("residual"), path, nets.IMAGE)
    whole = path.read_bytes()
    for size in [*range(0, 200, 7), *range(200, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(DSPFormatError):
            dsp_kernels.load(path)


def test_damaged_files_load_completely_or_not_at_all() -> None:
    """In a process with limited memory; ``scripts/safety/fuzz_files.py --count 20000`` is the long run."""
    script = Path(__file__).parents[2] / "scripts" / "safety" / "fuzz_files.py"
    command = [sys.executable, str(script), "--count", "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("500 files")
    for outcome in ("'refused': ", "'loaded': "):  # both happen, so both were tried
        assert int(done.stdout.split(outcome)[1].split(",")[0].split("}")[0]) > 5
