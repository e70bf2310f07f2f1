# `make demo` and `make test` are all there is to know; the rest is for contributors.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo
TRITON := $(VENV)/triton

# A CPU build of torch where pip can find one: the plain name would fetch gigabytes of CUDA.
TORCH := torch==2.13.0

.PHONY: setup demo test test-full test-triton test-gpu check presets docs bench clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[cpu,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/eulerstack explain arch_expert_research_mini
	$(BIN)/eulerstack fit --preset arch_expert_research_mini --trainer.max_steps 400 --data.seq_len 256 \
	  --trainer.val_check_interval 100 --trainer.limit_val_batches 10 --trainer.default_root_dir $(DEMO)
	$(BIN)/eulerstack test --checkpoint $(DEMO)/checkpoint
	$(BIN)/eulerstack generate --checkpoint $(DEMO)/checkpoint --prompt "def " --max-new-tokens 400 --seed 0
	@echo "loss curve: $(CURDIR)/$(DEMO)/loss.png"

# Every run draws the same numbers.
test: $(READY)
	$(BIN)/pytest -m "not slow and not gpu"

# Hypothesis draws afresh, and prints the --hypothesis-seed=N that repeats it.
test-full: $(READY)
	$(BIN)/pytest -m "not gpu" --hypothesis-profile=fresh

# Triton's interpreter runs the GPU kernels on a CPU, slowly: their results, not their speed. Pinned, because the test
# has to reach into the interpreter; in a folder of its own, because other tests are of a machine without it.
test-triton: $(READY)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(TRITON) triton==3.9.0 fla-core==0.6.0 einops==0.8.2
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels/test_fla.py tests/kernels/test_triton.py

# On a machine with a GPU: the contract, the kernels, and steps captured as graphs.
test-gpu:
	python -m pytest --device cuda -m "not slow" tests/contract
	python -m pytest tests/kernels/test_triton.py tests/kernels/test_fla.py tests/inference/test_graphs.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Writes the presets that follow from tables, and the figures in the headers of all.
presets: $(READY)
	$(BIN)/python -m tools.presets

docs: $(READY)
	$(BIN)/python -m eulerstack schema > schemas/eulerstack-v1.json
	$(BIN)/python -m tools.reference > docs/reference.md

bench: $(READY)
	$(BIN)/pip install --quiet --editable ".[bench]"
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.inference

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
