# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
OUT ?= out
# For each worker: two of them with a pool of threads each, or of processes that compile, would fight over the cores.
ONE_THREAD := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
# Each worker gets a row of whole files, which share fixtures, and takes from the other's end when it is done.
SPLIT = -n $(WORKERS) --dist worksteal
# A part of every room, in a minute on two cores: what to run while editing.
FAST := $(addprefix tests/,adaptation/test_rows.py calibration compat docs/test_glossary.py docs/test_paths.py \
	evaluation/test_samples.py evaluation/test_statistics.py \
	export/test_aoti.py::test_bad_paths_are_refused_before_any_work frontend/test_failures.py \
	kernels/cpu/test_prefill.py::test_pooled_keys kernels/triton/test_launches.py \
	kv_cache/test_static_caches.py::test_what_is_no_position_in_a_cache_stays_dense \
	kv_cache/test_static_caches.py::test_keys_that_others_write_are_compressed_anew lowering/export/test_atomic_file.py \
	lowering/inductor/test_mutation_cache.py lowering/ops/test_attention_args.py lowering/ops/test_checks.py \
	masks/test_mask_values.py masks/test_masks_forms.py plan/test_break_even.py plan/test_score_channels.py \
	rewrite/test_report.py rewrite/test_targets.py sites/test_sites.py test_config.py test_import_direction.py \
	test_tables.py tools/test_tune.py)

.PHONY: help install demo test test-fast test-kernels test-gpu test-lm-eval test-wrappers test-matrix zoo sanitize lint docs bench bench-gpu lock clean

help:
	@echo "make demo   the main job on SmolLM2-135M: site report, dense against sparse, pictures in $(OUT)/"
	@echo "make test   the test suite"
	@echo "make test-fast  of these, a part that takes about a minute"
	@echo "make test-kernels  of these, the Triton kernels in Triton's interpreter"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make test-lm-eval  the tests that need lm_eval, which they install"
	@echo "make test-wrappers the tests that need PEFT and trl, which they install"
	@echo "make test-matrix  the compiler part of the suite with other versions of Python, PyTorch and transformers"
	@echo "make sanitize  the kernels under compute-sanitizer"
	@echo "make zoo    every causal architecture through the pass: docs/zoo.md and the record that tests compare with"
	@echo "make docs   the site of the documentation, in out/site/; warnings fail"
	@echo "make lint   ruff and mypy"
	@echo "make bench  the CPU benchmark, results in benchmarks/results/"
	@echo "make bench-gpu  the benchmarks that need a CUDA device"
	@echo "make lock   pin requirements.txt anew from requirements.in"
	@echo "make clean  remove the environment and what was built"

install: $(READY)

# Most modules are never imported: those that are get compiled then.
$(READY): requirements.txt requirements-checkpoint.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-checkpoint.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $(READY)

demo: install
	$(BIN)/infllm-pass demo --out $(OUT)

test: install
	$(ONE_THREAD) $(BIN)/python -m pytest $(SPLIT) -m "not gpu"

test-fast: install
	$(ONE_THREAD) $(BIN)/python -m pytest -q $(SPLIT) -m "not gpu" $(FAST)

test-kernels: install
	$(ONE_THREAD) $(BIN)/python -m pytest $(SPLIT) -m interpreter

test-gpu: install
	$(BIN)/python -m pytest -m gpu

test-lm-eval: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-lm-eval.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/tools/test_lm_eval.py

test-wrappers: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-wrappers.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/frontend/test_parts.py tests/frontend/test_trainers.py \
		tests/adaptation/test_adapters.py

# Downloads some 3 GB for each version of PyTorch; `python -m tests.matrix --help` tells how to use environments that exist.
test-matrix: install
	$(BIN)/python -m tests.matrix

# Out-of-bounds accesses and shared-memory races of the kernels; needs compute-sanitizer of the CUDA toolkit.
sanitize: install
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m tests.support.sanitized \
			|| exit 1; done

zoo: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-zoo.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo --workers $(WORKERS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p infllm_pass

docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: install
	$(BIN)/infllm-pass bench cpu_prefill cpu_decode

bench-gpu: install
	$(BIN)/infllm-pass bench prefill backward memory breakeven decode model generate package

lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet -r requirements.in
	$(VENV)-lock/bin/python -m pip freeze --all --exclude pip \
		| sed -e 's/+cpu$$//' -e 's/^\(triton\|tensorrt_rtx[a-z0-9_]*\|nvidia-[a-z0-9-]*\|cuda-[a-z0-9-]*\)==.*/& ; sys_platform == "linux"/' > requirements.txt
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) .matrix $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
