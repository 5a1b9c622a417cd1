"""The zoo: networks of torchvision and timm, and what learning, pruning and packing do to them."""

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPPruningError
from dsp_kernels.graph.compare import largest_difference, tensors_of
from dsp_pruning import PruneWrapper, pack
from dsp_pruning.packing.report import PackingReport
from dsp_pruning.report import network_cost

MOST_PARAMETERS = 150_000_000
SEGMENTATION = ("fcn_resnet50", "deeplabv3_resnet50")
# One standard network of each CNN family of timm, at its registered width; chosen before the first run.
# Of LeViT only the convolutional stem.
TIMM = (
    *("efficientnet_b0", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small", "regnetx_002"),
    *("repvgg_a0", "ghostnet_100", "tf_efficientnet_b0", "resnetv2_50", "resnest26d", "res2net50_26w_4s"),
    *("skresnet18", "dla34", "hrnet_w18_small", "ese_vovnet19b_dw", "cspresnet50", "densenet121", "dpn68"),
    *("xception41", "inception_v4", "nasnetalarge", "mixnet_s", "tinynet_a", "fbnetc_100", "hardcorenas_a"),
    *("lcnet_100", "levit_128s", "convnext_tiny", "edgenext_small", "fastvit_t8", "mobileone_s0"),
    "selecsls42b",
)
_GROUPS = 4
_NORMS = {"running_mean": (-0.3, 0.3), "running_var": (0.5, 1.5), "weight": (0.7, 1.4), "bias": (-0.5, 0.5)}


def names() -> list[str]:
    """Every classification CNN of torchvision up to 150 M parameters, and two for segmentation."""
    from torchvision import models

    found = []
    for name in models.list_models(module=models):
        if not any(word in name for word in ("vit", "swin", "maxvit")):
            weights = models.get_model_weights(name)
            if next(iter(weights)).meta["num_params"] <= MOST_PARAMETERS:
                found.append(name)
    return [*found, *SEGMENTATION]


def build(name: str) -> nn.Module:
    """The network with random weights, 10 classes, float64 and in eval mode. torchvision's, or "timm/...".

    It has its auxiliary heads, if any.
    """
    torch.manual_seed(0)
    if name.startswith("timm/"):
        import timm

        model = timm.create_model(name.removeprefix("timm/"), pretrained=False, num_classes=10)
        model = model.stem if name == "timm/levit_128s" else model
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


def pruned(model: nn.Module, x: Tensor, n_groups: int, rate: float) -> PruneWrapper:
    """The pruner of a network with random groups, pruned to the rate or as far as possible."""
    pruner = PruneWrapper(model, n_groups, 2, example_input=x)
    for layer in pruner.layers:
        layer.conv.get_buffer("group").normal_()
    try:
        pruner.initialize(rate)
    except DSPPruningError:
        pruner.initialize(pruner.reachable()[1])
    return pruner


def settle(model: nn.Module) -> nn.Module:
    """Norms that are not the identity, in place; seeded."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            for name, (low, high) in _NORMS.items():
                if isinstance(tensor := getattr(module, name, None), Tensor):
                    tensor.data.uniform_(low, high, generator=generator)
    return model


def scramble(model: nn.Module, rate: float, seed: int = 0) -> nn.Module:
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
                    group = torch.randint(0, _GROUPS, (rows,), generator=generator)
                    channels = torch.rand(_GROUPS, columns, generator=generator) >= rate
                    mask = channels[group] & (torch.rand(rows, 1, generator=generator) >= rate)
                    module.register_buffer("mask", mask[:, :, None, None].double())
                    module.weight.mul_(module.mask)
                    gone = ~mask.any(1)
                first = False
            elif isinstance(module, nn.BatchNorm2d):
                for name, (low, high) in _NORMS.items():
                    getattr(module, name).uniform_(low, high, generator=generator)
                if gone is not None and len(gone) == module.num_features:
                    cleared = gone & (torch.rand(len(gone), generator=generator) < 0.5)
                    module.weight[cleared] = 0
                    module.bias[cleared] = 0
    return model


@dataclass(frozen=True)
class Packed:
    """A network packed at one rate. channels: of all convolutions; errors: over the largest output."""

    report: PackingReport
    removed: int
    channels: int
    macs_before: int
    macs_after: int
    seconds: float
    error_64: float
    error_32: float


def pack_masked(name: str, rate: float) -> Packed:
    """Pack a network with random masks and compare it with the masked one, in two precisions and sizes."""
    model = scramble(build(name), rate)
    size = side(name)
    inputs = [images(1, size), images(2, size + 32, size)]
    start = time.process_time()
    packed = pack(model, inputs[0])
    seconds = time.process_time() - start
    macs = [network_cost(network, inputs[0]).macs for network in (model, packed)]
    channels = sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    left = sum(m.out_channels for m in packed.modules() if isinstance(m, nn.Conv2d | PackedConv2d))
    expected = copy.deepcopy(model)  # ``scramble`` multiplied the masks into the weights
    error_64 = largest_error(expected, packed, inputs)
    error_32 = largest_error(expected.float(), packed.float(), [x.float() for x in inputs])
    return Packed(packed.packing, channels - left, channels, *macs, seconds, error_64, error_32)


@torch.no_grad()
def largest_error(expected: nn.Module, packed: nn.Module, inputs: list[Tensor]) -> float:
    """The largest difference of two networks over the largest output, over all inputs and outputs."""
    errors = []
    for x in inputs:
        for right, got in zip(tensors_of(expected(x)), tensors_of(packed(x)), strict=True):
            assert bool(right.isfinite().all())
            difference, scale = largest_difference(right, got)
            errors.append(difference / scale)
    return float(torch.tensor(errors).max())  # NaN if one is
