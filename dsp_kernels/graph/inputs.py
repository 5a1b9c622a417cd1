"""Example inputs: the tensors that a model is traced with."""

from collections.abc import Sequence

from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPShapeError

# A batch of images, or all tensors that forward() takes, images first; dimension 0 is the batch in all.
Example = Tensor | Sequence[Tensor]


def as_inputs(example: Example) -> tuple[Tensor, ...]:
    """The tensors of an example. Raises DSPShapeError for anything else, naming the input that is wrong."""
    several = isinstance(example, list | tuple)
    inputs = tuple(example) if several else (example,)
    for place, x in enumerate(inputs, 1):
        found = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        if not isinstance(x, Tensor) or not x.dim() or not len(x):
            raise _not_an_example(f"input {place} of the example" if several else "the example", found)
    if not inputs:
        raise _not_an_example("the example", f"is an empty {type(example).__name__}")
    return inputs


def _not_an_example(what: str, found: str) -> DSPShapeError:
    return DSPShapeError(
        f"{what} {found}; expected a tensor of at least one image, or a tuple of tensors, one for each input "
        "of forward()"
    )


def check_taken(model: nn.Module, graph: fx.Graph, inputs: Sequence[Tensor]) -> None:
    """Raise DSPShapeError if a graph of the model takes fewer inputs than these."""
    places = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) > len(places) and not any(
        place.startswith("*") and not place.startswith("**") for place in places
    ):
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
