"""Small inputs from public bug reports of pruning and deployment tools, and the right answer of each.

``python scripts/evidence/bugs.py`` prints a line per input; exit status 1 if an answer is not the right one.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.graph.compare import largest_difference
from dsp_pruning import PruneWrapper, pack
from dsp_pruning.export import export_onnx

sys.path.insert(0, str(Path(__file__).parent.parent / "zoo"))
import stages

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LAST = torch.channels_last
Answer = tuple[bool, str]


class _Net(nn.Module):
    """Convolutions a (3 -> 8), b (8 -> 8), ..., and a function of x and them.

    From b on half of the filters read one random set of channels, half another.
    """

    def __init__(self, forward: Callable[..., Tensor], **widths: tuple[int, int]) -> None:
        super().__init__()
        self.function = forward
        for name, (c, o) in {"a": (3, 8), "b": (8, 8), **widths}.items():
            layer = nn.Conv2d(c, o, 3, padding=1)
            self.add_module(name, layer)
            if name != "a":
                layer.register_buffer(
                    "mask", (torch.rand(2, c, 1, 1) > 0.4).float().repeat_interleave(o // 2, 0)
                )
                layer.weight.data *= layer.mask
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class _BNAct(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        state = self.running_mean, self.running_var, self.weight, self.bias
        return F.relu(F.batch_norm(x, *state, False, 0.0, self.eps))


class _Same(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        pads = [max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in (x.shape[-1], x.shape[-2])]
        x = F.pad(x, [part for pad in pads for part in (pad // 2, pad - pad // 2)])
        return F.conv2d(x, self.weight, self.bias, self.stride)


def _same(*pairs: tuple[Tensor, Tensor]) -> Answer:
    errors = [difference / scale for difference, scale in (largest_difference(*pair) for pair in pairs)]
    return max(errors) <= 1e-5, f"differs by {max(errors):.1e} of the largest output"


def _plain(net: nn.Module) -> Answer:
    count = dsp_kernels.fuse(pack(net, X), X).explain().count("plain PyTorch:")
    return count == 0, f"{count} steps of fuse are plain PyTorch"


def _saved(net: nn.Module) -> Answer:
    packed = pack(net, X)
    with tempfile.TemporaryDirectory() as folder:
        try:
            dsp_kernels.save(packed, f"{folder}/net", X)
        except DSPFormatError as refusal:  # right if pack has said so
            return "cannot be saved" in str(packed.packing), str(refusal)
        return _same((net(X), dsp_kernels.load(f"{folder}/net")(X)), (net(X), dsp_kernels.fuse(packed, X)(X)))


def _refused(net: nn.Module, words: str) -> Answer:
    try:
        pack(net, X)
    except DSPError as refusal:
        return words in str(refusal) and len(str(refusal)) < 500, str(refusal)
    return False, "was packed"


def _onnx() -> Answer:
    packed = pack(_Net(lambda n, x: n.last(n.b(n.a(x)).relu()), last=(8, 4)), X)
    packed.last = nn.Conv2d(packed.last.in_channels, 4, 1)
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(packed, f"{folder}/net.onnx", X)
        return _same(*((packed(X), run(file)(X)[0]) for run in (stages.onnxruntime, stages.openvino)))


def _scratch() -> Answer:
    def megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) / 256

    names = {f"c{number}": (8 if number == 0 else 32, 32) for number in range(9)}
    kept = []
    for make in (lambda n: n, dsp_kernels.swap, lambda n: dsp_kernels.fuse(n, X)):
        net = make(
            pack(_Net(lambda n, x: n.c8(n.c7(n.c6(n.c5(n.c4(n.c3(n.c2(n.c1(n.c0(n.a(x)))))))))), **names), X)
        )
        with torch.no_grad():
            net(X)
            before = megabytes()
            net(torch.zeros(1, 3, 1024, 1024))
            kept.append(megabytes() - before)
    return max(kept[1:]) <= kept[0] + 100, "kept MB: PyTorch {:.0f}, swap {:.0f}, fuse {:.0f}".format(*kept)


def _split(net: nn.Module, x: Tensor) -> Tensor:
    y = list(net.b(net.a(x)).chunk(2, 1))
    return net.d(torch.cat([y[0], y[1] + net.c(y[1])], 1))


def _padded() -> Answer:
    seconds = []
    for count in (1, 5):
        layers = [layer for i in range(count) for layer in (_Same(8 if i else 3, 8, 3, 2), nn.ReLU())]
        start = time.process_time()
        packed = pack(nn.Sequential(*layers, nn.Conv2d(8, 4, 1)).eval(), X)
        seconds.append(time.process_time() - start)
    return seconds[1] < 10 * seconds[0], "1 layer {:.2f} s, 5 {:.2f} s; {}".format(*seconds, packed.packing)


def _frozen() -> Answer:
    net = _Net(lambda n, x: n.dfl(n.b(n.a(x).relu()).softmax(1)))
    net.dfl = nn.Conv2d(8, 1, 1, bias=False).requires_grad_(False)
    net.dfl.weight.data[:] = torch.arange(8.0).view(1, 8, 1, 1)
    pruner = PruneWrapper(net, 1, fp_every_nth_conv=1)
    pruner.initialize(0.4)
    return net.dfl.weight.flatten().tolist() == list(range(8)), f"dfl: {pruner.survey.excluded['dfl']}"


def _fx() -> Answer:
    net = pack(_Net(lambda n, x: n.b(n.a(x))), X)
    return _same(
        *((net(X), torch.fx.symbolic_trace(run)(X)) for run in (net, dsp_kernels.swap(pack(net, X))))
    )


def _layout() -> Answer:
    net, x = pack(_Net(lambda n, x: n.b(n.a(x))), X), X.to(memory_format=LAST)
    kept = [run(x).is_contiguous(memory_format=LAST) for run in (net, dsp_kernels.fuse(net, X))]
    return all(kept), f"packed {kept[0]}, fused {kept[1]}"


_OPERATIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "repeat": lambda n, x: n.b(n.a(x)).repeat(1, 2, 1, 1),
    "repeat_interleave": lambda n, x: n.b(n.a(x)).repeat_interleave(2, 1),
    "std": lambda n, x: n.b(n.a(x)) / (1 + n.b(n.a(x)).std((2, 3), keepdim=True)),
    "flip": lambda n, x: n.b(n.a(x).flip(1)),
    "pixel_shuffle": lambda n, x: F.pixel_shuffle(n.b(n.a(x)), 2),
    "arange": lambda n, x: n.b(n.a(x)) * torch.arange(32.0),
    "einsum": lambda n, x: torch.einsum("bchw,bdhw->bcd", n.b(n.a(x)), n.a(x)),
    "unfold": lambda n, x: F.unfold(n.b(n.a(x)), 3),
    "max_unpool2d": lambda n, x: F.max_unpool2d(*F.max_pool2d(n.b(n.a(x)), 2, return_indices=True), 2),
}
_CASES: dict[str, Callable[[], Answer]] = {
    "A ONNX in ONNX Runtime and OpenVINO": _onnx,
    "B functional batch norm": lambda: _plain(nn.Sequential(nn.Conv2d(3, 8, 3), _BNAct(8)).eval()),
    "C a large image": _scratch,
    "D chunk, absent filters": lambda: _saved(_Net(_split, c=(4, 4), d=(8, 4))),
    "E TensorFlow's same padding": _padded,
    "F frozen layers": _frozen,
    "G torch.fx on packed and swapped networks": _fx,
    "H a condition on values": lambda: _refused(_Net(lambda n, x: n.a(x) if x.sum() > 0 else x), "bugs.py"),
    **{f"I {name}": partial(lambda run: _saved(_Net(run)), run) for name, run in _OPERATIONS.items()},
    "J random answers": lambda: _refused(_Net(lambda n, x: n.b(F.dropout(n.a(x)))), "call to call"),
    "J channels_last": _layout,
}


def main() -> int:
    """Print every answer; the exit status."""
    wrong = 0
    for name, run in _CASES.items():
        torch.manual_seed(0)
        try:
            right, text = run()
        except Exception as failure:
            right, text = False, f"{type(failure).__name__}: {failure}"
        wrong += not right
        print(f"{'right' if right else 'WRONG'}  {name}: {' '.join(text.split())[:150]}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
