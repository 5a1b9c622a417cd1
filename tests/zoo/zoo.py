"""Networks of torchvision and timm under random masks, random norms and an adversary; and how they pack."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels import PackedConv2d
from dsp_pruning import pack
from dsp_pruning.packing.report import PackingReport

MOST_PARAMETERS = 150_000_000
SEGMENTATION = ("fcn_resnet50", "deeplabv3_resnet50")
TIMM = (
    *("resnet26d", "seresnet18", "ese_vovnet19b_dw", "ghostnet_100", "dla34", "hrnet_w18_small"),
    *("res2net50_26w_4s", "mobilenetv3_small_100", "efficientnet_lite0", "regnetx_002"),
)
# A few of every way in which channels go: streams, concatenation, gates, shuffles, fire, branches, timm.
CI = (
    *("resnet18", "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet", "mnasnet0_5"),
    *("regnet_y_400mf", "densenet121"),
)
_SMALLEST = {"inception_v3": 96}


@dataclass(frozen=True)
class Result:
    """One network packed at one rate; errors are relative to the largest output."""

    name: str
    rate: float
    removed: int
    channels: int
    macs_before: int
    macs_after: int
    folded: int
    barriers: tuple[str, ...]
    seconds: float
    error_64: float
    error_32: float


def names() -> list[str]:
    """Every classification CNN of torchvision up to 150 M parameters, two for segmentation, ten of timm."""
    from torchvision import models

    found = []
    for name in models.list_models(module=models):
        if not any(word in name for word in ("vit", "swin", "maxvit")):
            weights = models.get_model_weights(name)
            if next(iter(weights)).meta["num_params"] <= MOST_PARAMETERS:
                found.append(name)
    return [*found, *SEGMENTATION, *(f"timm/{name}" for name in TIMM)]


def build(name: str) -> nn.Module:
    """The network with random weights, 10 classes, float64 and in eval mode. torchvision's, or "timm/...".

    Auxiliary heads are on where a network has them.
    """
    torch.manual_seed(0)
    if name.startswith("timm/"):
        import timm

        model = timm.create_model(name.removeprefix("timm/"), pretrained=False, num_classes=10)
    else:
        from torchvision import models

        settings: dict[str, Any] = {"num_classes": 10, "weights": None}
        if name in SEGMENTATION:
            settings |= {"weights_backbone": None, "aux_loss": True}
        if name in ("googlenet", "inception_v3"):
            settings["init_weights"] = False
        model = models.get_model(name, **settings)
    return model.double().eval()


def scramble(model: nn.Module, rate: float, seed: int, n_groups: int = 4) -> nn.Module:
    """Random group masks on every dense conv but the first, and random norms and biases.

    Of the pruned filters one half has a cleared norm, as the pruner leaves it; the other half is the
    adversary: a norm with a shift, which is a constant that the filter's readers see.
    """
    generator = torch.Generator().manual_seed(seed)
    gone: Tensor | None = None
    first = True
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                if module.bias is not None:
                    module.bias.uniform_(-0.2, 0.2, generator=generator)
                gone = None
                if module.groups == 1 and not first:
                    rows, columns = module.weight.shape[:2]
                    group = torch.randint(0, n_groups, (rows,), generator=generator)
                    channels = torch.rand(n_groups, columns, generator=generator) >= rate
                    mask = channels[group] & (torch.rand(rows, 1, generator=generator) >= rate)
                    module.register_buffer("mask", mask[:, :, None, None].double())
                    module.weight.mul_(module.mask)
                    gone = ~mask.any(1)
                first = False
            elif isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.running_mean, -0.3, 0.3),
                    (module.running_var, 0.5, 1.5),
                    (module.weight, 0.7, 1.4),
                    (module.bias, -0.5, 0.5),
                ):
                    tensor.uniform_(low, high, generator=generator)
                if gone is not None and len(gone) == module.num_features:
                    cleared = gone & (torch.rand(len(gone), generator=generator) < 0.5)
                    module.weight[cleared] = 0
                    module.bias[cleared] = 0
    return model


def masked(model: nn.Module) -> nn.Module:
    """The dense network with its masks multiplied in."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and hasattr(module, "mask"):
                module.weight.mul_(module.mask)
    return model


def run(name: str, rate: float, seed: int = 0) -> Result:
    """Pack a network at a rate and compare it with the masked one, in two precisions, at two sizes."""
    model = scramble(build(name), rate, seed)
    size = _SMALLEST.get(name, 64)
    shapes = ((1, size, size), (2, size + 32, size))
    inputs = [images(batch, height, width) for batch, height, width in shapes]
    start = time.perf_counter()
    packed = pack(model, inputs[0])
    seconds = time.perf_counter() - start
    report = packed.packing
    assert isinstance(report, PackingReport)
    expected = masked(model)
    before, after = _macs(expected, inputs[0]), _macs(packed, inputs[0])
    error_64 = largest_error(expected, packed, inputs)
    error_32 = largest_error(expected.float(), packed.float(), [x.float() for x in inputs])
    channels = sum(module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    left = sum(m.out_channels for m in packed.modules() if isinstance(m, nn.Conv2d | PackedConv2d))
    barriers = tuple(_short(barrier.reason) for barrier in report.barriers if barrier.kept)
    return Result(
        *(name, rate, channels - left, channels, before, after, report.folded, barriers, seconds),
        *(error_64, error_32),
    )


def images(batch: int, height: int, width: int | None = None) -> Tensor:
    """(batch, 3, height, width), float64; seeded."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width or height, generator=generator, dtype=torch.float64)


@torch.no_grad()
def largest_error(expected: nn.Module, packed: nn.Module, inputs: list[Tensor]) -> float:
    """The largest difference of two networks over the largest output, over all inputs and outputs."""
    worst = 0.0
    for x in inputs:
        for right, got in zip(_tensors(expected(x)), _tensors(packed(x)), strict=True):
            assert bool(right.isfinite().all())
            worst = max(worst, ((right - got).abs().max() / right.abs().max()).item())
    return worst


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    for part in output.values() if isinstance(output, Mapping) else ():
        yield from _tensors(part)


@torch.no_grad()
def _macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of convolutions and linear layers for one input."""
    total = 0

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weights = module.weights if isinstance(module, PackedConv2d) else [module.weight]
        places = output[0, 0].numel() if output.dim() == 4 and not isinstance(module, nn.Linear) else 1
        if isinstance(module, nn.Linear):
            places = output[..., 0].numel()
        total += sum(weight.numel() for weight in weights) * places

    kinds = (nn.Conv2d, nn.Linear, PackedConv2d)
    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]
    model(x)
    for handle in handles:
        handle.remove()
    return total


def _short(reason: str) -> str:
    """The operation that a reason names: what it runs, without the node's own name."""
    return reason.partition("(")[2].partition(",")[0].strip() or reason
