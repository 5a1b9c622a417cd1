"""Networks to measure, by name: the real ones, CIFAR and torchvision architectures, any saved file."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.file.save_load import input_channels
from dsp_kernels.program.steps import Program
from dsp_pruning import read_released
from dsp_pruning.data import normalise
from dsp_pruning.data.load import CIFAR10_MEAN, CIFAR10_STD
from dsp_pruning.models import cifar_resnet, torchvision_resnet
from dsp_pruning.packing.twin import dense_twin
from dsp_pruning.released.download import find_shared
from dsp_pruning.released.load import load_released

from ..measure.floors import program_of
from .forms import compacted, filter_pruned, widened
from .released_form import ReleasedForm
from .structures import apply_structure

# form -> the form whose output, in plain PyTorch and float32, it must reproduce.
REFERENCE = {
    "dense": "dense",
    "released": "packed",
    "packed": "packed",
    "compacted": "packed",
    "filters": "filters",
}
FORMS = tuple(REFERENCE)
GENERATED = " (generated)"  # in names and labels: from a seed, in place of what the authors published
# Share of the grouped layers' FLOPs without which random groups have the released network's multiply-adds.
_RATES = {
    "resnet20_g2": 0.612,
    "resnet20_g3": 0.624,
    "resnet20_g4": 0.635,
    "resnet56_g2": 0.633,
    "resnet56_g3": 0.641,
    "resnet56_g4": 0.651,
}
_TRAINING, _RANDOM = 256, 32  # images on which int8 engines find the range of every value


@dataclass(frozen=True)
class NetworkSource:
    """What to measure.

    name: a released network (``resnet56_g4``), an architecture with a released structure
    (``resnet50_g2_80``), an architecture (``cifar_resnet56``, ``resnet50``) or a file (.npz or .pt of a
    released CIFAR network, .safetensors of a saved one). structure: how an architecture is pruned, see
    ``structures.apply_structure``. image_size: height and width; None: the usual one.
    """

    name: str
    structure: str | None = None
    image_size: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Labelled:
    """images: (n, channels, height, width), float32, normalised as in training; labels: (n,), int64."""

    images: Tensor
    labels: Tensor


class Network:
    """One network in all its forms, each built when first used, in eval mode on the CPU.

    label: what it is and where its structure comes from. released: whether it has the authors' form of
    execution. labelled: test images of its data set, training: of its training images, normalised too; None
    without real weights.
    """

    def __init__(
        self,
        label: str,
        packed: nn.Module,
        dense: nn.Module,
        image_size: int,
        released: bool = False,
        labelled: Labelled | None = None,
        training: Tensor | None = None,
        quantized: nn.Module | None = None,
    ) -> None:
        self.label = label
        self.packed = packed.eval()
        self.dense = dense.eval()
        self.image_size = image_size
        self.released = released
        self.labelled = labelled
        self.training = training
        self._forms: dict[str, nn.Module] = {"packed": self.packed, "dense": self.dense}
        if quantized is not None:
            self._forms["quantized"] = quantized
        self._programs: dict[str, Program] = {}

    @cached_property
    def example(self) -> Tensor:
        """(1, channels, image_size, image_size), zeros."""
        return torch.zeros(1, input_channels(self.dense), self.image_size, self.image_size)

    def images(self, count: int, seed: int) -> Tensor:
        """(count, channels, image_size, image_size): training images, else standard normal."""
        if self.training is not None:
            return self.training[torch.arange(count) % len(self.training)]
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.example.shape[1:], generator=generator)

    @property
    def calibration(self) -> Tensor:
        """Images on which int8 engines find the range of every value."""
        return self.images(_RANDOM, 0) if self.training is None else self.training

    @property
    def is_quantized(self) -> bool:
        """Whether there is a form "quantized": the packed network as its file holds it."""
        return "quantized" in self._forms

    def form_on(self, name: str, device: torch.device) -> nn.Module:
        """The network in one form on a device: elsewhere than on the CPU a copy, made once."""
        if device.type == "cpu":
            return self.form(name)
        key = f"{name} on {device}"
        if key not in self._forms:
            self._forms[key] = copy.deepcopy(self.form(name)).to(device)
        return self._forms[key]

    def form(self, name: str) -> nn.Module:
        """The network in one form, on the CPU. Raises DSPError if it does not have it."""
        if name not in self._forms:
            if name == "released" and not self.released:
                raise DSPError("only a network that the authors released has their form of execution")
            build = {
                "released": lambda: ReleasedForm(self.packed),
                "compacted": lambda: compacted(self.packed),
                "filters": lambda: filter_pruned(self.dense, self.example, self.macs("packed")),
            }[name]
            self._forms[name] = _seeded(build, 0)
        return self._forms[name]

    def program(self, form: str) -> Program:
        """The steps of the form's reference, for counting what must be computed."""
        name = REFERENCE[form]
        if name not in self._programs:
            self._programs[name] = program_of(self.form(name), self.example)
        return self._programs[name]

    def macs(self, form: str) -> int:
        """Useful multiply-adds of one image; the zeros of the compacted form do not count."""
        return self.program(form).macs


