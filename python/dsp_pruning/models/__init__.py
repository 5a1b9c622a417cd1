"""Reference models: CIFAR and torchvision ResNets."""

from dsp_pruning.models.cifar import CifarResNet, cifar_resnet
from dsp_pruning.models.imagenet import torchvision_resnet

__all__ = ["CifarResNet", "cifar_resnet", "torchvision_resnet"]
