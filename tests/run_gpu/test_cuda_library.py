"""When the CUDA kernels are built, for which GPUs, what the library contains, and the reasons without it."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resources import find_cuobjdump, read_kernels

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.run.gpu.cuda import library
from dsp_kernels.run.gpu.cuda.conv import CudaKernels
from dsp_kernels.run.gpu.cuda.launch import interface
from dsp_kernels.run.gpu.cuda.library import LIBRARY, why_no_cuda

ROOT = Path(__file__).resolve().parents[2]
BUILD = runpy.run_path(str(ROOT / "tools" / "build_cuda.py"))
# Per thread, of a fat build by nvcc 13.0 (November 2026), by name, sizes and chip.
REGISTERS = json.loads(Path(__file__).with_name("registers.json").read_text())
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
SPEC = ConvSpec(GroupStructure.dense(2, 2), (3, 3))


ARCHS = "compute_75 compute_80 compute_86 compute_89 compute_90"  # of nvcc 12.6


@pytest.fixture
def torch_folder(tmp_path: Path) -> Path:
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = '12.6'\n", encoding="utf-8")
    return tmp_path / "torch"


def tool(file: Path, **answers: str) -> str:
    """A program that answers its first argument; returns the folder above bin."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cases = "".join(f'--{option.replace("_", "-")}*) echo "{text}";;\n' for option, text in answers.items())
    file.write_text(f'#!/bin/sh\ncase "$1" in\n{cases}esac\n', encoding="utf-8")
    file.chmod(0o755)
    return str(file.parent.parent)


@pytest.fixture
def toolkit(tmp_path: Path) -> str:
    """The folder of a CUDA 12.6."""
    about = "Cuda compilation tools, release 12.6, V12.6.20"
    return tool(tmp_path / "toolkit" / "bin" / "nvcc", version=about, list_gpu_arch=ARCHS)


def test_built_with_nvcc_and_cuda_torch(torch_folder: Path, toolkit: str) -> None:
    assert BUILD["why_not_cuda"]({"CUDA_HOME": toolkit, "PATH": "/none"}, torch_folder, "") == ""
    assert BUILD["why_not_cuda"]({"PATH": f"{toolkit}/bin"}, torch_folder, "") == ""


def test_reasons_not_to_build(torch_folder: Path, toolkit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    why, home = BUILD["why_not_cuda"], {"CUDA_HOME": toolkit}
    assert "DSP_KERNELS_CUDA is 0" in why({**home, "DSP_KERNELS_CUDA": "0"}, torch_folder, "")
    assert why(home, None, "torch is not importable") == "torch is not importable"
    assert "TORCH_CUDA_ARCH_LIST" in why({**home, "TORCH_CUDA_ARCH_LIST": "Hopper"}, torch_folder, "")
    assert "8.0 or newer" in why({**home, "TORCH_CUDA_ARCH_LIST": "7.5"}, torch_folder, "")
    (torch_folder / "version.py").write_text("cuda: Optional[str] = '13.0'\n", encoding="utf-8")
    assert "nvcc is of CUDA 12.6, torch of CUDA 13; set CUDA_HOME" in why(home, torch_folder, "")
    # A toolkit in /usr/local/cuda is found without any setting.
    monkeypatch.setitem(why.__globals__, "find_nvcc", lambda environment: None)
    assert "there is no nvcc" in why(home, torch_folder, "")
    (torch_folder / "lib" / "libtorch_cuda.so").unlink()
    assert "without CUDA" in why(home, torch_folder, "")


def test_arch_list() -> None:
    assert BUILD["arch_flags"]("7.5;8.0+PTX, 9.0+PTX 10.0f") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_100f,code=sm_100f",
    ]


