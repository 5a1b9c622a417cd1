"""torchvision's ResNets under a name that a saved file can hold."""

from __future__ import annotations

from torch import nn

from dsp_kernels.errors import DSPPruningError

__all__ = ["torchvision_resnet"]

_VARIANTS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def torchvision_resnet(variant: str = "resnet18", num_classes: int = 1000) -> nn.Module:
    """A torchvision ResNet: x (batch, 3, height, width) -> logits (batch, num_classes).

    The weights are random; load trained ones with ``load_state_dict``.
    Raises DSPPruningError for an unknown variant or a class count below 1.
    """
    if variant not in _VARIANTS:
        raise DSPPruningError(f"variant is {variant!r}; expected one of {', '.join(_VARIANTS)}")
    if not isinstance(num_classes, int) or not 1 <= num_classes <= 1_000_000:
        raise DSPPruningError(f"num_classes is {num_classes!r}; expected 1 to 1,000,000")
    import torchvision  # an extra: the runtime and CIFAR need no torchvision

    model = getattr(torchvision.models, variant)(weights=None, num_classes=num_classes)
    model.architecture = {
        "name": "torchvision_resnet",
        "args": {"variant": variant, "num_classes": num_classes},
    }
    return model
