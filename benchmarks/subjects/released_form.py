"""The released networks as their authors run them: one branch per group.

Each branch gathers its channels, convolves and normalises. The branches of a block's first convolution are
concatenated, those of its second are added into the block's identity.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels import PackedConv2d


class ReleasedForm(nn.Module):
    """packed: a released CIFAR ResNet, or a generated one: no biases, and norms that keep 0.

    x: (batch, 3, 32, 32) -> logits: (batch, classes), in eval mode.
    """

    def __init__(self, packed: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(packed.conv_1_3x3, packed.bn_1)
        stages = packed.stage_1, packed.stage_2, packed.stage_3
        self.blocks = nn.Sequential(*(_Block(block) for stage in stages for block in stage.children()))
        self.classifier = packed.classifier
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Stem, blocks, global average pool, classifier."""
        x = self.blocks(F.relu(self.stem(x)))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class _Block(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.branches_a = _branches(block.conv_a, block.bn_a)
        # Concatenated branches are in the order of groups, not of channels.
        order = [channel for group in block.conv_a.structure.groups for channel in group.out_index]
        self.branches_b = _branches(block.conv_b, block.bn_b, order)
        for g, group in enumerate(block.conv_b.structure.groups):
            self.register_buffer(f"out_index_{g}", torch.tensor(group.out_index))
        shortcut = getattr(block, "downsample", None)
        self.downsample = nn.Sequential(*shortcut.children()) if shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.cat([F.relu(branch(x)) for branch in self.branches_a], 1)
        outer = [branch(inner) for branch in self.branches_b]
        result = self.downsample(x)
        for g, branch in enumerate(outer):
            # In place: this is the last use of the identity.
            result.index_add_(1, self.get_buffer(f"out_index_{g}"), branch)
        return F.relu(result)


class _Branch(nn.Sequential):
    index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.take_along_dim(x, self.index, 1))


def _branches(conv: PackedConv2d, norm: nn.BatchNorm2d, order: list[int] | None = None) -> nn.ModuleList:
    """order: the channels in the order in which the input has them."""
    made = nn.ModuleList()
    for group, weight in zip(conv.structure.groups, conv.weights, strict=True):
        filters, channels = weight.shape[:2]
        one = nn.Conv2d(channels, filters, conv.kernel_size, conv.stride, conv.padding, bias=False)
        one.weight = nn.Parameter(weight.detach())
        own = nn.BatchNorm2d(filters, norm.eps)
        kept = {name: x[list(group.out_index)] if x.dim() else x for name, x in norm.state_dict().items()}
        own.load_state_dict(kept)
        made.append(_Branch(one, own))
        index = [order.index(channel) for channel in group.in_index] if order else group.in_index
        made[-1].register_buffer("index", torch.tensor(index).view(1, -1, 1, 1))
    return made
