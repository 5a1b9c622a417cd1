#!/usr/bin/env bash
# Everything that needs a GPU, offline, in two calls. Prints a summary; OUT/CALL.tgz has all logs and results.
#
#   answers    at most 6 minutes: build for this GPU; answers of every kernel; answers, accuracy and latency of four
#              networks against cuDNN, of two against the slow builders, torch.compile and TensorRT
#   times      at most 4 minutes: every kernel of every convolution and block; the other two against the slow builders
#   sanitize   memcheck and racecheck of some kernels
#   --pack     copies the released networks and test images from ../shared to .shared (ignored by git), for a machine
#              that gets only the repository; without them networks are made from seeds, and accuracy is not counted
#
# PYTHON: the interpreter (python3). OUT: a folder (gpu_results). DSP_REHEARSE=1: tools/ptx in place of a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-gpu_results} LOGS=build/gpu_check failed=

if [ "${1:-}" = --pack ]; then
  mkdir -p .shared/data .shared/golden
  from=${DSP_SHARED:-../shared}
  cp -r "$from/nets" "$from/structures" .shared/ && cp "$from/golden/logits.npz" .shared/golden/ &&
    cp "$from/data/cifar10_subset.npz" .shared/data/ && exec du -sh .shared
  exit 1
fi
call=${1:-}
case "$call" in answers) budget=345 ;; times | sanitize) budget=230 ;; *) sed -n 2,11p "$0"; exit 2 ;; esac

for folder in ../shared .shared; do [ -d "$folder/nets" ] && DSP_SHARED=${DSP_SHARED:-$(realpath "$folder")}; done
if [ -d "${DSP_SHARED:-}/nets" ]; then
  export DSP_SHARED DSP_REQUIRE_SHARED=1
  nets=(resnet20_g4 resnet18_g2_80 resnet56_g4 resnet50_g2_80)
else # with the released networks' numbers of groups and of multiply-adds
  unset DSP_REQUIRE_SHARED
  cifar="--structure random:g=4,rate=0.64" imagenet="--structure random:g=2,rate=0.8"
  nets=("cifar_resnet20 $cifar" "resnet18 $imagenet" "cifar_resnet56 $cifar" "resnet50 $imagenet")
fi
batches=256,32,1 rounds=12 select=() slower=1
fast=packed/fused:cuda:fp16,dense/cudnn-fused-fp16,dense/cuda-graph-fp16,compacted/cudnn-fused-fp16
slow=packed/fused:cuda:fp16,dense/compile-autotune-fp16,dense/tensorrt-fp16
run=("$PYTHON")
export DSP_REQUIRE_GPU=1 DSP_KERNELS_CUDA=1
if [ -n "${DSP_REHEARSE:-}" ]; then # see tools/ptx/rehearse.py
  run+=(-m ptx.rehearse) budget=20000 slower=60 batches=8 nets=("${nets[0]}")
  fast=packed/fused:cuda:fp16,dense/cudnn-fused-fp16 slow=packed/fused:cuda:fp16,dense/tensorrt-fp16
  select=(-k "(unequal or networks_with) and float16 and not bfloat16 and not triton")
  export DSP_KERNELS_CUDA=0 DSP_KERNELS_CPU=0 PYTEST_XDIST_AUTO_NUM_WORKERS=0
fi

room() { # room SECONDS: so many, or what is left of the call's
  local wanted=$(($1 * slower)) left=$((budget - SECONDS))
  echo $((left < wanted ? left : wanted))
}
part() { # part NAME SECONDS COMMAND...: its log, and the end of it; continues after a failure
  local name=$1 limit=$(room "$2") began=$SECONDS status=124
  shift 2
  [ "$limit" -ge 5 ] && { timeout "$limit" "$@" >"$LOGS/$name.log" 2>&1; status=$?; }
  echo "== $name: exit $status, $((SECONDS - began)) s of $limit"
  [ "$limit" -ge 5 ] && tail -n "${SHOWN:-12}" "$LOGS/$name.log"
  [ $status -eq 0 ] || failed+=" $name"
}
compare() { # compare WHAT ENGINES BATCHES SECONDS NETWORK OPTIONS...
  local name=$5_$1 engines=$2 tried=$3 limit=$4
  shift 4
  part "$name" "$limit" "${run[@]}" -m dsp_benchmarks run --device cuda --engines "$engines" --batches "$tried" \
    --rounds $rounds --seconds $(($(room "$limit") - 4 * slower)) --out "$LOGS/$name.json" --networks "$@"
}

rm -rf "$LOGS"
mkdir -p "$LOGS/path" "$OUT"
ln -sfn "$PWD/benchmarks" "$LOGS/path/dsp_benchmarks" # runs from the repository, without an installation
export PYTHONPATH=$PWD:$PWD/python:$PWD/tools:$PWD/$LOGS/path${PYTHONPATH:+:$PYTHONPATH}
trap 'tar -C "$LOGS" --exclude path -czf "$OUT/$call.tgz" .' EXIT
SHOWN=1 part build 120 "$PYTHON" setup.py build_ext --inplace
case "$call" in
  answers)
    SHOWN=40 part doctor 60 "${run[@]}" -m dsp_cli.main doctor
    part tests 110 "${run[@]}" -m pytest -q -n auto -p no:cacheprovider "${select[@]}" tests/on_gpu
    for net in "${nets[@]}"; do compare fast $fast $batches 45 $net; done
    for net in "${nets[@]:0:2}"; do compare slow $slow "${batches%%,*}" 75 $net; done
    ;;
  times)
    for net in "${nets[@]}"; do
      SHOWN=30 part "${net%% *}_times" 30 "${run[@]}" scripts/gpu_times.py --batch ${batches//,/ } --net $net
    done
    for net in "${nets[@]:2}"; do compare slow $slow "${batches%%,*}" 75 $net; done
    ;;
  sanitize)
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor is an allocation of its own, with guarded bounds
    some="float16 and (test_convolution and (unequal or stage-3 or batch-1 or one-to-one) or test_block and turns)"
    for tool in memcheck racecheck; do
      part $tool 110 compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" -m pytest -q -x tests/on_gpu -k "$some"
    done
    ;;
esac
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
echo "all parts passed"
