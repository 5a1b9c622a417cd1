# make demo   install into .venv, then the whole way on real data
# make test   the same install, then the test suite: the base and the best instruction set of this CPU
# make test-all   the same with every instruction set
# make bench  every engine that runs here, side by side, with a page of results
# make bench-readme  the engines of the README's table, and the table
# make bench-cpu-large  ResNet-18 and ResNet-50 against the strongest dense engines
# make lint   ruff and mypy
# make docs   the documentation site, in build/site
# make test-mutants   break the PTX of the CUDA kernels in one place after the other and count what is noticed (minutes)
# make test-triton     compile every configuration of the Triton kernel without a GPU (minutes)
# make test-triton36   the same with Triton 3.6
# make fuzz   damage 20,000 saved files and load them
# make test-zoo   every network of the zoo: the rows of docs/notes/zoo.md
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := cli,vision,export,bench,test,dev,docs
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all test-mutants test-triton test-triton36 test-zoo fuzz lint docs bench bench-readme bench-cpu-large install clean
install: $(INSTALLED)

# $(call timed,what,command): runs it and prints how long it took
timed = @echo "$(1) ..."; start=$$(date +%s); $(2) && echo "$(1): $$(($$(date +%s) - start)) s"
# setuptools warns of every editable installation
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet
SOURCES := pyproject.toml setup.py $(wildcard csrc/*/* csrc/*/*/*)

# torch first: the CUDA kernels are built with its headers. An environment that already has torch keeps it.
$(VENV)/.torch:
	$(call timed,torch in $(VENV),{ test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); } && \
		$(PIP) --upgrade pip "setuptools>=77" wheel "pybind11>=2.13" && \
		{ $(BIN)/python -c "import torch" 2>/dev/null || $(PIP) torch torchvision; })
	@touch $@

# a build for all GPUs takes three times longer
$(INSTALLED): $(SOURCES) | $(VENV)/.torch
	$(call timed,dsp-kernels with its CPU and CUDA kernels,\
		nvidia-smi >/dev/null 2>&1 || export TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0+PTX;9.0}"; \
		$(PIP) --no-build-isolation --editable ".[$(EXTRAS)]")
	@touch $@

# What the demo needs, without CUDA kernels where there is no GPU.
$(VENV)/.demo: $(SOURCES) | $(VENV)/.torch
	$(call timed,dsp-kernels for the demo,\
		nvidia-smi >/dev/null 2>&1 || export DSP_KERNELS_CUDA="$${DSP_KERNELS_CUDA:-0}"; \
		$(PIP) --no-build-isolation --editable ".[cli]")
	@touch $@

# What has everything also has what the demo needs.
demo: $(if $(wildcard $(INSTALLED)),$(INSTALLED),$(VENV)/.demo)
	$(BIN)/dsp demo

# One thread per process: two torch processes that both use two cores slow each other down many times. A process
# that dies ends the run and is named; pytest-xdist would otherwise wait for its replacement for ever.
test: $(INSTALLED)
	PYTHONPATH=tools $(BIN)/python tests/helpers/compiled.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 --durations 10

test-all: export DSP_TEST_ALL_ISAS = 1
test-all: test

test-mutants: $(INSTALLED)
	PYTHONPATH=tools:tests/helpers OMP_NUM_THREADS=1 $(BIN)/python tests/cuda_ptx/mutants.py

test-triton: $(INSTALLED)
	DSP_TEST_ALL_TRITON=1 $(BIN)/python -m pytest -rP tests/triton_interpreted/test_triton_aot.py

test-triton36: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/triton36 "triton==3.6.*"
	DSP_TEST_ALL_TRITON=1 PYTHONPATH=build/triton36 $(BIN)/python -m pytest -rP tests/triton_interpreted/test_triton_aot.py

test-zoo: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/zoo/run.py

fuzz: $(INSTALLED)
	$(BIN)/python scripts/safety/fuzz_files.py --count 20000

# About five minutes; the page is benchmarks/results/default_cpu.html.
bench: $(INSTALLED)
	$(BIN)/python -m dsp_benchmarks run --short --rounds 14 --out benchmarks/results/default_cpu.json --report

SHOWN := dense/openvino,dense/onnxruntime,dense/openvino-int8,released/torchscript
bench-readme: $(INSTALLED)
	$(BIN)/python -m dsp_benchmarks run --networks resnet20_g4,resnet56_g4 --batches 1,8,32,128 --engines \
		$(SHOWN),packed/fused:cpu,packed/fused:cpu:int8 --rounds 20 --seconds 220 \
		--out benchmarks/results/real_cpu.json
	$(BIN)/python -m dsp_benchmarks report --readme

LARGE := resnet18_g2_70,resnet18_g2_80,resnet18_g2_90,resnet50_g2_70,resnet50_g2_80,resnet50_g2_90
RIVALS := dense/openvino,dense/onnxruntime
bench-cpu-large: $(INSTALLED)
	$(BIN)/python -m dsp_benchmarks run --networks $(LARGE) --batches 1,8 --engines $(RIVALS),packed/fused:cpu \
		--rounds 20 --seconds 240 --out benchmarks/results/large_cpu.json --report

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
