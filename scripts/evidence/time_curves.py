"""Energy kept against measured time: pruning by predicted time, and by multiply-adds with the same method.

``python scripts/evidence/time_curves.py prune FOLDER`` prunes ResNet-20 (g = 4, 32x32) and ResNet-18 (g = 2,
224x224), random weights and groups, for batch 1 and 32 (``dsp calibrate`` first); ``measure FOLDER`` times
the fused networks, one round of all of them after the other, on one thread; ``plot FOLDER`` prints the curves
and draws them. ``measure`` continues where it was interrupted. ``predict`` prints how far predicted times are
off on networks that were not calibrated on, with torch's number of threads.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from dsp_benchmarks.subjects.networks import NetworkSource, load_network

from dsp_kernels import fuse, load, save
from dsp_kernels.program.steps import ConvStep
from dsp_kernels.times.clocked import clocked_steps
from dsp_kernels.times.model import LayerTimes, macs
from dsp_pruning import PruneWrapper, pack
from dsp_pruning.models import cifar_resnet, torchvision_resnet
from dsp_pruning.prune.price import PriceSearch

NETWORKS = {
    "resnet20": (lambda: cifar_resnet(20), 4, 32),
    "resnet18": (lambda: torchvision_resnet("resnet18"), 2, 224),
}
BATCHES = (1, 32)
RATES = (0.3, 0.45, 0.6, 0.7, 0.8, 0.87)
SECONDS = 40.0  # of one measuring run


def prune(folder: Path) -> None:
    """One path of thresholds per network and price; a packed network at every rate."""
    folder.mkdir(exist_ok=True)
    kept = {}
    for name, (build, groups, size) in NETWORKS.items():
        for what in ("macs", *(f"time {batch}" for batch in BATCHES)):
            torch.manual_seed(0)
            model, example = build().eval(), torch.zeros(1, 3, size, size)
            chosen = {"price": macs} if what == "macs" else {"batch": int(what.split()[1])}
            pruner = PruneWrapper(model, groups, 2, example_input=example, target="time", **chosen)
            for layer in pruner.layers:
                layer.conv.get_buffer("group").normal_()
            search = pruner._search()
            assert isinstance(search, PriceSearch)
            betas = None
            for rate in RATES:
                file = folder / f"{name}, {what}, {rate}.safetensors"
                betas = search.continued(rate, betas)
                masks, _ = search.masks(betas)
                print(
                    file.stem, f"{search.pruned(masks):.3f} saved, {search.lost(masks):.4f} lost", flush=True
                )
                for layer in pruner.layers:
                    layer.conv.get_buffer("mask").copy_(masks[layer.name][:, :, None, None])
                before = {key: value.clone() for key, value in model.state_dict().items()}
                pruner.after_step()
                save(pack(model, example), file, example)
                kept[file.stem] = 1 - search.lost(masks)
                model.load_state_dict(before)
    (folder / "kept.json").write_text(json.dumps(kept))


def measure(folder: Path) -> None:
    """Adds samples to FOLDER/times.json."""
    torch.set_num_threads(1)
    file = folder / "times.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    end = time.perf_counter() + SECONDS
    kept = json.loads((folder / "kept.json").read_text())
    images = {
        (size, batch): torch.rand(batch, 3, size, size) for *_, size in NETWORKS.values() for batch in BATCHES
    }
    networks = {
        stem: fuse(load(folder / f"{stem}.safetensors"), images[NETWORKS[stem.split(",")[0]][2], 1])
        for stem in kept
    }
    cases = [
        (stem, batch) for stem in networks for batch in BATCHES if "macs" in stem or f"time {batch}," in stem
    ]
    cases.sort(key=lambda case: len(found.get(f"{case[0]}, batch {case[1]}", {}).get("ms", ())))
    while time.perf_counter() < end:
        for stem, batch in cases:
            fused = networks[stem]
            x = images[NETWORKS[stem.split(",")[0]][2], batch]
            fused(x)
            for _ in range(3 if x.numel() < 1e6 else 1):
                begin = time.perf_counter()
                fused(x)
                took = 1e3 * (time.perf_counter() - begin)
                found.setdefault(f"{stem}, batch {batch}", {"kept": kept[stem], "ms": []})["ms"].append(
                    round(took, 4)
                )
            if time.perf_counter() > end:
                break
    file.write_text(json.dumps(found))


def plot(folder: Path) -> None:
    """Prints energy kept at equal time and times at equal energy; draws FOLDER/curves.png."""
    found = json.loads((folder / "times.json").read_text())
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6))
    for axis, (name, batch) in zip(axes, [(n, b) for n in NETWORKS for b in BATCHES], strict=True):
        curves = {}
        for what in ("macs", f"time {batch}"):
            points = [
                (statistics.median(entry["ms"]), entry["kept"])
                for key, entry in found.items()
                if key.startswith(f"{name}, {what},") and key.endswith(f"batch {batch}")
            ]
            if not points:
                break
            curves[what.split()[0]] = points = sorted(points)
            axis.plot(*zip(*points, strict=True), marker="o", label=f"by {what.split()[0]}")
        axis.set(title=f"{name}, batch {batch}", xlabel="ms, fused, one thread", ylabel="energy kept")
        if len(curves) < 2:
            continue
        axis.legend()
        (time_ms, time_kept), (macs_ms, macs_kept) = (np.array(curves[k]).T for k in ("time", "macs"))
        for ms, kept in zip(time_ms, time_kept, strict=True):
            at_time = np.interp(ms, macs_ms, macs_kept, left=np.nan, right=np.nan)
            at_energy = (
                np.interp(kept, macs_kept, macs_ms) if macs_kept[0] <= kept <= macs_kept[-1] else np.nan
            )
            print(
                f"{name} batch {batch}: {ms:8.3f} ms keeps {kept:.4f}; by macs {at_time:.4f} at that time, "
                f"{at_energy:8.3f} ms at that energy ({at_energy / ms:.3f}x)"
            )
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)


def predict() -> None:
    """Prints median errors of layers and networks: released ones, and structures of ResNet-18 and 50."""
    times, threads = LayerTimes.load(), torch.get_num_threads()
    names = [f"resnet{depth}_g{groups}" for depth in (20, 56) for groups in (2, 3, 4)]
    large = [f"resnet{depth}_g2_{rate}" for depth in (18, 50) for rate in (70, 80, 90)]
    for batch, few in zip(BATCHES, (large, large[:3]), strict=True):
        layers, networks = [], []
        for name in names + few:
            source = load_network(NetworkSource(name))
            x = torch.rand(batch, *source.example.shape[1:])
            fused = fuse(source.packed, x, backend="cpu")
            measured, predicted = clocked_steps(fused.program, batch, threads, times)
            convs = [step.output for step in fused.program.steps if isinstance(step, ConvStep)]
            layers += [abs(predicted[conv] / measured[conv] - 1) for conv in convs]
            taken = []
            for _ in range(15):
                begin = time.perf_counter()
                fused(x)
                taken.append(1e6 * (time.perf_counter() - begin))
            networks.append(sum(predicted.values()) / statistics.median(taken) - 1)
            print(
                f"{name}, batch {batch}: {statistics.median(taken):.0f} us, {networks[-1]:+.1%}", flush=True
            )
        median = statistics.median(map(abs, networks))
        print(f"| {threads}, {batch} | {len(layers)} | {statistics.median(layers):.1%} | {median:.1%} |")


if __name__ == "__main__":
    stages = {"prune": prune, "measure": measure, "plot": plot, "predict": predict}
    stages[sys.argv[1]](*map(Path, sys.argv[2:]))
