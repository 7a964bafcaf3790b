# Every target makes its own virtual environment when it is missing; PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CPU := JAX_PLATFORMS=cpu
WORKERS ?= 2

# One stamp a set of extras, so that a target installs only what it needs and only once.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock

.PHONY: help train test test-all test-tpu test-tpu-all golden-tpu parity lint format golden catalogue lock clean

help:
	@echo "make train      train a Swin on real images over a mesh of 8 virtual devices; report in runs/swin_digits"
	@echo "make test       the default tests (minutes)"
	@echo "make test-all   the slow ones, the parity suite, and the newest Python found besides the default one"
	@echo "make parity     the layers beside PyTorch references"
	@echo "make test-tpu   compile layers and some models for TPU ahead of time, at no more than their stored cost (no TPU)"
	@echo "make lint       ruff, mypy, import contracts"

$(BIN)/python:
	$(PYTHON) tools/check_python.py
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(BIN)/python pyproject.toml requirements.lock
	$(INSTALL) --editable ".[train]"
	@touch $@

$(VENV)/.test: $(VENV)/.train
	$(INSTALL) --editable ".[train,test]"
	@touch $@

$(VENV)/.parity: $(VENV)/.test
	$(INSTALL) --editable ".[train,test,parity]"
	@touch $@

# libtpu slows and clutters a plain start of JAX: it has an environment of its own.
$(VENV)-tpu/.ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock \
		--editable ".[train,test,tpu-plan]"
	@touch $@

train: $(VENV)/.train
	$(BIN)/python -m train configs/swin_digits.py --devices 8

test: $(VENV)/.test
	$(CPU) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test-all: $(VENV)/.test parity
	$(CPU) $(BIN)/python -m pytest -m "not tpu" -n $(WORKERS) --dist loadgroup
	newest=$$($(PYTHON) tools/check_python.py --newest); \
	$(MAKE) test PYTHON=$$newest VENV=$(VENV)-newest

TPU := TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-16 TPU_WORKER_HOSTNAMES=localhost ALLOW_MULTIPLE_LIBTPU_LOAD=1

test-tpu: $(VENV)-tpu/.ready
	$(CPU) $(TPU) $(VENV)-tpu/bin/python -m pytest -m tpu -n $(WORKERS) tests/conformance_test.py
	$(CPU) $(VENV)-tpu/bin/python -m tools.cost_gate --quick --workers $(WORKERS) --python $(VENV)-tpu/bin/python

# The rest that needs libtpu: kernels, plans, and the steps of all families of named models.
test-tpu-all: test-tpu
	$(CPU) $(TPU) $(VENV)-tpu/bin/python -m pytest -m tpu tests/train/recompute_test.py tests/window/spatial_test.py \
		tests/kernels tests/tools/plan_test.py tests/tools/kernel_cost_test.py
	$(CPU) $(VENV)-tpu/bin/python -m tools.cost_gate --python $(VENV)-tpu/bin/python

golden-tpu: $(VENV)-tpu/.ready
	$(CPU) $(TPU) $(VENV)-tpu/bin/python -m pytest -m tpu -n $(WORKERS) tests/conformance_test.py --regenerate-golden

parity: $(VENV)/.parity
	$(CPU) $(BIN)/python -m pytest tests/parity -n $(WORKERS) --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(VENV)/.test
	$(CPU) $(BIN)/python -m pytest tests/conformance_test.py -k parameter_tree --regenerate-golden

catalogue: $(VENV)/.test
	$(CPU) $(BIN)/python -m tools.catalogue

# Pins for every supported Python in one file. CUDA packages stay out: they follow from torch where it needs them.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras --prerelease disallow \
		--no-annotate --no-header --no-emit-index-url --no-emit-find-links pyproject.toml --output-file $(VENV)-lock/raw
	grep -vE '^(nvidia-|cuda-|triton)' $(VENV)-lock/raw | sed -E 's/^torch==([0-9.]+)(\+cpu)?.*/torch==\1/' | uniq \
		> requirements.lock

clean:
	rm -rf .venv .venv-* build dist *.egg-info
