"""Concurrent calls, numbers of threads, scratch memory, and helper threads."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from native_nets import Net
from torch import Tensor

from dsp_kernels import GroupStructure, fuse, gather_grouped_conv2d
from dsp_kernels.op.torch_op import PLANS
from dsp_kernels.run.cpu.program import build, segments


def fused_network() -> Any:
    torch.manual_seed(0)
    return fuse(Net(1).eval(), torch.randn(1, 3, 20, 20), backend="cpu")


def native_network() -> Any:
    program = fused_network().program
    return build(*segments(program), program)[0]


def run(network: Any, x: Tensor, threads: int, interleave: int = 1) -> Tensor:
    y = torch.empty(len(x), 11, 1, 1)
    network.run([x.numpy()], [y.numpy()], threads, interleave)
    return y


def check_concurrently(call: Callable[[int], Tensor], count: int) -> None:
    """1,000 calls from each of 8 Python threads are bitwise equal to calls from one."""
    serial = [call(number) for number in range(count)]
    PLANS.clear()

    def hammer(first: int) -> bool:
        torch.set_num_threads(1 + first % 3)
        numbers = [(first + turn) % count for turn in range(1000)]
        return all(torch.equal(call(number), serial[number]) for number in numbers)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(hammer, range(8)))


def test_a_network_on_many_python_threads() -> None:
    fused = fused_network()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1 + n % 5, 3, 12, 12, generator=generator) for n in range(8)]
    check_concurrently(lambda number: fused(inputs[number]), 8)


def test_the_op_on_many_python_threads() -> None:
    """With the same weights, so that all threads share one cached plan, with and without a residual."""
    generator = torch.Generator().manual_seed(0)
    structure = GroupStructure.build(6, 5, [([0, 2], [0, 3]), ([1, 2, 5], [4])])
    weights = [torch.randn(2, 2, 3, 3, generator=generator), torch.randn(1, 3, 3, 3, generator=generator)]
    inputs = [torch.randn(1 + n % 3, 6, 7, 7, generator=generator) for n in range(6)]

    def call(number: int) -> Tensor:
        x = inputs[number]
        residual = x[:, :5] if number % 2 else None
        return gather_grouped_conv2d(x, weights, structure, None, residual, padding=1, activation="relu")

    check_concurrently(call, 6)
    assert len(PLANS) == 1


def test_any_number_of_threads_is_bitwise_equal() -> None:
    network = native_network()
    for batch in (1, 7):
        x = torch.randn(batch, 3, 20, 20, generator=torch.Generator().manual_seed(batch))
        expected = run(network, x, 1)
        assert all(torch.equal(run(network, x, threads), expected) for threads in (2, 3, 8))


def test_concurrent_calls_with_a_new_size_keep_one_route() -> None:
    network = native_network()
    together, x = threading.Barrier(12), torch.zeros(1, 3, 24, 24)

    def call(_: int) -> None:
        together.wait()
        run(network, x, 1)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(call, range(12)))
    assert network.route_count == 1


def test_scratch_of_other_networks_does_not_show() -> None:
    """All networks of a thread compute in the same memory; here it is full of NaN."""
    network, x = native_network(), torch.randn(3, 3, 20, 20)
    expected = run(network, x, 1)
    assert run(fresh := native_network(), torch.full((8, 3, 64, 64), torch.nan), 1, 8).isnan().all()
    assert torch.equal(run(network, x, 1), expected)
    assert torch.equal(run(fresh, x, 1), expected)


@pytest.mark.usefixtures("_two_threads")
def test_children_forked_during_calls_can_call() -> None:
    """As in a server that loads before it forks: other threads call, and plan new sizes, at any moment."""
    fused, stop = fused_network(), threading.Event()
    x, new = torch.randn(4, 3, 20, 20), torch.randn(2, 3, 99, 99)
    expected = fused(x), fused_network()(new)

    def hammer(first: int) -> None:
        for size in itertools.cycle(range(first, first + 40)):
            if stop.is_set():
                return
            fused(torch.zeros(2, 3, size, size))

    with ThreadPoolExecutor(3) as pool:
        hammering = [pool.submit(hammer, size) for size in (17, 30, 50)]
        exits = []
        for _ in range(20):
            child = os.fork()
            if child == 0:  # without the parent's helpers
                signal.alarm(60)
                same = (torch.equal(fused(a), y) for a, y in zip((x, new), expected, strict=True))
                os._exit(0 if all(same) else 1)
            exits.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        stop.set()
        assert [one.result() for one in hammering] == [None] * 3
    assert exits == [0] * 20


# -- In a process of its own, because helpers persist ----------------------------------------------------


def printed_alone(*lines: str) -> list[str]:
    """The words that the code prints, with the names of this file."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    code = "\n".join(["import os, torch; from test_native_threads import *", *lines])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    return done.stdout.split()


