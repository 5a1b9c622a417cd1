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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels import fuse, load, save, swap
from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.graph.compare import largest_difference
from dsp_pruning import PruneWrapper, pack
from dsp_pruning.export import export_onnx

sys.path.insert(0, str(Path(__file__).parent.parent / "zoo"))
import stages

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FOLDER = Path(tempfile.mkdtemp())
Answer = tuple[bool, str]  # whether it is the right one
Function = Callable[[Any, Tensor], Tensor]


class _Net(nn.Module):
    """A function of the network and of two convolutions, whose groups read random channels."""

    def __init__(self, function: Function = lambda n, y: y, **layers: nn.Module) -> None:
        super().__init__()
        self.function, self.a, self.b = function, nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.b.register_buffer("mask", (torch.rand(2, 8, 1, 1) > 0.4).float().repeat_interleave(4, 0))
        self.b.weight.data *= self.b.mask
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.b(self.a(x)))


def _same(*pairs: tuple[Tensor, Tensor]) -> Answer:
    worst = max(difference / scale for difference, scale in (largest_difference(*pair) for pair in pairs))
    return worst <= 1e-5, f"differs by {worst:.1e} of the largest output"


def _saved(function: Function, **layers: nn.Module) -> Answer:
    packed = pack(net := _Net(function, **layers), X)
    try:
        save(packed, FOLDER / "net", X)
    except DSPFormatError as refusal:  # right if pack has said so
        return "cannot be saved" in str(packed.packing), str(refusal)
    return _same((net(X), load(FOLDER / "net")(X)), (net(X), fuse(packed, X)(X)))


def _refused(function: Function, words: str) -> Answer:
    try:
        return False, f"was packed: {pack(_Net(function), X).packing}"
    except DSPError as refusal:
        return words in str(refusal) and len(str(refusal)) < 500, str(refusal)


def _onnx() -> Answer:
    packed = pack(_Net(lambda n, y: n.last(y.relu()), last=nn.Conv2d(8, 4, 1)), X)
    file = export_onnx(packed, FOLDER / "net.onnx", X)
    return _same(*((packed(X), run(file)(X)[0]) for run in (stages.onnxruntime, stages.openvino)))


def _norm(n: Any, y: Tensor) -> Tensor:
    state = n.norm.running_mean, n.norm.running_var, n.norm.weight, n.norm.bias
    return F.batch_norm(y, *state).relu()


def _plain_steps() -> Answer:
    count = fuse(pack(_Net(_norm, norm=nn.BatchNorm2d(8)), X), X).explain().count("plain PyTorch:")
    return count == 0, f"{count} steps of fuse are plain PyTorch"


def _large_image() -> Answer:
    kept = []
    for make in (nn.Sequential, swap, lambda n: fuse(n, X)):
        layers = [nn.Conv2d(32 if i else 8, 32, 3, padding=1) for i in range(9)]
        net, resident = make(pack(_Net(lambda n, y: n.more(y), more=nn.Sequential(*layers)), X)), []
        for size in (32, 1024):
            with torch.no_grad():
                net(torch.zeros(1, 3, size, size))
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) // 256)
        kept.append(resident[1] - resident[0])
    return max(kept) <= kept[0] + 100, f"MB kept by PyTorch, swap, fuse: {kept}"


def _same_padding(n: Any, y: Tensor) -> Tensor:
    for layer in n.more:
        high, wide = (max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) for size in y.shape[2:])
        y = F.conv2d(F.pad(y, (0, wide, 0, high)), layer.weight, None, 2).relu()
    return y


def _seconds_by_layers() -> Answer:
    seconds = []
    for count in (1, 4):
        layers = nn.ModuleList(nn.Conv2d(8, 8, 3) for _ in range(count))
        net, start = _Net(_same_padding, more=layers), time.process_time()
        packed = pack(net, X)
        seconds.append(time.process_time() - start)
    return seconds[1] < 8 * seconds[0], "1 layer {:.2f} s, 4 {:.2f} s; {}".format(*seconds, packed.packing)


def _frozen() -> Answer:
    dfl = nn.Conv2d(8, 1, 1, bias=False).requires_grad_(False)
    dfl.weight.data[:] = torch.arange(8.0).view(1, 8, 1, 1)
    pruner = PruneWrapper(_Net(lambda n, y: n.dfl(y.softmax(1)), dfl=dfl), 1, 1)
    pruner.initialize(0.4)
    return dfl.weight.flatten().tolist() == list(range(8)), f"dfl: {pruner.survey.excluded['dfl']}"


def _split(n: Any, y: Tensor) -> Tensor:
    kept, changed = list(y.chunk(2, 1))
    return n.d(torch.cat([kept, changed + n.c(changed)], 1))


def _traced_by_fx() -> Answer:
    nets = pack(_Net(), X), swap(pack(_Net(), X))
    return _same(*((net(X), torch.fx.symbolic_trace(net)(X)) for net in nets))


def _layout() -> Answer:
    nets, last = (pack(_Net(), X), fuse(pack(_Net(), X), X)), torch.channels_last
    kept = [net(X.to(memory_format=last)).is_contiguous(memory_format=last) for net in nets]
    return all(kept), f"channels_last in packed, fused: {kept}"


SAVED: dict[str, Function] = {
    "repeat": lambda n, y: y.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda n, y: y.repeat_interleave(2, 1),
    "std": lambda n, y: y / (1 + y.std((2, 3), keepdim=True)),
    "flip": lambda n, y: n.b(y.flip(1)),
    "pixel_shuffle": lambda n, y: F.pixel_shuffle(y, 2),
    "arange": lambda n, y: y * torch.arange(32.0),
    "einsum": lambda n, y: torch.einsum("bchw,bdhw->bcd", y, y),
    "unfold": lambda n, y: F.unfold(y, 3),
    "max_unpool2d": lambda n, y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
}
CASES: dict[str, Callable[[], Answer]] = {
    "A ONNX in ONNX Runtime and OpenVINO": _onnx,
    "B functional batch norm": _plain_steps,
    "C a large image": _large_image,
    "D chunks": lambda: _saved(_split, c=nn.Conv2d(4, 4, 3, 1, 1), d=nn.Conv2d(8, 4, 1)),
    "E TensorFlow's same padding": _seconds_by_layers,
    "F frozen layers": _frozen,
    "G torch.fx": _traced_by_fx,
    "H a condition on values": lambda: _refused(lambda n, y: y if y.sum() > 0 else -y, "bugs.py"),
    **{f"I {name}": partial(_saved, run) for name, run in SAVED.items()},
    "J random answers": lambda: _refused(lambda n, y: F.dropout(y), "call to call"),
    "J channels_last": _layout,
}

if __name__ == "__main__":
    wrong = 0
    for name, run in CASES.items():
        torch.manual_seed(0)
        try:
            right, text = run()
        except Exception as failure:
            right, text = False, f"{type(failure).__name__}: {failure}"
        wrong += not right
        print(f"{'right' if right else 'WRONG'}  {name}: {' '.join(text.split())[:150]}", flush=True)
    sys.exit(bool(wrong))
