#!/usr/bin/env bash
# Compiles the CPU kernels for arm64 with setup.py's flags and runs them against plain loops under qemu-user. Needs
# g++-aarch64-linux-gnu and qemu-user. Usage: scripts/safety/check_arm64.sh [cases]
set -euo pipefail
cd "$(dirname "$0")/../.."
build="$(mktemp -d)"
trap 'rm -rf "$build"' EXIT
read -ra flags < <("${PYTHON:-python3}" - <<'END'
import runpy, setuptools
setuptools.setup = lambda **_: None
print(*runpy.run_path("setup.py")["COMMON_FLAGS"])
END
)
sources=(csrc/cpu/*.cpp csrc/cpu/kernels/*.cpp scripts/safety/kernels_alone.cpp)
sources=("${sources[@]/csrc\/cpu\/module.cpp/}") # the Python bindings
aarch64-linux-gnu-g++ "${flags[@]}" -static -Icsrc/cpu ${sources[@]} -o "$build/alone"
qemu-aarch64 "$build/alone" "${1:-100}"
