# `make` lists the targets. They run in .venv, which the first one creates, fills with the pins of
# requirements.txt and gives the compiled library; later runs skip what is done.
# `PYTHON=python3 make ...` uses that interpreter as it is instead: nothing is installed, the
# library is built in place (for a machine that reaches no package registry).

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

ifdef PYTHON
RUN := $(PYTHON)
export PYTHONPATH := .$(PYTHONPATH:%=:%)
STAMPS := build
BUILD := $(PYTHON) setup.py --quiet build_ext --inplace
else
RUN := .venv/bin/python
STAMPS := .venv
INSTALLED := .venv/.installed
BUILD := $(RUN) -m pip install --quiet --no-build-isolation --no-deps --editable .
# torch looks for ninja on the PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif

# Threads that wait for work sleep. By default they spin, and where another program keeps one of the
# cores busy, a training step on small tensors then takes five times as long.
OMP_WAIT_POLICY ?= passive
export OMP_WAIT_POLICY

# CUDA code is built for the visible GPU, else for Hopper alone: setup.py's own default, every
# supported architecture, takes too long for a test. 9.0 becomes 9.0a, which clusters need.
GPU_ARCHS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
	| grep -E '^[0-9]+\.[0-9]+$$' | sort -u | sed 's/^9\.0$$/9.0a/' | paste -s -d ';' -)
TORCH_CUDA_ARCH_LIST ?= $(or $(GPU_ARCHS),9.0a)
export TORCH_CUDA_ARCH_LIST

