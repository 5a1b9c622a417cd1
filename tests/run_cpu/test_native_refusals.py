"""Wrong input is an error, never a crash; what cannot run natively has a reason."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dsp_kernels import fuse
from dsp_kernels.errors import DSPBackendError, DSPShapeError
from dsp_kernels.run.cpu import extension
from dsp_kernels.run.cpu.extension import native, warn_if_missing, why_missing

WEIGHT = np.zeros((2, 3, 3, 3), np.float32)
CONV = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}


def add(network: object, **changes: object) -> int:
    """A valid convolution of 3 to 2 channels, except for the changes."""
    a = {"x": 0, "residual": -1, "out": 2, **CONV, "act": "relu", "i": [[0, 1, 2]], "o": [[0, 1]]}
    a |= {"weights": [WEIGHT], "bias": None} | changes
    made: int = network.conv(*a.values())  # type: ignore[attr-defined]
    return made


def network_with_input() -> object:
    network = native().Network()  # type: ignore[union-attr]
    network.input(3)
    return network


@pytest.mark.parametrize(
    "change",
    [
        {"x": 7},
        {"x": -1},
        {"residual": 9},
        {"residual": 0},  # 3 channels, not 2
        {"out": 0},
        {"out": 1},
        {"kernel": (0, 3)},
        {"stride": (1, 0)},
        {"padding": (-1, 0)},
        {"dilation": (1, 0)},
        {"kernel": (1 << 20, 3)},
        {"act": "tanh"},
        {"i": [[0, 1, 3]]},
        {"i": [[0, -1, 2]]},
        {"i": [[0, 1]]},
        {"i": []},
        {"o": [[0, 0]]},
        {"o": [[0, 2]]},
        {"weights": []},
        {"weights": [WEIGHT[:1]]},
        {"bias": np.zeros(3, np.float32)},
    ],
    ids=str,
)
def test_an_invalid_convolution(change: dict[str, object]) -> None:
    network = network_with_input()
    assert add(network_with_input()) == 1
    with pytest.raises(ValueError, match=r"."):
        add(network, **change)


def f(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([], [f(1, 2, 5, 5)]),
        ([f(1, 3, 5, 5), f(1, 3, 5, 5)], [f(1, 2, 5, 5)]),
        ([f(1, 4, 5, 5)], [f(1, 2, 5, 5)]),
        ([f(3, 5, 5)], [f(1, 2, 5, 5)]),
        ([f(1, 3, 5, 5)], [f(1, 2, 5, 4)]),
        ([f(1, 3, 5, 5)], [f(2, 2, 5, 5)]),
        ([f(1, 3, 5, 5)], [f(1, 2)]),
        ([f(1, 3, 5, 5)], []),
        ([np.zeros((1, 3, 5, 5))], [f(1, 2, 5, 5)]),
        ([f(1, 3, 5, 5)], [np.zeros((1, 2, 5, 5))]),
        ([f(1, 3, 0, 5)], [f(1, 2, 0, 5)]),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit(inputs: list[np.ndarray], outputs: list[np.ndarray]) -> None:
    network = network_with_input()
    network.output(add(network))  # type: ignore[attr-defined]
    with pytest.raises((ValueError, TypeError)):
        network.run(inputs, outputs, 2)  # type: ignore[attr-defined]
    network.run([f(1, 3, 5, 5)], [f(1, 2, 5, 5)], 2)  # type: ignore[attr-defined]


def test_a_read_only_output() -> None:
    network = network_with_input()
    network.output(add(network))  # type: ignore[attr-defined]
    y = f(1, 2, 5, 5)
    y.flags.writeable = False
    with pytest.raises(ValueError, match="writ"):
        network.run([f(1, 3, 5, 5)], [y], 1)  # type: ignore[attr-defined]


def test_a_network_is_immutable_after_its_first_run() -> None:
    network = network_with_input()
    network.output(add(network))  # type: ignore[attr-defined]
    network.output_shapes([(5, 5)])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="grow"):
        add(network)


def test_an_image_smaller_than_the_kernel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 5), nn.ReLU(), nn.Conv2d(2, 2, 3))
    fused = fuse(model.eval(), torch.randn(1, 3, 9, 9), backend="cpu")
    with pytest.raises(DSPShapeError, match="too small"):
        fused(torch.randn(1, 3, 6, 6))
    with pytest.raises(DSPShapeError, match="too small"):
        fused(torch.randn(0, 3, 6, 6))


def test_float64_runs_elsewhere() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).eval().double()
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    assert fuse(model, x).backend == "eager"
    with pytest.raises(DSPBackendError, match="float32"):
        fuse(model, x, backend="cpu")


def test_invalid_views_products_and_gates() -> None:
    network = native().Network("")  # type: ignore[union-attr]
    x, other = network.input(3), network.input(4)
    with pytest.raises(ValueError, match="out of range"):
        network.select(x, [0, 3])
    with pytest.raises(ValueError, match="needs a channel"):
        network.select(x, [])
    with pytest.raises(ValueError, match="different numbers of channels"):
        network.product(x, other, "none")
    with pytest.raises(ValueError, match="changes 0"):
        network.conv(x, -1, 1, (1, 1), (1, 1), (0, 0), (1, 1), "sigmoid", [], [], [], None)
    window = {"kernel_size": (2, 2), "stride": (2, 2), "padding": (0, 0), "ceil_mode": False}
    with pytest.raises(ValueError, match="known are max_pool, avg_pool"):
        network.pool(x, kind="median_pool", **window)
    network.output(network.concat([x, other]))
    with pytest.raises(ValueError, match="cannot be concatenated"):
        network.output_shapes([(4, 4), (4, 5)])


def test_without_the_extension(replace_extension: Callable[[None, str], None]) -> None:
    """Everything runs in plain PyTorch, with one warning that names the fix."""
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).eval()
    x = torch.randn(1, 3, 9, 9)
    replace_extension(None, "it is not there; run the build")
    warn_if_missing.cache_clear()
    with pytest.warns(RuntimeWarning, match="run the build"):
        assert fuse(model, x).backend == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once per process
        fuse(model, x)
    with pytest.raises(DSPBackendError, match="run the build"):
        fuse(model, x, backend="cpu")
    warn_if_missing.cache_clear()


def test_an_extension_with_other_activations_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = SimpleNamespace(activations=["none", "relu"])
    monkeypatch.setitem(sys.modules, "dsp_kernels._C", stale)
    monkeypatch.setattr(extension, "_load", extension._load.__wrapped__)
    assert native() is None
    assert "another version" in why_missing()


def test_the_op_without_the_extension() -> None:
    """In a process of its own: what torch expects of an op, and its schema."""
    code = (
        "import sys; sys.modules['dsp_kernels._C'] = None\n"
        "import torch; from dsp_kernels.op.torch_op import NAMESPACE, OP_NAME, SCHEMA\n"
        "op = getattr(getattr(torch.ops, NAMESPACE), OP_NAME).default\n"
        "assert op._schema == torch._C.parse_schema(f'{NAMESPACE}::{OP_NAME}{SCHEMA}')\n"
        "x, weight = (torch.randn(s, requires_grad=True) for s in ((1, 3, 5, 5), (2, 2, 3, 3)))\n"
        "channels = [torch.tensor([0, 2])], [torch.tensor([1, 3])]\n"
        "window = [3, 3], [1, 1], [1, 1], [1, 1]\n"
        "torch.library.opcheck(op, (x, [weight], *channels, None, None, 4, *window, 'relu'))\n"
        "print('passed')"
    )
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "passed"
