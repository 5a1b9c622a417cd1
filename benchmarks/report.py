"""Measured rows as cells of a table."""

from __future__ import annotations

from collections.abc import Sequence

from .run import Row

__all__ = ["COLUMNS", "cells"]

COLUMNS = ("engine", "batch", "median ms", "p10", "p90", "n", "times faster", "max difference")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line for each row, as text; faster is against the first engine of the same batch size."""
    first: dict[int, float] = {}
    return [
        (
            row.engine,
            str(row.batch),
            *(f"{1e3 * seconds:.2f}" for seconds in (row.samples.median, row.samples.p10, row.samples.p90)),
            str(row.samples.n),
            f"{first.setdefault(row.batch, row.samples.median) / row.samples.median:.2f}",
            "not compared" if row.difference is None else f"{row.difference:.1e}",
        )
        for row in rows
    ]
