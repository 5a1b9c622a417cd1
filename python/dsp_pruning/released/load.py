"""The authors' published files, TorchScript archives and training checkpoints, as packed networks."""

import copy
from pathlib import Path

import torch
from torch import nn

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.check import check_network
from dsp_kernels.graph.compare import compare_answers
from dsp_kernels.tolerances import network_tolerance
from dsp_kernels.whole_file import require_file
from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.packing.pack import pack
from dsp_pruning.packing.twin import Widths, dense_widths
from dsp_pruning.recipes.finetune import load_pruned
from dsp_pruning.released.archive import is_torchscript, read_archive, zip_names
from dsp_pruning.released.arrays import read_released
from dsp_pruning.released.walk import packed_network


def load_released(path: str | Path) -> nn.Module:
    """The packed network in a file that the authors of the paper published, in eval mode.

    The file is one of
    - a TorchScript archive of a traced network whose branches gather channels, convolve and normalise, and
      are concatenated or added into a tensor, of any depth, width and number of branches. Each set of
      branches becomes one PackedConv2d and one batch norm. The graph is read, its code is never run;
    - a training checkpoint ``[state_dict, accuracy]`` of a masked CIFAR ResNet with ``<conv>.group`` and
      ``<conv>.mask``, which is packed;
    - the ``.npz`` arrays of ``read_released``.

    Raises FileNotFoundError, and DSPFormatError for a file that does not fit, naming what was found.

    >>> import tempfile
    >>> from dsp_pruning import PruneWrapper
    >>> model = cifar_resnet(8)
    >>> _ = PruneWrapper(model, 2, fp_layer_indices=[], example_input=torch.zeros(1, 3, 32, 32))  # adds masks
    >>> with tempfile.NamedTemporaryFile(suffix=".pt") as file:
    ...     torch.save([model.state_dict(), 91.5], file.name)
    ...     load_released(file.name)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    require_file(path)
    if "meta.npy" in zip_names(path):
        return read_released(path)
    if not is_torchscript(path):
        model = load_pruned(path)
        channels = next(model.parameters()).shape[1]
        return pack(model, torch.zeros(1, channels, 32, 32)).eval()
    graph, state = read_archive(path)
    try:
        network = packed_network(graph, state)
        check_network(copy.deepcopy(network).eval().to("meta"), network.example_shapes, torch.float32)
    except DSPFormatError as error:
        raise DSPFormatError(f"{path} is not a released network: {error}") from error
    network.dense_widths = _cifar_widths(network)
    return network.to("cpu").eval()


def verify_released(path: str | Path, network: nn.Module, image_hw: tuple[int, int]) -> float:
    """Run the archive, which is code, on random images; return its largest difference from ``network``."""
    archive = torch.jit.load(str(path), map_location="cpu").eval()
    channels = next(network.parameters()).shape[1]
    x = torch.randn(2, channels, *image_hw, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return compare_answers(
            archive(x),
            network(x),
            network_tolerance(x.dtype, 9 * 512, 100),
            f"{path}: the archive and the imported network differ",
            "random images",
        )


def _cifar_widths(network: nn.Module) -> Widths | None:
    """The widths of the CIFAR ResNet that this was before pruning, where it was one."""
    modules = dict(network.named_modules())
    blocks = {path.split(".")[1] for path in modules if path.startswith("stage_1.")}
    first, last = modules.get("conv_1_3x3"), modules.get("classifier")
    if not isinstance(first, nn.Conv2d) or not isinstance(last, nn.Linear) or not blocks:
        return None
    try:
        with torch.device("meta"):
            dense = cifar_resnet(6 * len(blocks) + 2, last.out_features, first.in_channels)
    except (ValueError, TypeError):
        return None
    widths = {path: width for path, width in dense_widths(dense).items() if path in modules}
    for path, module in modules.items():
        width = getattr(module, "out_channels", None)
        if isinstance(width, int) and (path not in widths or width > widths[path][1]):
            return None
    return widths
