"""torch.compile(model, backend="dsp_kernels"): eager's answers, fused where that is possible."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import dsp_kernels
from dsp_kernels.program import compile_backend
from dsp_kernels.program.compile_backend import compile_graph
from dsp_kernels.program.fuse import fuse


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Answers(nn.Module):
    """Several answers, one of them a size; a graph break between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.first(x).relu()
        torch._dynamo.graph_break()
        return {"map": self.second(y), "size": y.view(y.shape[0], -1).shape[1], "images": y.shape[0]}


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(nets.make, name) for name in ("residual", "pre-activation")},
    "wild": nets.wild,
    "answers": lambda: Answers().eval(),
    "swapped": lambda: dsp_kernels.swap(nets.make("residual")),
}


@pytest.mark.filterwarnings("error:backend:UserWarning")  # nothing runs in plain PyTorch
@pytest.mark.parametrize("name", NETWORKS)
def test_answers_are_those_of_eager_for_any_batch(name: str) -> None:
    model = NETWORKS[name]()
    compiled = torch.compile(model, backend=compile_graph)
    for batch in (2, 5, 1):  # torch compiles the first and the last for that batch only
        x = nets.example(batch, seed=batch)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_changed_and_replaced_weights_are_read() -> None:
    model, x = nets.make("residual"), nets.example(seed=3)
    compiled = torch.compile(model, backend=compile_graph)
    with torch.no_grad():
        for change in (
            lambda: model.packed.weights[0].mul_(2),
            lambda: model.norm.running_mean.add_(1),
            lambda: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}),
            lambda: setattr(model.classifier, "bias", nn.Parameter(torch.ones(5))),
        ):
            before = compiled(x)
            change()
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(before, model(x), atol=1e-4)


class Threshold(nn.Module):
    """Its weights matter for large images only."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        nn.init.constant_(self.conv.weight, scale)
        nn.init.constant_(self.conv.bias, -100 * scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


@pytest.mark.filterwarnings("error:backend:UserWarning")
def test_models_of_one_class_each_keep_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[nn.Module] = []
    monkeypatch.setattr(compile_backend, "fuse", lambda model, x: fused.append(model) or fuse(model, x))
    residual = [nets.make("residual"), nets.settled(nets.make("residual"), seed=5)]
    for models in ([Threshold(1.0).eval(), Threshold(2.0).eval()], residual):
        fused.clear()
        compiled = [torch.compile(model, backend=compile_graph) for model in models]
        for model, run in [*zip(models, compiled, strict=True)] * 2:
            for x in (nets.example(), nets.example() * 100):
                with torch.no_grad():
                    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
        assert len(fused) == 2


class Refused(nn.Module):
    """A convolution in code that cannot be fused, or not for all inputs."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.compute = nn.Conv2d(3, 4, 3), forward
        self.register_buffer("total", torch.zeros(1))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.compute(self, *inputs)


def counting(net: Any, x: Tensor) -> Tensor:
    net.total += 1
    return net.conv(x) + net.total


REFUSED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str]] = {
    "writes into a buffer": (counting, (nets.example(seed=3),), "writes into its input or buffer .*total"),
    "no input": (lambda net: net.total + 1, (), "no input"),
    "labels": (
        lambda net, x: net.conv(x) + net.total[x.long()].sum(),
        (torch.zeros(2, 3, 8, 8),),
        "random images: index",
    ),
    "another dtype": (
        lambda net, x: net.conv(x).double(),
        (nets.example(seed=3),),
        "answers in torch.float64",
    ),
    "another memory format": (
        lambda net, x: net.conv(x).contiguous(memory_format=torch.channels_last),
        (nets.example(seed=3),),
        "memory format",
    ),
    "number": (
        lambda net, x, t: net.conv(x) * t,
        (nets.example(seed=3), torch.tensor(2.0)),
        "dynamic=True",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_graph_stays_in_plain_pytorch_after_one_warning(
    name: str, recwarn: pytest.WarningsRecorder
) -> None:
    forward, inputs, reason = REFUSED[name]
    model = Refused(forward).eval()
    expected = copy.deepcopy(model)
    compiled = torch.compile(model, backend=compile_graph)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), expected(*inputs))
    messages = [str(w.message) for w in recwarn]
    (message,) = [text for text in messages if "backend" in text]
    assert re.search(reason, message)
    assert torch.equal(model.total, expected.total)


def test_sizes_that_only_the_graph_allows_run_in_plain_pytorch() -> None:
    model = Refused(lambda net, x, y: net.conv(x).mean() + net.conv(y).mean()).eval()
    compiled = torch.compile(model, backend=compile_graph)
    with torch.no_grad():
        for batches in ((2, 2), (3, 3), (3, 4)):
            x, y = (torch.randn(batch, 3, 8, 8) for batch in batches)
            torch.testing.assert_close(compiled(x, y), model(x, y))


def overwriting() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)).eval()


def inferred() -> nn.Module:
    with torch.inference_mode():
        return nets.make("residual")


PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[[], AbstractContextManager[Any]], str]] = {
    "training": (lambda: nets.make("residual").train(), torch.no_grad, "training mode; call model.eval"),
    "gradient": (lambda: nets.make("residual"), torch.enable_grad, "torch.no_grad"),
    "autocast": (
        lambda: nets.make("residual").requires_grad_(False),
        lambda: torch.autocast("cpu", torch.bfloat16),
        "autocast is on",
    ),
    "writes into its input": (overwriting, torch.no_grad, "writes into its input"),
    "weights of inference mode": (inferred, torch.inference_mode, "inference mode"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_cannot_be_fused_runs_in_plain_pytorch_with_one_warning(name: str) -> None:
    make, context, reason = PLAIN[name]
    model, expected = make(), make()
    compiled, x, y = torch.compile(model, backend=compile_graph), nets.example(seed=3), nets.example(seed=3)
    with context():
        with pytest.warns(UserWarning, match=f"in plain PyTorch: .*{reason}"):
            got = compiled(x)
        torch.testing.assert_close(got, expected(y), rtol=0, atol=0)
    torch.testing.assert_close(x, y)
    for key, value in expected.state_dict().items():  # statistics of norms too
        torch.testing.assert_close(model.state_dict()[key], value)
    assert got.requires_grad == (name == "gradient")


@pytest.mark.parametrize("settings", [{"mode": "reduce-overhead"}, {"options": {"max_autotune": True}}])
def test_settings_of_other_backends_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BackendCompilerFailed, match=f"takes no {next(iter(settings))}"):
        torch.compile(nets.make("residual"), backend=compile_graph, **settings)(nets.example())


def test_torch_finds_the_backend_by_its_name() -> None:
    if "dsp_kernels" not in entry_points(group="torch_dynamo_backends").names:
        pytest.skip(
            "dsp-kernels is not installed, or by an older version: pip install --no-build-isolation -e ."
        )
    code = (
        "import sys, torch; net, x = torch.nn.Conv2d(3, 4, 3).eval(), torch.ones(1, 3, 8, 8)\n"
        "with torch.no_grad(): y = torch.compile(net, backend='dsp_kernels')(x)\n"
        "assert 'dsp_kernels.program.fuse' in sys.modules and torch.allclose(y, net(x), atol=1e-5)"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, timeout=300)
