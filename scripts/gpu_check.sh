#!/usr/bin/env bash
# Everything that needs a GPU, offline, every part in under three minutes: build, check, sanitize, time.
#
#   scripts/gpu_check.sh                 all parts
#   scripts/gpu_check.sh --only PART     one of: build table blocks networks layers block_times bench bench_per_conv sanitize
#                                        sanitize_blocks
#   scripts/gpu_check.sh --pack          copy what the tests read from ../shared into .shared (git ignores it),
#                                        for a machine to which only the repository travels
#
# PYTHON: the interpreter (python3). OUT: where JSON and logs go (gpu_results). DSP_SHARED: real nets and images.
# DSP_DEVICE=cpu rehearses the table without a GPU, in Triton's interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu_results}
only=
case "${1:-}" in
  --only) only=${2:?--only needs the name of a part} ;;
  --pack)
    from=${DSP_SHARED:-../shared}
    mkdir -p .shared/data
    cp -r "$from/nets" "$from/structures" .shared/
    mkdir -p .shared/golden && cp "$from/golden/logits.npz" .shared/golden/
    cp "$from/data/cifar10_subset.npz" .shared/data/
    du -sh .shared
    exit 0
    ;;
  "") ;;
  *) echo "unknown argument $1; see the head of $0" >&2; exit 2 ;;
esac

mkdir -p "$OUT"
if [ -z "${DSP_SHARED:-}" ]; then
  for folder in ../shared .shared; do [ -d "$folder/nets" ] && DSP_SHARED=$(realpath "$folder"); done
  export DSP_SHARED
fi
export DSP_REQUIRE_SHARED=1
failed=()

part() { # part NAME SECONDS COMMAND...: run it if it is wanted, keep its log, go on after a failure
  local name=$1 limit=$2
  shift 2
  [ -n "$only" ] && [ "$only" != "$name" ] && return 0
  local began=$SECONDS
  timeout "$limit" bash -c '"$@"' part "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  echo "== $name: exit $status, $((SECONDS - began)) s"
  tail -n "${LINES_SHOWN:-12}" "$OUT/$name.log"
  [ $status -eq 0 ] || failed+=("$name")
}

tests() { "$PYTHON" -m pytest -q -p no:cacheprovider -s "$@"; }

sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor is an allocation of its own, whose ends are guarded
  local some="(unequal or stage-3 or batch-1 or one-to-one) and float16"
  for tool in memcheck racecheck; do
    timeout 75 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -x \
      -p no:cacheprovider tests/device/test_convs_on_device.py -k "$some" || return
  done
}

bench() {
  "$PYTHON" -m dsp_benchmarks run --device cuda --networks resnet20_g4,resnet56_g4 --batches 1,32,256 \
    --rounds 50 --seconds 60 --out "$OUT/gpu_cifar.json" &&
    "$PYTHON" -m dsp_benchmarks run --device cuda --networks resnet18_g2_80,resnet50_g2_80 \
      --batches 1,32,256 --rounds 50 --seconds 90 --out "$OUT/gpu_imagenet.json"
}

sanitize_blocks() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local some="test_block and float16 and (unequal or turns or shortcut or bottleneck or residual or stage)"
  for tool in memcheck racecheck; do
    timeout 75 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -x \
      -p no:cacheprovider tests/device/test_blocks_on_device.py -k "$some" || return
  done
}

bench_per_conv() { # the same networks without blocks
  DSP_KERNELS_BLOCKS=0 "$PYTHON" -m dsp_benchmarks run --device cuda --networks resnet20_g4,resnet56_g4 \
    --batches 32,256 --engines packed/fused:cuda:fp16 --rounds 50 --seconds 30 --out "$OUT/gpu_cifar_per_conv.json" &&
    DSP_KERNELS_BLOCKS=0 "$PYTHON" -m dsp_benchmarks run --device cuda --networks resnet18_g2_80,resnet50_g2_80 \
      --batches 32,256 --engines packed/fused:cuda:fp16 --rounds 50 --seconds 60 --out "$OUT/gpu_imagenet_per_conv.json"
}

build() {
  DSP_KERNELS_CUDA=${DSP_KERNELS_CUDA:-1} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} \
    "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable . &&
    "$PYTHON" -m dsp_kernels.env
}

export PYTHON OUT
export -f tests sanitize sanitize_blocks bench bench_per_conv build # timeout starts a shell of its own
if [ "${DSP_DEVICE:-}" = cpu ]; then
  part table 540 tests tests/device/test_convs_on_device.py
else
  export DSP_REQUIRE_GPU=1
  LINES_SHOWN=24 part build 150 build
  part table 120 tests tests/device/test_convs_on_device.py
  part blocks 120 tests tests/device/test_blocks_on_device.py
  LINES_SHOWN=40 part networks 120 tests tests/device/test_networks_on_device.py
  part layers 60 "$PYTHON" scripts/gpu_layers.py --out "$OUT/gpu_layers.json"
  LINES_SHOWN=60 part block_times 120 "$PYTHON" scripts/gpu_blocks.py --out "$OUT/gpu_blocks.json"
  LINES_SHOWN=60 part bench 170 bench
  part bench_per_conv 120 bench_per_conv
  part sanitize 155 sanitize
  part sanitize_blocks 155 sanitize_blocks
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all parts passed; results in $OUT"
