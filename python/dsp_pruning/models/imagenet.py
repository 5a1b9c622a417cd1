"""torchvision's ResNets by name."""

from collections.abc import Mapping

from torch import Tensor, nn

from dsp_kernels.errors import DSPError
from dsp_pruning.checks import check, check_one_of

# Blocks per stage, and whether they are bottlenecks (He et al. 2016, table 1).
_VARIANTS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def torchvision_resnet(variant: str = "resnet18", num_classes: int = 1000) -> nn.Module:
    """ResNet of torchvision: images (batch, 3, height, width) -> logits (batch, num_classes). Random weights.

    variant: resnet18, resnet34, resnet50, resnet101 or resnet152.
    Raises DSPPruningError for another variant, or num_classes below 1.

    >>> torchvision_resnet("resnet18", num_classes=10).fc.out_features
    10
    """
    check_one_of("variant", variant, tuple(_VARIANTS.values()))
    valid = isinstance(num_classes, int) and 1 <= num_classes <= 1_000_000
    check(valid, "num_classes", num_classes, "1 to 1,000,000")
    import torchvision  # an extra: the runtime and CIFAR need no torchvision

    return getattr(torchvision.models, variant)(weights=None, num_classes=num_classes)


def published_weights(variant: str) -> dict[str, Tensor]:
    """State dict of a variant trained on ImageNet by torchvision, downloaded once."""
    check_one_of("variant", variant, tuple(_VARIANTS.values()))
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(variant).DEFAULT
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (OSError, RuntimeError) as error:
        raise DSPError(f"torchvision's weights of {variant} cannot be downloaded: {error}") from error


def variant_of(weights: Mapping[str, Tensor]) -> str | None:
    """The torchvision ResNet that a state dict belongs to, by its names; None for another network."""
    if "fc.weight" not in weights or "layer1.0.conv1.weight" not in weights:
        return None
    blocks = tuple(
        len({name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    return _VARIANTS.get((blocks, "layer1.0.conv3.weight" in weights))
