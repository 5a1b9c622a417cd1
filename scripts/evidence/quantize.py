"""Accuracy of the released networks in 8-bit integers. Calibrated on 256 training images.

usage: python scripts/evidence/quantize.py [--method mse|minmax] [NETWORK ...]   (needs $DSP_SHARED)
"""

import argparse

import torch
from dsp_benchmarks.subjects.networks import NetworkSource, load_network

import dsp_kernels

NETWORKS = [f"resnet{depth}_g{groups}" for depth in (20, 56) for groups in (2, 3, 4)]


def main() -> None:
    """Print one line for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--method", default="mse")
    given = parser.parse_args()
    total = 0
    for name in given.networks:
        network = load_network(NetworkSource(name))
        quantized = dsp_kernels.quantize(network.packed, network.calibration, given.method)
        runs = network.packed, dsp_kernels.fuse(quantized)
        assert network.labelled is not None
        with torch.inference_mode():
            x, labels = network.labelled.images, network.labelled.labels
            answers = [torch.cat([run(part) for part in x.split(113)]) for run in runs]
        right = [int((answer.argmax(1) == labels).sum()) for answer in answers]
        error = (answers[1] - answers[0]).square().mean().sqrt()
        total += right[1] - right[0]
        print(
            f"{name}: right of {len(labels)}: float32 {right[0]}, integers {right[1]}; rms difference of the "
            f"logits {error:.3f}; {len(quantized.program.notes)} float steps; {runs[1].backend}",
            flush=True,
        )
    print(f"right answers gained in all: {total}")


if __name__ == "__main__":
    main()
