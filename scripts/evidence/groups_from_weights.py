"""Energy that pruning keeps with groups from the weights and with other groups.

``python groups_from_weights.py WEIGHTS`` prints a table in Markdown, for the six released networks in
$DSP_SHARED/nets and a dense ResNet-20, whose WEIGHTS (DIR/pretrain/model.pt) come from, in this folder,

    dsp pretrain --data groups_from_weights:cifar --epochs 5 --batch-size 64 --save-dir DIR

Without WEIGHTS it prints the seconds on a ResNet-50 with random weights.
"""

import io
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import KMeans
from torch import Tensor, nn

from dsp_kernels import PackedConv2d
from dsp_pruning import assign_groups, load_released
from dsp_pruning.data import ImageData, Split
from dsp_pruning.flow.kernels import dense_weight
from dsp_pruning.layers import groups_of_layers, survey_layers
from dsp_pruning.models import cifar_resnet, torchvision_resnet
from dsp_pruning.prune.rule import kernel_energy, layer_rule
from dsp_pruning.prune.search import ThresholdSearch
from dsp_pruning.recipes.checkpoint import load_weights, restore_weights

SHARED = Path(os.environ.get("DSP_SHARED", "../shared"))
RATES = (0.5, 0.7, 0.9)
KINDS = ("contiguous", "random", "k-means", "learned", "weights")
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
Groups = dict[str, Tensor]  # layer name -> [O]


def cifar(train: int = 10_000, validation: int = 500, test: int = 1000) -> ImageData:
    """CIFAR-10 as JPEG; the same shuffled order for every number of images."""
    arrays = np.load(SHARED / "data" / "cifar10_jpeg.npz")

    def split(part: str, first: int, last: int) -> Split:
        files, ends, labels = (arrays[f"{part}_{name}"] for name in ("bytes", "offsets", "labels"))
        places = np.random.default_rng(0).permutation(len(labels))[first:last]  # the file is sorted by class
        images = [Image.open(io.BytesIO(files[ends[i] : ends[i + 1]].tobytes())) for i in places]
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        return Split(pixels.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[places]).long())

    splits = split("train", 0, train), split("train", train, train + validation), split("test", 0, test)
    return ImageData("cifar10-jpeg", *splits, _MEAN, _STD, 10, flip=True, crop_padding=4)


def dense_released(path: Path) -> tuple[nn.Module, Groups]:
    """The released network with dense convolutions, zeros included, and the groups that it learned."""
    model: nn.Module = load_released(path)
    learned: Groups = {}
    for name, packed in list(model.named_modules()):
        if isinstance(packed, PackedConv2d):
            structure = packed.structure
            size = structure.in_channels, structure.out_channels, packed.kernel_size
            conv = nn.Conv2d(*size, packed.stride, packed.padding, bias=False)
            conv.weight.data = dense_weight(packed).float()
            learned[name] = torch.zeros(structure.out_channels, dtype=torch.int64)
            for number, group in enumerate(structure.groups):
                learned[name][list(group.out_index)] = number
            model.set_submodule(name, conv)
    return model, learned


def energy_kept(model: nn.Module, groups: Groups, n_groups: int, rate: float) -> float:
    """With one threshold for all layers, without what channel flow adds."""
    layers = groups_of_layers(survey_layers(model), n_groups)[0].chosen
    for layer in layers:
        layer.conv.register_buffer("group", F.one_hot(groups[layer.name], n_groups).mT.float())
    ones = torch.ones(1)
    rules = [layer_rule(layer, layer.conv.weight.detach(), ones, False, True) for layer in layers]
    search = ThresholdSearch(layers, rules, None, "macs")
    return 1 - search.pruned_energy(search.masks(search.best(rate))[0])


def other_groups(model: nn.Module, n_groups: int, learned: Groups) -> list[list[Groups]]:
    """Of each kind but "weights", one or several assignments."""
    survey, _ = groups_of_layers(survey_layers(model), n_groups)
    convs = {layer.name: layer.conv for layer in survey.chosen}
    generator, near = torch.Generator().manual_seed(0), KMeans(n_groups, n_init=8, random_state=0)
    contiguous, *random = ({} for _ in range(4))
    clusters: Groups = {}
    for name, conv in convs.items():
        even = torch.arange(conv.out_channels) * n_groups // conv.out_channels
        contiguous[name] = even
        for groups in random:
            groups[name] = even[torch.randperm(len(even), generator=generator)]
        shapes = F.normalize(kernel_energy(conv.weight).sqrt(), dim=1)
        clusters[name] = torch.from_numpy(near.fit_predict(shapes.numpy())).long()
    return [[contiguous], random, [clusters], [learned] if learned else []]


def rows(label: str, model: nn.Module, n_groups: int, learned: Groups) -> None:
    """Print one row per rate."""
    others = other_groups(model, n_groups, learned)
    for rate in RATES:
        kinds = [*others, [assign_groups(model, n_groups, rate)]]
        values = [[energy_kept(model, groups, n_groups, rate) for groups in kind] for kind in kinds]
        cells = " | ".join(f"{100 * sum(each) / len(each):.1f}" if each else "-" for each in values)
        print(f"| {label}, G = {n_groups} | {100 * rate:.0f} % | {cells} |", flush=True)


def seconds() -> None:
    """Print how long ``assign_groups`` takes on a ResNet-50 of random weights."""
    for n_groups in (2, 4):
        for rate in RATES:
            model = torchvision_resnet("resnet50")
            start, used = time.perf_counter(), time.process_time()
            assign_groups(model, n_groups, rate, example_input=torch.zeros(1, 3, 224, 224))
            wall, used = time.perf_counter() - start, time.process_time() - used
            print(f"ResNet-50, G = {n_groups}, {100 * rate:.0f} %: {wall:.1f} s, {used:.1f} s of CPU time")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        seconds()
        sys.exit()
    print(f"| network | pruned | {' | '.join(KINDS)} |\n|---|---|{'---:|' * len(KINDS)}")
    for depth in (20, 56):
        for number in (2, 3, 4):
            network, own = dense_released(SHARED / "nets" / f"resnet{depth}_g{number}.npz")
            rows(f"released ResNet-{depth}", network, number, own)
    for number in (2, 4):
        network = cifar_resnet(20)
        restore_weights(network, load_weights(sys.argv[1])[0], sys.argv[1])
        rows("dense ResNet-20", network, number, {})
