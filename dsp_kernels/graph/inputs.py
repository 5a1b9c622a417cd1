"""Example inputs: the tensors that a model is traced with."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPShapeError

# A batch of images, or all tensors that forward() takes, images first; dimension 0 is the batch in all.
Example = Tensor | Sequence[Tensor]


def as_inputs(example: Example) -> tuple[Tensor, ...]:
    """The tensors of an example. Raises DSPShapeError for anything else, naming the input that is wrong."""
    several = isinstance(example, list | tuple)
    inputs = tuple(example) if several else (example,)
    wrong = "" if inputs else f"the example is an empty {type(example).__name__}"
    for place, x in enumerate(inputs, 1):
        if not isinstance(x, Tensor) or not x.dim() or not len(x):
            found = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
            wrong = wrong or f"{f'input {place} of ' * several}the example {found}"
    if wrong:
        expected = "a tensor of at least one image, or a tuple of tensors, one for each input of forward()"
        raise DSPShapeError(f"{wrong}; expected {expected}")
    return inputs


def images_like(inputs: tuple[Tensor, ...]) -> dict[str, tuple[Tensor, ...]]:
    """The example and random images, by name: an example of zeros would hide a wrong weight or channel."""
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else x for x in inputs)
    return {"the example input": inputs, "random images": tuple(noise)}


def check_taken(model: nn.Module, graph: fx.Graph, inputs: Sequence[Tensor]) -> None:
    """Raise DSPShapeError if a graph of the model takes fewer inputs than these."""
    places = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    takes_any = any(place.startswith("*") and not place.startswith("**") for place in places)
    if len(inputs) > len(places) and not takes_any:
        raise DSPShapeError(
            f"{type(model).__name__}.forward() takes {len(places)} input{'s' * (len(places) != 1)}; input "
            f"{len(places) + 1} of the example, of shape {tuple(inputs[len(places)].shape)}, has no place"
        )


def fusable_inputs(model: nn.Module, example: Example) -> tuple[Tensor, ...]:
    """The inputs of a network to fuse: one batch of images or feature vectors.

    Raises DSPShapeError for anything else, and for an example on another device than the model.
    """
    inputs = as_inputs(example)
    for place, x in enumerate(inputs, 1):
        if x.dim() not in (2, 4) or not x.is_floating_point() or len(x) != len(inputs[0]):
            raise DSPShapeError(
                f"input {place} of the example has shape {tuple(x.shape)} and dtype {x.dtype}; expected "
                "(batch, channels, height, width) or (batch, features) of a floating dtype and of one batch; "
                "use swap() for others"
            )
        check_device(model, x)
    return inputs


def check_device(model: nn.Module, x: Tensor) -> None:
    """Raise DSPShapeError if no tensor of the model is on the device of its example."""
    devices = [tensor.device for tensor in (*model.parameters(), *model.buffers())]
    if devices and x.device not in devices:
        raise DSPShapeError(f"the example is on {x.device}; expected {devices[0]}, as the model")
