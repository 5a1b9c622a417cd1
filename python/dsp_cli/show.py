"""Output of the commands: errors, progress bars, tables."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from dsp_pruning.recipes.training import Progress, RecipeResult

console = Console()


def print_error(message: str) -> None:
    """Print one red line to standard error."""
    line = Text(f"error: {' '.join(message.split())}", style="red")
    Console(stderr=True).print(line, soft_wrap=True)


@contextmanager
def progress_bars() -> Iterator[Callable[[str], Progress]]:
    """Yields a function: name of a stage -> its progress callback."""
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TextColumn("{task.fields[shown]}"))
    with Bars(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console) as bars:

        def stage(name: str) -> Progress:
            task = bars.add_task(name, total=None, shown="")

            def step(done: int, total: int, text: str) -> None:
                bars.update(task, completed=done, total=total, shown=text)

            return step

        yield stage


def print_result(result: RecipeResult) -> None:
    """Print the scores of a training run and the path of its weights."""
    for name, value in result.extra.items():
        if name.startswith("pruned_"):
            console.print(f"{name.replace('_', ' ')}: {value:.2f} % of the grouped layers")
    for name, score in (("validation", result.validation), ("test", result.test)):
        console.print(f"{name}: {100 * score.accuracy:.2f} % of {score.n} images")
    if result.path is not None:
        console.print(f"weights: {result.path}", soft_wrap=True)
