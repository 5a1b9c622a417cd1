#!/usr/bin/env bash
# Everything that needs a GPU, offline, in under nine minutes: build, test, time, sanitize.
#
#   scripts/gpu_check.sh                 the parts: build table networks blocks layers bench sanitize
#   scripts/gpu_check.sh --only PART     one or several of them (--only "build table"), or one of the long ones:
#                                        rivals (every engine, four networks), rates (70 and 90 %, batch 256),
#                                        compile (torch.compile max-autotune, batch 256), tune (Triton's autotune),
#                                        block_times, bench_per_conv (networks without blocks), sanitize_blocks
#   scripts/gpu_check.sh --pack          copy the test data from ../shared into .shared (ignored by git), for a
#                                        machine that gets only the repository
#
# PYTHON: the interpreter (python3). OUT: folder of JSON and logs (gpu_results). DSP_SHARED: released nets and images.
# BUDGET: seconds for all parts together (535); a part gets what is left, at most its own limit.
# DSP_DEVICE=cpu rehearses without a GPU: the table in Triton's interpreter, the benchmarks on the CPU, and the errors
# of the parts that need a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu_results}
BUDGET=${BUDGET:-535}
PARTS="build table networks blocks layers bench sanitize"
LONG="rivals rates compile tune block_times bench_per_conv sanitize_blocks"
only=
case "${1:-}" in
  --only)
    only=${2:?--only needs the name of a part}
    for name in $only; do
      case " $PARTS $LONG " in *" $name "*) ;; *) echo "no part $name; there are $PARTS $LONG" >&2; exit 2 ;; esac
    done
    ;;
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

part() { # part NAME SECONDS COMMAND...: run it if selected, keep its log, continue after a failure
  local name=$1 limit=$2
  shift 2
  case " ${only:-$PARTS} " in *" $name "*) ;; *) return 0 ;; esac
  local began=$SECONDS left=$((BUDGET - SECONDS))
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    echo "== $name: no time left of $BUDGET s"
    failed+=("$name")
    return
  fi
  timeout "$limit" bash -c '"$@"' part "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  echo "== $name: exit $status, $((SECONDS - began)) s of $limit"
  tail -n "${LINES_SHOWN:-12}" "$OUT/$name.log"
  [ $status -eq 0 ] || failed+=("$name")
}

build() {
  DSP_KERNELS_CUDA=${DSP_KERNELS_CUDA:-1} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} \
    "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable . &&
    "$PYTHON" -m dsp_kernels.env
}

tests() { # tests NAME FILE: results, including the accuracies of the networks, are in NAME.xml
  "$PYTHON" -m pytest -q -p no:cacheprovider -s --junitxml "$OUT/$1.xml" "$2"
}

layers() { # the kernels that the rule chooses, without wgmma, and Triton's
  "$PYTHON" scripts/gpu_times.py layers --out "$OUT/gpu_layers.json" "$@" &&
    DSP_KERNELS_WGMMA=0 "$PYTHON" scripts/gpu_times.py layers --out "$OUT/gpu_layers_mma_sync.json" --batch 256 "$@" &&
    "$PYTHON" scripts/gpu_times.py layers --out "$OUT/gpu_layers_triton.json" --kernels triton --batch 256 "$@"
}

time_networks() { # time_networks NAME SECONDS NETWORKS BATCHES ENGINES
  local device=cuda seconds=$2 networks=$3 batches=$4 rounds=50
  [ "${DSP_DEVICE:-}" = cpu ] && device=cpu seconds=30 networks=resnet20_g4 batches=1 rounds=2 # a smoke test
  "$PYTHON" -m dsp_benchmarks run --device "$device" --networks "$networks" --batches "$batches" --engines "$5" \
    --rounds "$rounds" --seconds "$seconds" --out "$OUT/$1.json"
}