HELPERS = (
    "tasks = lambda: set(os.listdir('/proc/self/task'))",
    "read = lambda name, file: open(f'/proc/self/task/{name}/{file}').read()",
    "network, before = native_network(), tasks()",
    "run(network, torch.zeros(8, 3, 20, 20), 5); helpers = tasks() - before",
)


def test_torch_sets_the_number_of_threads_and_one_starts_no_helper() -> None:
    words = printed_alone(
        "torch.set_num_threads(1); fused = fused_network(); x = torch.randn(9, 3, 20, 20)",
        "tasks = lambda: len(os.listdir('/proc/self/task')); before = tasks()",
        "fused(x); print(tasks() - before); torch.set_num_threads(3); fused(x); print(tasks() - before)",
    )
    assert words == ["0", "2"]


def test_helpers_sleep_after_a_call() -> None:
    """A helper polls for 0.2 ms, then waits for the next call; a thread that spins is never in state S."""
    words = printed_alone(
        *HELPERS,
        "state = lambda name: read(name, 'stat').rpartition(')')[2].split()[0]",
        "while any(state(name) != 'S' for name in helpers): os.sched_yield()",
        "print(len(helpers))",
    )
    assert words == ["4"]


def test_helpers_block_signals() -> None:
    """All but the faults that a crash handler reports."""
    words = printed_alone(
        *HELPERS,
        "import signal",
        "blocked = lambda number: [bool(mask >> (number - 1) & 1) for mask in masks]",
        "while True:",  # the C library starts a thread with all signals blocked
        "    lines = [line for name in helpers for line in read(name, 'status').splitlines()]",
        "    masks = [int(line.split()[1], 16) for line in lines if line.startswith('SigBlk')]",
        "    if not any(blocked(signal.SIGSEGV)): break",
        "    run(network, torch.zeros(8, 3, 20, 20), 5)",
        "print(len(masks), all(blocked(signal.SIGUSR1)))",
    )
    assert words == ["4", "True"]


MEMORY = (
    "import dsp_kernels; from torch import nn",
    "pages = lambda: int(open('/proc/self/statm').read().split()[1])",
    "kept = lambda before: (pages() - before) * os.sysconf('SC_PAGESIZE') >> 20",
    "torch.set_grad_enabled(False); torch.set_num_threads(2)",
)


@pytest.mark.parametrize("way", ["swap(net)", "fuse(net, torch.zeros(1, 4, 64, 64))"])
def test_memory_after_a_4k_image(way: str) -> None:
    """Each of its ten layers needs 265 MB of scratch, which no layer keeps."""
    words = printed_alone(
        *MEMORY,
        "conv = lambda: dsp_kernels.PackedConv2d(GroupStructure.dense(4, 4), 3, padding=1)",
        "net = nn.Sequential(*(conv() for _ in range(10))).eval()",
        f"packed, net = net[0], dsp_kernels.{way}",
        "net(torch.zeros(1, 4, 64, 64)); x, before = torch.randn(1, 4, 2160, 3840), pages()",
        "print(tuple(net(x).shape)); print(kept(before))",
    )
    assert "".join(words[:-1]) == "(1,4,2160,3840)"
    assert int(words[-1]) < 100


def test_memory_after_many_sizes_and_calls() -> None:
    words = printed_alone(
        *MEMORY,
        "network = fused_network(); image = lambda n: torch.zeros(1 + n % 3, 3, 16 + n % 40, 16 + n // 40)",
        "for n in range(200): network(image(n))",
        "before = pages()",
        "for n in range(1500): network(image(n))",
        "print(kept(before)); before = pages()",
        "for n in range(20000): network(image(0))",
        "print(kept(before))",
    )
    assert int(words[0]) < 50
    assert int(words[1]) < 5


def test_too_little_memory_is_an_error() -> None:
    """In a process with limited memory; later calls run."""
    words = printed_alone(
        "import resource; network, small = native_network(), torch.randn(6, 3, 20, 20)",
        "expected, large = run(network, small, 3), torch.zeros(6, 3, 2000, 2000)",
        "pages = int(open('/proc/self/statm').read().split()[0])",
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20),) * 2)",
        "for _ in range(3):",
        "    try: run(network, large, 3)",
        "    except MemoryError: print('refused')",
        "    assert torch.equal(run(network, small, 3), expected)",
    )
    assert words == ["refused"] * 3
