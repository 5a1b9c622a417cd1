"""What the commands print: error lines, progress bars, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dsp_pruning.recipes.run import RecipeResult

__all__ = ["console", "print_error", "print_result", "progress_bars", "table", "threads"]

console = Console()

StepProgress = Callable[[int, int, str], None]


def print_error(message: str) -> None:
    """One red line on standard error."""
    line = Text(f"error: {' '.join(message.split())}", style="red")
    Console(stderr=True).print(line, soft_wrap=True)


@contextmanager
def progress_bars() -> Iterator[Callable[[str], StepProgress]]:
    """Gives a function from a stage's name to its progress callback: (steps done, in all, text)."""
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TextColumn("{task.fields[shown]}"))
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console) as progress:

        def stage(name: str) -> StepProgress:
            task: TaskID = progress.add_task(name, total=None, shown="")

            def step(done: int, total: int, text: str) -> None:
                progress.update(task, completed=done, total=total, shown=text)

            return step

        yield stage


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def print_result(result: RecipeResult) -> None:
    """The scores of a finished training run and where its weights are."""
    for name, value in result.extra.items():
        if name.startswith("pruned_"):
            console.print(f"{name.replace('_', ' ')}: {value:.2f} % of the grouped layers")
    for name, score in (("validation", result.validation), ("test", result.test)):
        console.print(f"{name}: {100 * score.accuracy:.2f} % of {score.n} images")
    if result.path is not None:
        console.print(f"weights: {Path(result.path)}", soft_wrap=True)


def threads() -> str:
    """How many threads torch uses here, in words."""
    n = torch.get_num_threads()
    return f"{n} thread{'s' * (n > 1)}"
