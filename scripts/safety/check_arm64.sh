#!/usr/bin/env bash
# Compiles the CPU kernels for arm64 with setup.py's flags and runs them against plain loops: under qemu-user on
# another machine, and here under AddressSanitizer and UBSan. Needs g++-aarch64-linux-gnu and qemu-user.
# Usage: scripts/safety/check_arm64.sh [cases]
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="${PYTHON:-python3}"
build="$(mktemp -d)"
trap 'rm -rf "$build"' EXIT
cd "$root"

flags_of() { # machine source: setup.py's flags for this source there, one per line
    "$python" - "$@" <<'END'
import pathlib, runpy, sys, setuptools
setuptools.setup = lambda **_: None
read = runpy.run_path("setup.py")
machine, name = sys.argv[1], pathlib.Path(sys.argv[2]).name
own = read["ISA_FLAGS"].get(name, []) if machine in read["X86_64"] else []
print("\n".join([*read["COMMON_FLAGS"], *own]))
END
}

compile() { # machine compiler folder extra flags...
    local machine="$1" compiler="$2" folder="$build/$3"
    shift 3
    mkdir -p "$folder"
    for source in csrc/cpu/*.cpp csrc/cpu/kernels/*.cpp scripts/safety/kernels_alone.cpp; do
        [ "$(basename "$source")" = module.cpp ] && continue # the Python bindings
        mapfile -t flags < <(flags_of "$machine" "$source")
        "$compiler" "${flags[@]}" "$@" -Icsrc/cpu -c "$source" -o "$folder/$(basename "$source" .cpp).o"
    done
    "$compiler" -pthread "$@" "$folder"/*.o -o "$folder/alone"
}

compile aarch64 aarch64-linux-gnu-g++ arm64 -static
qemu-aarch64 "$build/arm64/alone" "${1:-100}"
compile "$(uname -m)" g++ sanitized -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
"$build/sanitized/alone" "${1:-100}"
