"""Calls of a native network."""

from typing import Any

import torch
from torch import Tensor

from dsp_kernels.errors import DSPShapeError


class NativeCall:
    """float32 tensors on the CPU -> the outputs of a native network, as new tensors. Thread-safe.

    is_vector: per output, whether it is (batch, features) for images of every size.
    """

    def __init__(self, network: Any, is_vector: list[bool]) -> None:
        self.network = network
        self._is_vector = is_vector
        # The last call and tensors like its outputs, in one attribute: another thread may replace both.
        self._last: tuple[list[Any], list[Tensor]] = [], []

    def __call__(
        self, inputs: list[Tensor], layout: torch.memory_format, interleave: int = 0
    ) -> list[Tensor]:
        """inputs: of any strides; layout: memory format of the outputs that are maps.

        interleave: images that are computed at once, 0 to choose. Raises DSPShapeError.
        """
        # At batch 1 every microsecond shows, so there are no comprehensions, which are function calls.
        called: list[Any] = [layout]
        arrays, results, targets = [], [], []
        for x in inputs:
            called.append(x.shape)
            arrays.append(x.numpy())
        try:
            last, templates = self._last
            if last != called:
                templates = self._templates(inputs, layout)
                self._last = called, templates
            for template in templates:
                y = torch.empty_like(template)
                results.append(y)
                targets.append(y.numpy())
            if len(inputs[0]):
                self.network.run(arrays, targets, torch.get_num_threads(), interleave)
        except ValueError as error:
            raise DSPShapeError(f"the network or convolution cannot take this input: {error}") from error
        for number, is_vector in enumerate(self._is_vector):
            if is_vector and results[number].dim() == 4:
                results[number] = results[number].flatten(1)
        return results

    def _templates(self, inputs: list[Tensor], layout: torch.memory_format) -> list[Tensor]:
        """Tensors like the outputs, without memory, for empty_like(), the fastest allocation."""
        templates: list[Tensor] = []
        shapes = self.network.output_shapes([tuple(x.shape[2:]) or (1, 1) for x in inputs])
        for shape, is_vector in zip(shapes, self._is_vector, strict=True):
            shape = shape[:1] if is_vector and shape[1:] == [1, 1] else shape
            y = torch.empty((len(inputs[0]), *shape), dtype=torch.float32, device="cpu")
            templates.append(y if is_vector else y.contiguous(memory_format=layout))
            templates[-1].untyped_storage().resize_(0)
        return templates
