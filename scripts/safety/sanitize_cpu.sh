#!/usr/bin/env bash
# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree so that the
# ordinary build stays. Usage: scripts/safety/sanitize_cpu.sh [pytest arguments]
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="${PYTHON:-python}"
copy="$(mktemp -d)"
trap 'rm -rf "$copy"' EXIT
cp -r "$root"/{csrc,tools,dsp_kernels,python,tests,benchmarks,setup.py,pyproject.toml,README.md,LICENSE} "$copy"
rm -f "$copy"/dsp_kernels/_C*.so
cd "$copy"
DSP_KERNELS_CUDA=0 CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g" \
    "$python" setup.py -q build_ext --inplace
# Leaks of the interpreter itself are no news; torch is not instrumented, so the runtime comes in by preload.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1" UBSAN_OPTIONS="print_stacktrace=1"
export PYTHONPATH="$copy:$copy/python" OMP_NUM_THREADS=1
"$python" -m pytest -q -p no:cacheprovider "${@:-tests/run_cpu}"
