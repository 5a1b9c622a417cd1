"""``dsp`` as one of several processes: argv = folder for what this rank holds at the end, die or live, flags.

"die": rank 1 kills itself as soon as the metrics of the first epoch are there.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from dsp_cli.main import main
from dsp_pruning.distributed import rank
from dsp_pruning.recipes import finetune, learn_groups
from dsp_pruning.recipes.training import METRICS

torch.set_num_threads(1)
folder, mode, flags = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]


def die_after_an_epoch() -> None:
    while not any(len(path.read_text().splitlines()) > 1 for path in folder.rglob(METRICS)):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def keeping(conclude: Any) -> Any:
    """What every rank holds when it is done, not only what rank 0 writes."""

    def kept(recipe: str, trainer: Any, *more: Any) -> Any:
        torch.save(dict(trainer.model.state_dict()), folder / f"rank{rank()}.pt")
        return conclude(recipe, trainer, *more)

    return kept


for recipe in (finetune, learn_groups):
    recipe.conclude = keeping(recipe.conclude)  # type: ignore[attr-defined]
if mode == "die" and os.environ["RANK"] == "1":
    threading.Thread(target=die_after_an_epoch, daemon=True).start()
sys.exit(main(flags))
