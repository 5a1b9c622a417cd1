"""The zoo: networks of torchvision and timm, and what learning, pruning and packing do to them."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPPruningError
from dsp_pruning import GroupWrapper, PruneWrapper, pack
from dsp_pruning.packing.report import PackingReport
from dsp_pruning.prune.report import PruningReport

MOST_PARAMETERS = 150_000_000
SEGMENTATION = ("fcn_resnet50", "deeplabv3_resnet50")
TIMM = (
    *("resnet26d", "seresnet18", "ese_vovnet19b_dw", "ghostnet_100", "dla34", "hrnet_w18_small"),
    *("res2net50_26w_4s", "mobilenetv3_small_100", "efficientnet_lite0", "regnetx_002"),
)
# For the test suite: residual streams, concatenation, gates, shuffles, fire modules, branches.
CI = (
    *("resnet18", "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet", "mnasnet0_5"),
    *("regnet_y_400mf", "densenet121"),
)
_GROUPS = 4


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

    It has its auxiliary heads, if any.
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


def side(name: str) -> int:
    """Height and width of the network's images here."""
    return 96 if name == "inception_v3" else 64


def images(batch: int, height: int, width: int | None = None) -> Tensor:
    """(batch, 3, height, width), float64; seeded."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width or height, generator=generator, dtype=torch.float64)


def loss_of(output: Any, _: Any = None) -> Tensor:
    """A scalar that depends on every output, whatever its structure."""
    return torch.stack([tensor.square().mean() for tensor in _tensors(output)]).sum()


def learn(name: str, second_order: Any, steps: int = 3) -> GroupWrapper:
    """Learn groups. Raises AssertionError if a value is not finite or a layer's logits did not move."""
    model, size = build(name).float().train(), side(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    learner = GroupWrapper(
        *(model, optimizer, loss_of, 2e-3, steps, lambda _, conv: min(_GROUPS, conv.out_channels), 0.5),
        example_input=torch.zeros(1, 3, size, size),
        second_order=second_order,
    )
    before = [layer.conv.group.detach().clone() for layer in learner.layers.chosen]
    for _ in range(steps):
        x = torch.randn(4, 3, size, size)
        learner.initialize()
        optimizer.zero_grad(set_to_none=True)
        loss_of(learner(x)).backward()
        optimizer.step()
        learner.after_step(x, None)
    assert all(bool(tensor.isfinite().all()) for tensor in (*model.parameters(), *model.buffers()))
    for layer, start in zip(learner.layers.chosen, before, strict=True):
        assert layer.out_channels == 1 or layer.conv.group.ne(start).any(), layer.name
    return learner


def prune(name: str, rate: float, steps: int = 3) -> tuple[PruningReport, float]:
    """Prune random weights with random groups, or to the nearest rate within reach, and train a little.

    Returns the report after training, and the seconds that pruning took.
    """
    model, size = build(name).float(), side(name)
    start = time.perf_counter()
    groups = lambda _, conv: min(_GROUPS, conv.out_channels)  # noqa: E731
    pruner = PruneWrapper(model, groups, 2, example_input=torch.randn(1, 3, size, size))
    for layer in pruner.layers:
        layer.conv.get_buffer("group").normal_()
    try:
        flops, _ = pruner.initialize(rate)
    except DSPPruningError:
        flops, _ = pruner.initialize(pruner.reachable()[1])
    seconds = time.perf_counter() - start
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(pruner(torch.randn(2, 3, size, size))).backward()
        optimizer.step()
        pruner.after_step()
    assert all(bool(tensor.isfinite().all()) for tensor in (*model.parameters(), *model.buffers()))
    report = pruner.report()
    assert report.pruned_flops == flops
    return report, seconds


def scramble(model: nn.Module, rate: float, seed: int, n_groups: int = _GROUPS) -> nn.Module:
    """Random group masks on every dense conv but the first, and random norms and biases.

    One half of the pruned filters has a cleared norm, as the pruner leaves it. The other half has a norm with
    a shift, which makes the filter a constant that its readers see.
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


@dataclass(frozen=True)
class Packed:
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


def pack_masked(name: str, rate: float, seed: int = 0) -> Packed:
    """Pack a network with random masks and compare it with the masked one, in two precisions and sizes."""
    model = scramble(build(name), rate, seed)
    size = side(name)
    inputs = [images(1, size), images(2, size + 32, size)]
    start = time.perf_counter()
    packed = pack(model, inputs[0])
    seconds = time.perf_counter() - start
    report = packed.packing
    assert isinstance(report, PackingReport)
    expected = copy.deepcopy(model)  # ``scramble`` multiplied the masks into the weights
    before, after = _macs(expected, inputs[0]), _macs(packed, inputs[0])
    error_64 = largest_error(expected, packed, inputs)
    error_32 = largest_error(expected.float(), packed.float(), [x.float() for x in inputs])
    channels = sum(module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    left = sum(m.out_channels for m in packed.modules() if isinstance(m, nn.Conv2d | PackedConv2d))
    barriers = tuple(_operation(barrier.reason) for barrier in report.barriers if barrier.kept)
    return Packed(
        *(name, rate, channels - left, channels, before, after, report.folded, barriers, seconds),
        *(error_64, error_32),
    )


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
    else:
        for part in output.values() if isinstance(output, Mapping) else output:
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


def _operation(reason: str) -> str:
    """The operation that a barrier's reason names."""
    return reason.partition("(")[2].partition(",")[0].strip() or reason
