# make test and make quickstart do all their set-up themselves, in a virtual environment of the clone.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
PEERS ?= .venv-benchmark
BENCHMARK ?= all
NEIGHBOURS ?= .venv-interop
INTEROP ?=
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup test lint quickstart benchmark interop clean

help:
	@echo "make quickstart   train and evaluate an SAE on the embedded language model, into RUN=$(RUN)"
	@echo "make test         every check: ruff, mypy, tests and doctests, on WORKERS=$(WORKERS) cores"
	@echo "make lint         ruff and mypy alone"
	@echo "make benchmark    step time, memory and whole runs beside other libraries, into docs/benchmark.md"
	@echo "                  (BENCHMARK=quality: error at the same L0, into docs/quality.md)"
	@echo "make interop      SAEs handed to other libraries and back, judged by them, into docs/interop.md"
	@echo "make setup        the pinned environment alone, in $(VENV)"
	@echo "make clean        remove caches and build products, not the environment and not the runs"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# A worker for each of WORKERS cores; tests that share what is slow to make stay on one. mypy runs
# beside them and speaks only if it finds something, so on success pytest's closing line is the last.
test: $(STAMP)
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy > $(VENV)/mypy.log 2>&1 & mypy=$$!; \
	echo "$(BIN)/pytest -n $(WORKERS) --dist loadscope"; \
	$(BIN)/pytest -n $(WORKERS) --dist loadscope; tests=$$?; \
	wait $$mypy || { echo "$(BIN)/mypy"; cat $(VENV)/mypy.log; exit 1; }; \
	exit $$tests

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

quickstart: $(STAMP)
	$(BIN)/lightning-sae fit --config configs/quickstart.yaml --trainer.default_root_dir $(RUN)
	$(BIN)/lightning-sae test --config $(RUN)/config.yaml --ckpt_path $(RUN)/checkpoints/last.ckpt

# The peers want versions of their own, so they have an environment of their own; one that is given
# as PEERS=/path/to/venv is used as it is. The torchvision that they bring may be built for another
# torch, and is not needed.
ifeq ($(origin PEERS),file)
benchmark: $(PEERS)/.installed
endif

benchmark:
	$(PEERS)/bin/python -m benchmarks $(BENCHMARK)

$(PEERS)/.installed: pyproject.toml benchmarks/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet torch==2.13.0
	$(PEERS)/bin/python -m pip install --quiet -r benchmarks/requirements.txt -e .
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

# As for the benchmark: an environment of their own, or one that is given as NEIGHBOURS=/path/to/venv.
ifeq ($(origin NEIGHBOURS),file)
interop: $(NEIGHBOURS)/.installed
endif

interop:
	HF_HUB_OFFLINE=1 $(NEIGHBOURS)/bin/python -m benchmarks.interop $(INTEROP)

$(NEIGHBOURS)/.installed: pyproject.toml benchmarks/interop/requirements.txt
	test -x $(NEIGHBOURS)/bin/python || $(PYTHON) -m venv $(NEIGHBOURS)
	$(NEIGHBOURS)/bin/python -m pip install --quiet torch==2.13.0
	$(NEIGHBOURS)/bin/python -m pip install --quiet -r benchmarks/interop/requirements.txt -e .
	$(NEIGHBOURS)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find lightning_sae callbacks tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