CPP := $(shell find cuda_ops -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
SOURCES := setup.py pyproject.toml $(CPP)
BUILT := $(STAMPS)/.built
# Without a GPU the demo needs no CUDA code, which takes the longest to build.
BUILT_FOR_DEMO := $(if $(GPU_ARCHS),$(BUILT),$(STAMPS)/.built-cpu)

.PHONY: help demo test test-gpu sanitize test-stable-abi lint build clean
.PHONY: wheel sdist test-wheel registers test-install

help:
	@echo "make demo             train the recipe with our encoder and SpeechBrain's, compare epoch times"
	@echo "make test             run the tests (those that need a GPU are skipped without one)"
	@echo "make test-gpu         run the tests that need a GPU"
	@echo "make sanitize         run small cases of the kernels under compute-sanitizer"
	@echo "make test-stable-abi  run the operator's tests under a newer torch than the library's own"
	@echo "make lint             check the style of Python and C++ files"
	@echo "make build            build the library"
	@echo "make wheel            wheels in dist/: for CPUs, and with nvcc for every GPU (10 minutes)"
	@echo "make sdist            source distribution in dist/"
	@echo "make test-wheel       try the wheels under other Pythons and torches (downloads gigabytes)"
	@echo "make registers        check that no kernel of dist/'s wheel without clusters spills registers"
	@echo "make test-install     try builds from the source in fresh environments (15 minutes)"
	@echo "make clean            remove what was built (the environment .venv stays)"

# The comparison leaves time pooling out: four seconds of speech then give the RNN about as many
# steps as eight seconds do in the recipe for LibriSpeech, whose utterances last twelve.
RECIPE := recipes/LibriSpeech
MINI := hparams/librispeech_ctc.yaml --overrides=hparams/librispeech_ctc_mini.yaml \
	--data_folder=data/mini
demo: $(BUILT_FOR_DEMO)
	@echo "== Demo 1/3 (half a minute): half an hour of synthetic speech in LibriSpeech's layout"
	$(RUN) $(RECIPE)/mini_librispeech.py data/mini
	@echo "== Demo 2/3 (3 minutes): the CTC recipe with our SLi-GRU, on unseen speakers at the end"
	$(RUN) $(RECIPE)/train_ctc.py $(MINI) --output_folder=results/demo/ctc
	@echo "== Demo 3/3 (2 to 3 minutes): epoch times with our RNNs and with SpeechBrain's"
	$(RUN) $(RECIPE)/compare_epoch_time.py $(MINI) --output_folder=results/demo/epoch_time \
		--batches=12 --lr=0.001 --time_pooling_size=1

test: $(BUILT)
	@echo "== Tests"
	$(RUN) -m pytest

test-gpu: $(BUILT)
	@$(RUN) -c "import sys, torch; torch.cuda.is_available() or sys.exit('No CUDA GPU is visible')"
	@echo "== Tests that need a GPU"
	$(RUN) -m pytest -m gpu

# Results must be the same under racecheck, which slows some warps down: see bench_step.cu.
SANITIZER := compute-sanitizer --error-exitcode 1 --tool
# With the variables $(1), that limit the GPU.
define SANITIZE_SMALL
$(1) $(SANITIZER) memcheck build/bench_step small
$(1) $(SANITIZER) initcheck build/bench_step small
$(1) build/bench_step small > build/small.txt
$(1) $(SANITIZER) racecheck --log-file build/racecheck.txt build/bench_step small \
	> build/small-racecheck.txt
diff build/small.txt build/small-racecheck.txt
endef
STEP_ARCH := $(firstword $(subst ;, ,$(subst .,,$(TORCH_CUDA_ARCH_LIST))))
sanitize: $(BUILT) build/bench_step
	@echo "== Small cases of the kernels under compute-sanitizer (racecheck: half an hour or more)"
	$(SANITIZER) memcheck --kernel-name kns=sb_fast_sligru \
		$(RUN) -m pytest -m gpu tests/ops -k same_input_same_bits
	$(call SANITIZE_SMALL,)
	$(call SANITIZE_SMALL,SB_FAST_SLIGRU_MAX_CLUSTER=1)
	$(call SANITIZE_SMALL,SB_FAST_SLIGRU_MAX_CLUSTER=1 SB_FAST_SLIGRU_MAX_SHARED_KB=99)

# Device code calls constexpr functions of choice.h, as torch's own flags for nvcc allow.
build/bench_step: benchmarks/bench_step.cu $(CPP)
	@mkdir -p build
	nvcc -O3 -std=c++20 --expt-relaxed-constexpr \
		-gencode=arch=compute_$(STEP_ARCH),code=sm_$(STEP_ARCH) -Icuda_ops -o $@ \
		$< cuda_ops/common/gpu.cu $(wildcard cuda_ops/light_gru/persistent/*.cu)

# The library uses torch's stable ABI, so a file built with torch 2.11 must work with torch 2.13.
test-stable-abi: $(BUILT) .venv-torch213/.installed
	@echo "== Operator tests of the same library under torch 2.13"
	PYTHONPATH=. .venv-torch213/bin/python -m pytest tests/ops

lint: $(INSTALLED)
	@echo "== Style"
	$(RUN) -m ruff check .
	clang-format --dry-run --Werror $(CPP) benchmarks/bench_step.cu

build: $(BUILT)

# auditwheel names the oldest Linux that a wheel runs on, that of torch's own wheels; torch and CUDA
# are not put into it. Wheels hold every architecture of setup.py.
WHEEL := $(RUN) -m pip wheel --quiet --no-cache-dir --no-build-isolation --no-deps \
	--wheel-dir build/wheels .
wheel: TORCH_CUDA_ARCH_LIST :=
wheel: $(INSTALLED)
	@echo "== Wheels"
	rm -rf build/wheels dist/*.whl
	NO_CUDA=1 $(WHEEL)
	$(WHEEL)
	$(RUN) -m auditwheel repair --only-plat --plat manylinux_2_28_$(shell uname -m) \
		--exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' --wheel-dir dist build/wheels/*.whl

sdist: $(INSTALLED)
	rm -f dist/*.tar.gz
	$(RUN) setup.py --quiet sdist

TRYING := $(RUN) -m pytest $(if $(TRY),-k "$(TRY)")
test-wheel: $(INSTALLED)
	@echo "== Wheels of dist/ in fresh environments"
	$(TRYING) tests/install/try_wheel.py

# Needs no environment, unlike the other tests of wheels.
registers: $(INSTALLED)
	$(RUN) -m pytest tests/install/try_registers.py

test-install: $(INSTALLED)
	@echo "== Builds from the source in fresh environments"
	$(TRYING) tests/install/try_source.py

clean:
	rm -rf build dist *.egg-info sb_fast_sligru/*.so .venv/.built .venv/.built-cpu

.venv/.installed: requirements.txt
	@echo "== Installing the pins of requirements.txt into .venv (1 to 3 minutes)"
	@python3 -c "import sys; sys.version_info >= (3, 10) or sys.exit( \
		'Python 3.10 or newer is needed; python3 here is ' + sys.version)"
	python3 -m venv .venv
	$(RUN) -m pip install -qq --disable-pip-version-check -r requirements.txt
	@touch $@

.venv-torch213/.installed:
	@echo "== Installing torch 2.13 into .venv-torch213"
	python3 -m venv .venv-torch213
	.venv-torch213/bin/python -m pip install -qq --disable-pip-version-check \
		torch==2.13.0 numpy pytest
	@touch $@

$(STAMPS)/.built: $(SOURCES) $(INSTALLED)
	@echo "== Building the library (CUDA code, if nvcc is found, for $(TORCH_CUDA_ARCH_LIST))"
	$(BUILD)
	@mkdir -p $(STAMPS) && touch $(STAMPS)/.built-cpu $@

$(STAMPS)/.built-cpu: $(SOURCES) $(INSTALLED)
	@echo "== Building the library for the CPU"
	rm -f sb_fast_sligru/_C_cuda* $(STAMPS)/.built
	NO_CUDA=1 $(BUILD)
	@mkdir -p $(STAMPS) && touch $@