def load_network(source: NetworkSource) -> Network:
    """Build a network. Raises DSPFormatError for an unknown name or a file that holds no network."""
    name = source.name
    path = Path(name)
    if match := re.fullmatch(r"(resnet\d+)_g(\d)(?:_(\d\d))?", name):
        return _published(source, *match.groups())
    if path.suffix in (".npz", ".pt"):
        packed: Any = read_released(path) if path.suffix == ".npz" else load_released(path)
        if packed.dense_widths is None:
            raise DSPFormatError(f"{path} is no CIFAR ResNet; measure the file that `dsp import` makes of it")
        label, size = f"{path.stem}, real weights", source.image_size or 32
        dense = widened(compacted(packed), dense_twin(packed))
        labelled, training = _cifar10(packed.classifier.out_features, size)
        return Network(label, packed, dense, size, True, labelled, training)
    if path.suffix == ".safetensors":
        loaded = dsp_kernels.load(path)
        quantized = loaded if isinstance(loaded, dsp_kernels.FusedNetwork) else None
        saved: Any = loaded if quantized is None else loaded.packed
        if len(getattr(saved, "example_shapes", ())) > 1:
            raise DSPFormatError(f"{path} takes several inputs; only networks of one image can be measured")
        shape: tuple[int, ...] = getattr(saved, "example_shape", None) or ()
        size = source.image_size or (int(shape[2]) if len(shape) == 4 else 32)
        known = getattr(saved, "dense_widths", None)
        label = path.name if known else f"{path.name} (dense has the packed widths: the file holds no others)"
        twin = _seeded(lambda: dense_twin(saved), source.seed)
        return Network(label, saved, twin, size, quantized=quantized)
    architecture, image_size = _architecture(name, source)
    if source.structure is None:
        raise DSPFormatError(f"{name} is not pruned: give a structure, for example random:g=2,rate=0.7")
    blank = torch.zeros(1, input_channels(architecture), image_size, image_size)
    pruned = apply_structure(architecture, blank, source.structure, source.seed)
    label = f"{name}, structure {Path(source.structure).name} (synthetic)"
    return Network(label, pruned, architecture, image_size)


def _published(source: NetworkSource, architecture: str, groups: str, percent: str | None) -> Network:
    """A network or structure of the authors; if none is found, one with as many groups and multiply-adds."""
    found = find_shared(f"{'structures' if percent else 'nets'}/{source.name}.npz")
    if percent is None:
        if found:
            return load_network(replace(source, name=str(found)))
        architecture = f"cifar_{architecture}"
    rate = f"0.{percent}" if percent else _RATES.get(source.name)
    if not found and rate is None:
        raise _unknown(source.name)
    structure = str(found or f"random:g={groups},rate={rate}")
    network = load_network(replace(source, name=architecture, structure=structure))
    if not found:
        network.released = percent is None
        network.label = f"{source.name}{GENERATED}, random groups and weights, seed {source.seed}"
    return network


def _architecture(name: str, source: NetworkSource) -> tuple[nn.Module, int]:
    """The dense network with random weights, and its image size."""
    if match := re.fullmatch(r"cifar_resnet(\d+)", name):
        dense = _seeded(lambda: cifar_resnet(int(match[1])), source.seed)
        return dense.eval(), source.image_size or 32
    if name in ("resnet18", "resnet34", "resnet50"):
        return _seeded(lambda: torchvision_resnet(name), source.seed).eval(), source.image_size or 224
    raise _unknown(name)


def _unknown(name: str) -> DSPFormatError:
    return DSPFormatError(
        f"network {name!r} is unknown; known are released ones (resnet56_g4 ...), cifar_resnet20 ..., "
        "resnet18, resnet34, resnet50, and files ending in .npz, .pt or .safetensors"
    )


def _cifar10(classes: int, image_size: int) -> tuple[Labelled | None, Tensor | None]:
    """The test images and some training images of the CIFAR-10 subset, if it exists and fits."""
    path = find_shared("data/cifar10_subset.npz")
    if classes != 10 or image_size != 32 or not path:
        return None, None
    with np.load(path) as archive:
        images = archive["test_images"], archive["train_images"][:_TRAINING]
        test, training = (normalise(torch.from_numpy(part), CIFAR10_MEAN, CIFAR10_STD) for part in images)
        return Labelled(test, torch.from_numpy(archive["test_labels"]).long()), training


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
