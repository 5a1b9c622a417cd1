"""Every error that the packages raise on purpose, so that a caller can catch one family."""

from __future__ import annotations


class DSPError(Exception):
    """Base of all errors raised on purpose; it names the layer, the value and what would be right."""


class DSPStructureError(DSPError, ValueError):
    """A group structure that cannot exist: index out of range, an output channel in two groups, ..."""


class DSPShapeError(DSPError, ValueError):
    """A tensor whose shape, dtype or device does not fit the structure or the model it is given to."""


class DSPTraceError(DSPError):
    """A model that cannot be traced, or a node that the asked-for operation does not understand."""


class DSPBackendError(DSPError, RuntimeError):
    """A backend asked for by name that cannot run here; the message holds its reason."""


class DSPVerificationError(DSPError):
    """A rewritten network whose answer differs from the network it was made from."""


class DSPFormatError(DSPError, ValueError):
    """A file that is truncated, foreign, of an unknown version, or that contradicts itself."""


class DSPPruningError(DSPError, ValueError):
    """Learning or pruning asked for something impossible: no layer, too many groups, an unreachable rate."""


class DSPTrainingError(DSPError, RuntimeError):
    """Training that cannot go on: the loss or a weight is no longer finite."""