OURS=packed/fused:cuda:fp16,packed/fused:triton:fp16
DENSE=dense/cuda-graph-fp16,dense/cudnn-fused-fp16,compacted/cuda-graph-fp16,compacted/cudnn-fused-fp16
RELEASED=released/torch-fp16,released/cuda-graph-fp16
TENSORRT=dense/tensorrt-fp16,compacted/tensorrt-fp16
bench() {
  time_networks gpu_cifar 45 resnet56_g4 1,32,256 "$OURS,$DENSE,$RELEASED" &&
    time_networks gpu_imagenet 60 resnet50_g2_80 1,256 "$OURS,$DENSE"
}
rivals() {
  time_networks gpu_cifar_rivals 200 resnet20_g4,resnet56_g4 1,32,256 "$OURS,$DENSE,$RELEASED,$TENSORRT" &&
    time_networks gpu_imagenet_rivals 300 resnet18_g2_80,resnet50_g2_80 1,32,256 "$OURS,$DENSE,$TENSORRT"
}
rates() {
  time_networks gpu_rates 480 resnet18_g2_70,resnet18_g2_90,resnet50_g2_70,resnet50_g2_90 256 "$OURS,$DENSE"
}
compile() {
  time_networks gpu_compile 500 resnet56_g4,resnet18_g2_80,resnet50_g2_80 256 \
    "$OURS,dense/cuda-graph-fp16,dense/compile-autotune-fp16,compacted/compile-autotune-fp16"
}
tune() { # the gain of tuning the Triton kernel; the configurations are kept in OUT for a shipped table
  DSP_KERNELS_AUTOTUNE=1 DSP_KERNELS_CACHE="$OUT/tuned" time_networks gpu_tuned 480 \
    resnet56_g4,resnet50_g2_80 256 packed/fused:triton:fp16
}

sanitize_tests() { # sanitize_tests SECONDS FILE TESTS: memcheck and racecheck
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor is an allocation of its own, with guarded bounds
  for tool in memcheck racecheck; do
    timeout "$1" compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -x -p no:cacheprovider \
      "$2" -k "$3" || return
  done
}
sanitize() {
  sanitize_tests "${SANITIZE:-50}" tests/on_gpu/test_convs_on_device.py \
    "(unequal or stage-3 or batch-1 or one-to-one) and float16"
}
sanitize_blocks() {
  sanitize_tests 250 tests/on_gpu/test_blocks_on_device.py \
    "test_block and float16 and (unequal or turns or shortcut or bottleneck or residual or stage)"
}

refuses() { # refuses TEXT COMMAND...: it fails with this text
  local text=$1
  shift
  "$@" >"$OUT/refusal.log" 2>&1 && { echo "no refusal: $*"; return 1; }
  grep -q "$text" "$OUT/refusal.log" || { tail -n 5 "$OUT/refusal.log"; return 1; }
  echo "refused as it should: $(grep -m1 "$text" "$OUT/refusal.log")"
}

block_times() { "$PYTHON" scripts/gpu_times.py blocks --out "$OUT/gpu_blocks.json"; }
bench_per_conv() { # networks without blocks
  export DSP_KERNELS_BLOCKS=0
  time_networks gpu_cifar_per_conv 60 resnet20_g4,resnet56_g4 32,256 packed/fused:cuda:fp16 &&
    time_networks gpu_imagenet_per_conv 90 resnet18_g2_80,resnet50_g2_80 32,256 packed/fused:cuda:fp16
}

export PYTHON OUT OURS DENSE RELEASED TENSORRT
# For the shell that timeout starts.
export -f build tests layers time_networks bench rivals rates compile tune sanitize refuses
export -f sanitize_tests sanitize_blocks block_times bench_per_conv
if [ "${DSP_DEVICE:-}" = cpu ]; then
  LINES_SHOWN=24 part build 300 build
  part table 300 tests table tests/on_gpu/test_convs_on_device.py
  part networks 60 tests networks tests/on_gpu/test_networks_on_device.py
  part layers 60 refuses "torch finds no CUDA device" layers --net resnet20_g4
  LINES_SHOWN=24 part bench 120 bench
  part sanitize 60 refuses "compute-sanitizer" sanitize
  for name in rivals rates compile tune; do LINES_SHOWN=24 part "$name" 530 "$name"; done
else
  export DSP_REQUIRE_GPU=1
  LINES_SHOWN=24 part build 150 build
  part table 110 tests table tests/on_gpu/test_convs_on_device.py
  LINES_SHOWN=40 part networks 90 tests networks tests/on_gpu/test_networks_on_device.py
  part blocks 80 tests blocks tests/on_gpu/test_blocks_on_device.py
  LINES_SHOWN=24 part layers 70 layers
  LINES_SHOWN=60 part bench 130 bench
  part sanitize 110 sanitize
  for name in rivals rates compile tune block_times bench_per_conv sanitize_blocks; do
    LINES_SHOWN=60 part "$name" 530 "$name"
  done
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all parts passed; results in $OUT"
