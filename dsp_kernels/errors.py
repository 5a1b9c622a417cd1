"""The errors that the packages raise on purpose: one family, so that a caller can catch them all."""


class DSPError(Exception):
    """Base class. The message names the layer or argument, its value and what was expected.

    >>> import dsp_kernels
    >>> try:
    ...     dsp_kernels.GroupStructure.build(3, 4, [([0, 3], [0])])
    ... except dsp_kernels.DSPError as error:
    ...     print(type(error).__name__)
    DSPStructureError
    """


class DSPStructureError(DSPError, ValueError):
    """A group structure that cannot exist: index out of range, an output channel in two groups, ..."""


class DSPShapeError(DSPError, ValueError):
    """A tensor whose shape, dtype or device does not fit the structure or model that gets it."""


class DSPTraceError(DSPError):
    """A model that cannot be traced, or whose graph the requested operation does not support."""


class DSPBackendError(DSPError, RuntimeError):
    """A backend that cannot run here; the message holds the reason."""


class DSPVerificationError(DSPError):
    """A rewritten network whose output differs from the original's by more than rounding."""


class DSPFormatError(DSPError, ValueError):
    """A file that is truncated, foreign, of an unknown version or inconsistent."""


class DSPPruningError(DSPError, ValueError):
    """Learning or pruning with impossible settings: no layer, too many groups, an unreachable rate."""


class DSPTrainingError(DSPError, RuntimeError):
    """Training that cannot continue: the loss or a weight is no longer finite."""
