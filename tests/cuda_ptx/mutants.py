"""Breaks the PTX of every kernel in one place after the other and counts what the interpreter notices.

Usage: PYTHONPATH=tools:tests/helpers python tests/cuda_ptx/mutants.py. Exits with 1 below LEAST_FOUND.
"""

import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

import block_cases
import torch
from cases import Case
from child import Child
from ptx.build import build, why_not
from ptx.interpreter import load, loaded
from ptx_checks import block_case, conv_case

from dsp_kernels import GroupStructure
from dsp_kernels.run.gpu.cuda.kernels import KERNELS

LEAST_FOUND = 200 / 248
MOST_PER_KIND = 6  # in one kernel
CHIP = "sm_90a"
# What is broken -> the pattern and what replaces it.
MUTATIONS = {
    "no bar.sync": (r"\tbar\.sync \t0;", ""),
    "cp.async.wait_group 0 -> 1": (r"(\tcp\.async\.wait_group) 0;", r"\1 1;"),
    "cp.async.wait_group 1 -> 2": (r"(\tcp\.async\.wait_group) 1;", r"\1 2;"),
    "cp.async.wait_group 2 -> 3": (r"(\tcp\.async\.wait_group) 2;", r"\1 3;"),
    "cp.async without zeros": (
        r"(cp\.async\.c[ga]\.shared\.global \[%r\d+\], \[%rd\d+\], \d+), (%r\d+);",
        r"\1;",
    ),
    "ldmatrix without .trans": (r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans", r"\1"),
    "ldmatrix with .trans": (r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.shared", r"\1.trans.shared"),
    "registers of A exchanged": (r"(mma\.sync\S+ \{[^}]*\}, \{)(%r\d+),(%r\d+),", r"\1\3,\2,"),
    "sums exchanged": (
        r"(st\.shared\.v2\.f32 \t\[%r\d+(?:\+\d+)?\]), \{(%f\d+), (%f\d+)\};",
        r"\1, {\3, \2};",
    ),
    "no fence.proxy.async": (r"\tfence\.proxy\.async\.shared::cta;", ""),
    "no wgmma.fence": (r"\twgmma\.fence\.sync\.aligned;", ""),
    "wgmma.wait_group 0 -> 1": (r"(\twgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;"),
    "wgmma.wait_group 1 -> 2": (r"(\twgmma\.wait_group\.sync\.aligned) 1;", r"\1 2;"),
    "wgmma trans-b 1 -> 0": (r"p, 1, 1, 0, 1;", "p, 1, 1, 0, 0;"),
    "another wgmma descriptor": (
        r"(or\.b64  \t%rd\d+, %rd\d+), (?:3436\d+|-?4\d{15,});",
        r"\1, 34359738369;",
    ),
}


def dense(filters: int, channels: int) -> list[Case]:
    """Two convolutions for one size of tile. Nothing reads channel 0, which holds NaN."""
    groups = [(range(1, channels), range(filters - 1)), (range(3, channels, 3), [filters - 1])]
    unequal = GroupStructure.build(channels, filters + 1, groups)
    all_but_one = GroupStructure.build(channels, filters, [(range(1, channels), range(filters))])
    return [
        Case("unequal", unequal, hw=(5, 6), batch=16, residual=True, activation="relu6"),
        Case("dense", all_but_one, hw=(7, 8), batch=16, activation="silu"),  # all positions of a tile
    ]


CONVS = [(case, kernel) for kernel in KERNELS for filters in (9, 30, 64, 128) for case in dense(filters, 72)]
BLOCK_NAMES = (
    "unequal groups, absent channels",
    "two tiles of 32",
    "shortcut without stride",
    "stride 2, grouped shortcut",
    "bottleneck in turns",
)
BLOCKS = [case for case in block_cases.CASES if case.name in BLOCK_NAMES]


def run(number: int) -> set[str]:
    """Runs a case, the convolutions before the blocks, and returns the kernels that it launched."""
    if number >= len(CONVS):
        return block_case(BLOCKS[number - len(CONVS)], torch.float16, [CHIP])
    case, kernel = CONVS[number]
    return conv_case(
        case, torch.float32 if "fp32" in kernel else torch.float16, kernel, [CHIP], in_place=True
    )


def noticed(text: str, broken: str, numbers: list[int]) -> str:
    """What the first case says that notices the broken PTX; empty if none does. text: the PTX as it was."""
    try:
        load(loaded(), broken)
        for number in numbers:
            run(number)
    except Exception as error:
        return str(error)
    finally:
        load(loaded(), text)
    return ""


def kernels() -> dict[str, str]:
    """The PTX of each kernel by its name."""
    found = {}
    for path in sorted(build().glob("*.compute_90a.ptx")):
        head, *bodies = path.read_text().split(".visible .entry ")
        for body in bodies:
            end = body.index("\n}\n") + 3
            found[body[: body.index("(")]] = f"{head}.visible .entry {body[:end]}"
    return found


def mutants(text: str) -> Iterator[tuple[str, str]]:
    """(what is broken, the PTX with it)."""
    for kind, (pattern, replacement) in MUTATIONS.items():
        # Copies of weights are told to copy all 16 bytes, so without that number they are the same.
        same = {f"%r{n}" for n in re.findall(r"mov\.u32 \t%r(\d+), 16;", text)}
        places = [
            place
            for place in re.finditer(pattern, text)
            if kind != "cp.async without zeros" or place[2] not in same
        ]
        for place in random.Random(1).sample(places, min(MOST_PER_KIND, len(places))):
            yield kind, text[: place.start()] + place.expand(replacement) + text[place.end() :]


def main() -> None:
    """Prints what was not noticed, then a line per kind of mutation."""
    if reason := why_not():
        raise SystemExit(f"skipped: {reason}")
    child = Child()
    cases = defaultdict(list)
    for number in range(len(CONVS) + len(BLOCKS)):
        for name in child(run, number):
            cases[name].append(number)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, text in kernels().items():
        for kind, broken in mutants(text) if name in cases else ():
            try:
                reason = child(noticed, text, broken, cases[name])
            except BrokenProcessPool:
                reason = "the interpreter refused it"
            counts[kind][0] += bool(reason)
            counts[kind][1] += 1
            if not reason:
                print(f"not noticed: {kind} in {name}", flush=True)
    for kind, (found, count) in counts.items():
        print(f"{kind}: {found} of {count}")
    found, count = (sum(column) for column in zip(*counts.values(), strict=True))
    print(f"{found} of {count} mutations noticed in {len(cases)} kernels")
    sys.exit(found < LEAST_FOUND * count)


if __name__ == "__main__":
    main()