@pytest.mark.parametrize(
    ("present", "archs"),
    [
        ("8.6 9.0 8.6", "8.6;9.0"),
        ("", "8.0+PTX;8.6;8.9;9.0"),  # all that this nvcc knows
        ("12.0", "8.0+PTX;8.6;8.9;9.0"),  # it does not know the GPU, which runs the PTX
    ],
)
def test_default_archs_are_those_of_the_gpus_of_this_machine(
    present: str, archs: str, toolkit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(Path(toolkit, "bin", "nvidia-smi"), query_gpu=present)
    monkeypatch.setenv("PATH", f"{toolkit}/bin:{os.environ['PATH']}")
    assert BUILD["wanted_archs"]({}, f"{toolkit}/bin/nvcc") == archs
    assert BUILD["wanted_archs"]({"TORCH_CUDA_ARCH_LIST": "8.9"}, f"{toolkit}/bin/nvcc") == "8.9"


def test_a_required_build_that_is_impossible_fails_with_the_reason() -> None:
    code = (
        "import sys, runpy\nsys.modules['torch'] = None\nsys.argv = ['setup.py', '-q', 'build_ext']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {**os.environ, "DSP_KERNELS_CUDA": "1", "DSP_KERNELS_CPU": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "DSP_KERNELS_CUDA is 1, but torch is not importable" in done.stderr


def test_a_build_packs_no_files_of_an_earlier_one(tmp_path: Path) -> None:
    stale = tmp_path / "lib" / "dsp_kernels" / "_C_cuda.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    environment = {**os.environ, "DSP_KERNELS_CUDA": "0", "DSP_KERNELS_CPU": "0"}
    options = ["-q", "build", "--build-base", tmp_path, "--build-lib", tmp_path / "lib"]
    subprocess.run([sys.executable, "setup.py", *options], cwd=ROOT, env=environment, check=True)
    assert stale.with_name("env.py").is_file()
    assert not stale.exists()


def test_the_library_is_built_where_that_is_possible() -> None:
    if os.environ.get("DSP_KERNELS_CUDA") == "0":
        pytest.skip("DSP_KERNELS_CUDA is 0")
    reason = BUILD["why_not_cuda"](os.environ, Path(torch.__file__).parent, "")
    if reason:
        pytest.skip(reason)
    assert LIBRARY.is_file(), f"{LIBRARY} was not built"
    assert why_no_cuda() == ""


def test_resources() -> None:
    """No spills, registers as recorded or at most 4 more, tensor cores, 16-byte copies and stores."""
    cuobjdump = find_cuobjdump()
    if not LIBRARY.is_file() or cuobjdump is None:
        pytest.skip("needs the built library and cuobjdump")
    kernels = read_kernels(LIBRARY, cuobjdump)
    chips = {kernel.arch for kernel in kernels}
    assert len({kernel.name for kernel in kernels}) == (32 if "sm_90a" in chips else 26)
    for kernel in kernels:
        name = " ".join(part for part in kernel.name.split() if part not in ("fp16", "bf16"))
        family, count = name.split()[0], kernel.count
        warpgroups = family.startswith("wgmma")
        print(f"{kernel.name}, {kernel.arch}: {kernel.registers} registers, {kernel.stack} bytes of stack")
        assert kernel.stack == 0, kernel
        assert not count(r"\b(?:LDL|STL)\b"), kernel
        assert kernel.registers <= REGISTERS[name].get(kernel.arch, 168) + 4, kernel
        # As many thread blocks fit as csrc/cuda says: kThreads, kBlocks of 65,536 registers.
        assert kernel.registers <= (168 if family == "chwn_gemm" else 128), kernel
        assert (count(r"\bHMMA\.") > 0) == (family != "fp32_gemm" and not warpgroups), kernel
        assert (count(r"\bHGMMA\.") > 0) == warpgroups, kernel
        # If ptxas serialises wgmma, it waits for every single one.
        assert count(r"\bWARPGROUP\.DEPBAR") <= 2, kernel
        assert count(r"\bLDGSTS\.[A-Z.]*128"), kernel
        if "NHWC" not in kernel.name and family != "nhwc_gemm":
            assert count(r"\bSTG\.E[A-Z.]*\.128") == count(r"\bSTG\.") > 0, kernel


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if why_no_cuda():
        pytest.skip(why_no_cuda())
    monkeypatch.setattr(library, "interface", lambda: interface().replace("tile_count", "tiles"))
    refused = why_no_cuda.__wrapped__()
    assert re.search(r"other sources .*has .*tile_count.*, not .*tiles", refused)


def test_the_library_says_what_it_was_built_for() -> None:
    if why_no_cuda():
        pytest.skip(why_no_cuda())
    cuda, archs = library.built_for()
    assert cuda.split(".")[0] == str(torch.version.cuda).split(".")[0]
    if cuobjdump := find_cuobjdump():
        listed = subprocess.check_output([cuobjdump, "-lelf", "-lptx", LIBRARY], text=True)
        found = re.findall(r"kernels_\w+\.sm_(\w+)\.(cubin|ptx)", listed)
        assert set(archs) == {("sm_" if kind == "cubin" else "compute_") + number for number, kind in found}


@pytest.mark.parametrize(
    ("capability", "cuda", "text"),
    [
        ((8, 0), "13.1", "built for sm_90a; my GPU has compute capability 8.0: .*TORCH_CUDA_ARCH_LIST=8.0"),
        ((9, 0), "13.1", "$"),
        ((9, 0), "12.8", ".*is of CUDA 12.8, torch of CUDA 13.0"),
    ],
)
def test_a_library_for_another_gpu_or_cuda_is_refused(
    capability: tuple[int, int], cuda: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with such a GPU and torch for CUDA 13.0."""
    (tmp_path / LIBRARY.name).touch()
    monkeypatch.setattr(library, "LIBRARY", tmp_path / LIBRARY.name)
    monkeypatch.setattr(library, "built_for", lambda: (cuda, ("sm_90a",)))
    monkeypatch.setattr(library, "built_from", interface)
    monkeypatch.setattr(library, "why_no_cuda", why_no_cuda.__wrapped__)  # not what is cached of this machine
    monkeypatch.setattr(library, "why_not_on", lambda index: "")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "my GPU")
    assert re.match(f"(_C_cuda.so was )?{text}", library.why_no_cuda_on.__wrapped__(torch.device("cuda")))


@pytest.mark.parametrize(
    ("arch", "runs", "fails"),
    [
        ("sm_80", "80 86 89", "75 90 100"),
        ("sm_86", "86 89", "80 90"),
        ("sm_90a", "90", "80 100"),
        ("sm_100f", "100 103", "90 120"),
        ("compute_80", "80 86 90 103 120", "75"),
        ("compute_90a", "90", "100"),
    ],
)
def test_which_gpus_run_an_architecture(arch: str, runs: str, fails: str) -> None:
    for names, expected in ((runs, True), (fails, False)):
        for name in names.split():
            assert library.runs_on(divmod(int(name), 10), [arch]) == expected, name


@pytest.mark.parametrize(
    ("spec", "dtype", "device", "text"),
    [
        (SPEC, torch.float16, "cpu", "tensors are on cpu"),
        pytest.param(SPEC, torch.float16, "cuda", "not built|CUDA", marks=WITHOUT_GPU),
        (SPEC, torch.float64, "cuda", "float64"),
        (ConvSpec(SPEC.structure, (3, 3), dilation=(9000, 1)), torch.float16, "cuda", "farther than"),
    ],
)
def test_reasons_why_it_cannot_run(spec: ConvSpec, dtype: torch.dtype, device: str, text: str) -> None:
    able, reason = CudaKernels().can_run(spec, dtype, torch.device(device))
    assert not able
    assert re.search(text, reason)


def test_importing_loads_no_cuda_library() -> None:
    code = (
        "import dsp_kernels, dsp_kernels.run.gpu.cuda.conv\n"
        "print('_C_cuda.so' in open('/proc/self/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
