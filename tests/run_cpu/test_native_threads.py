"""Calls at the same time, numbers of threads, scratch, and what is left running."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from test_native_programs import Net
from torch import Tensor

from dsp_kernels import GroupStructure, fuse, gather_grouped_conv2d
from dsp_kernels.op.torch_op import PLANS
from dsp_kernels.run.cpu.program import build


def network_and_model(seed: int = 1) -> tuple[object, object]:
    fused = fuse(Net(seed).eval(), torch.randn(1, 3, 20, 20), backend="cpu")
    program = fused.program
    return fused, build([program.input], [3], program.steps, [program.output])


def test_many_python_threads_get_the_same_bits_as_one() -> None:
    fused, _ = network_and_model()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1 + n % 5, 3, 12, 12, generator=generator) for n in range(8)]
    serial = [fused(x) for x in inputs]  # type: ignore[operator]

    def hammer(number: int) -> bool:
        torch.set_num_threads(1 + number % 3)
        return all(
            torch.equal(fused(inputs[(number + turn) % 8]), serial[(number + turn) % 8])  # type: ignore[operator]
            for turn in range(1000)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(hammer, range(8)))


def test_the_op_from_many_python_threads() -> None:
    """The same weights, so that all threads share one kept plan, with and without a residual."""
    PLANS.clear()
    generator = torch.Generator().manual_seed(0)
    structure = GroupStructure.build(6, 5, [([0, 2], [0, 3]), ([1, 2, 5], [4])])
    weights = [torch.randn(2, 2, 3, 3, generator=generator), torch.randn(1, 3, 3, 3, generator=generator)]
    inputs = [torch.randn(1 + n % 3, 6, 7, 7, generator=generator) for n in range(6)]

    def call(number: int) -> Tensor:
        x = inputs[number % 6]
        residual = x[:, :5] if number % 2 else None
        return gather_grouped_conv2d(x, weights, structure, None, residual, padding=1, activation="relu")

    serial = [call(number) for number in range(6)]
    PLANS.clear()
    with ThreadPoolExecutor(8) as pool:
        assert all(
            pool.map(
                lambda first: all(
                    torch.equal(call(first + turn), serial[(first + turn) % 6]) for turn in range(1000)
                ),
                range(8),
            )
        )
    assert len(PLANS) == 1


def test_every_number_of_threads_gives_the_same_bits() -> None:
    _, network = network_and_model()
    for batch in (1, 7):
        x = torch.randn(batch, 3, 20, 20, generator=torch.Generator().manual_seed(batch))

        def run(threads: int, x: Tensor = x, batch: int = batch) -> Tensor:
            y = torch.empty(batch, 11, 1, 1)
            network.run([x.numpy()], [y.numpy()], threads, 1)  # type: ignore[attr-defined]
            return y

        assert all(torch.equal(run(threads), run(1)) for threads in (2, 3, 8))


def printed_alone(code: str) -> str:
    """What the code prints in a process of its own, with this file's folder on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_one_thread_starts_no_helper_and_torch_decides_how_many() -> None:
    """In a process of its own, because helpers stay for the next call."""
    code = (
        "import torch\n"
        "from test_native_threads import network_and_model; from dsp_kernels import _C\n"
        "torch.set_num_threads(1); fused, _ = network_and_model(); x = torch.randn(9, 3, 20, 20)\n"
        "fused(x); print(_C.worker_count()); torch.set_num_threads(3); fused(x); print(_C.worker_count())"
    )
    assert printed_alone(code).split() == ["0", "2"]


def test_no_thread_is_left_spinning() -> None:
    fused, _ = network_and_model()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fused(torch.randn(4, 3, 20, 20))  # type: ignore[operator]
    finally:
        torch.set_num_threads(before)
    begin = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - begin < 0.03


def test_scratch_and_plans_are_bounded() -> None:
    _, network = network_and_model()
    for size in range(16, 56):
        x, y = torch.zeros(2, 3, size, size), torch.empty(2, 11, 1, 1)
        network.run([x.numpy()], [y.numpy()], 2)  # type: ignore[attr-defined]
    assert network.plan_count <= 16  # type: ignore[attr-defined]
    assert 0 < network.scratch_bytes < 64 << 20  # type: ignore[attr-defined]


def test_a_forked_child_can_call() -> None:
    fused, _ = network_and_model()
    x = torch.randn(4, 3, 20, 20)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = fused(x)  # type: ignore[operator]
        child = os.fork()
        if child == 0:  # the parent's helper does not exist here
            good = torch.equal(fused(x), expected)  # type: ignore[operator]
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


def test_memory_that_is_not_there_is_an_error_on_every_thread() -> None:
    """In a process of its own, which may not take more memory than it has."""
    code = (
        "import resource, torch\n"
        "from pathlib import Path; from test_native_threads import network_and_model\n"
        "_, network = network_and_model(); small = [torch.randn(6, 3, 20, 20), torch.empty(6, 11, 1, 1)]\n"
        "call = lambda x, y: network.run([x.numpy()], [y.numpy()], 3, 1)\n"
        "call(*small); right = small[1].clone()\n"
        "large = [torch.zeros(6, 3, 2000, 2000), torch.empty(6, 11, 1, 1)]\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20),) * 2)\n"
        "for _ in range(3):\n"
        "    try: call(*large)\n"
        "    except MemoryError: print('no memory')\n"
        "    call(*small); assert torch.equal(small[1], right)"
    )
    assert printed_alone(code).splitlines() == ["no memory"] * 3


def test_threads_that_meet_a_new_size_keep_one_plan() -> None:
    _, network = network_and_model()
    together, x = threading.Barrier(12), torch.zeros(1, 3, 24, 24)

    def call(_: int) -> None:
        together.wait()
        network.run([x.numpy()], [torch.empty(1, 11, 1, 1).numpy()], 1)  # type: ignore[attr-defined]

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(call, range(12)))
    assert network.plan_count == 1  # type: ignore[attr-defined]


def test_helpers_leave_signals_to_the_program() -> None:
    """Four helpers block what may come from outside, and not the faults that a crash handler reports."""
    code = (
        "import os, signal, torch\n"
        "from test_native_threads import network_and_model\n"
        "_, network = network_and_model(); x, y = torch.zeros(8, 3, 20, 20), torch.empty(8, 11, 1, 1)\n"
        "before = set(os.listdir('/proc/self/task'))\n"
        "blocked = lambda number: [bool(mask >> (number - 1) & 1) for mask in masks]\n"
        "for _ in range(5000):\n"  # the C library starts a thread with all signals blocked
        "    network.run([x.numpy()], [y.numpy()], 5, 1)\n"
        "    helpers = set(os.listdir('/proc/self/task')) - before\n"
        "    lines = [line for name in helpers for line in open(f'/proc/self/task/{name}/status')]\n"
        "    masks = [int(line.split()[1], 16) for line in lines if line.startswith('SigBlk')]\n"
        "    if not any(blocked(signal.SIGSEGV)): break\n"
        "print(len(masks), all(blocked(signal.SIGUSR1)), any(blocked(signal.SIGSEGV)))"
    )
    assert printed_alone(code).split() == ["4", "True", "False"]
