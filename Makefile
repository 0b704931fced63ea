# Two commands on a fresh machine: `make book` and `make test`. `make help` lists the others.
# All need only make and Python 3.11 or newer; PYTHON=/path/to/python chooses one.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SITE := _build/html
# how many tests run at once; `make test JOBS=1` runs them one after the other
JOBS := 2
PARALLEL := -n $(JOBS) --dist loadgroup --no-loadscope-reorder

help:  ## list what make can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

book: setup fetch  ## render the book into _build/html, from the stored outputs; a warning is an error
	@$(BIN)/python tools/build_book.py

pdf: book  ## the whole book as one PDF, and each page as its own, into _build/html/pdf (needs Chromium)
	@$(BIN)/python tools/print_book.py
	@$(BIN)/python -m pytest tests/book/test_print.py -m printed -q

epub: book  ## the whole book for e-readers: _build/html/peft-lab.epub (needs Chromium)
	@$(BIN)/python tools/epub_book.py
	@$(BIN)/python -m pytest tests/book/test_epub.py -m printed -q

archive: pdf epub  ## the site, its PDFs and its EPUB as one archive, which opens by a double click: _build/html/peft-lab-book.zip
	@$(BIN)/python tools/archive.py

test: setup fetch  ## everything: lint, unit and parity tests, every notebook, the rendered book in a browser
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest tests -m "not gpu and not kills and not printed" $(PARALLEL)

test-newest: setup fetch  ## every notebook, unit and parity tests with the newest releases, in an environment of its own
	@$(BIN)/python tools/other_versions.py newest

test-colab: setup fetch  ## the same with the versions that Colab has
	@$(BIN)/python tools/other_versions.py colab

check: setup fetch  ## lint and unit tests, under two minutes
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/unit tests/notebooks/test_rules.py tests/notebooks/test_style.py -m "not gpu and not slow and not kills" $(PARALLEL)

kills: setup fetch  ## kill many saves and runs: the old or the new folder is there, whole, and a run goes on to the bit
	@$(BIN)/python -m pytest tests/unit -m kills

mutants: setup  ## change 200 lines that compute, one by one, and see whether the closest tests fail (an hour; ONLY=losses.py)
	@$(BIN)/python tools/mutants.py --jobs $(JOBS) $(if $(ONLY),--only $(ONLY),--limit 200)

test-gpu: setup fetch  ## the tests that need a CUDA device
	@$(BIN)/python -m pytest tests -m gpu

lab: $(VENV)/.lab fetch  ## JupyterLab on the book
	@$(BIN)/jupyter lab book

refresh: setup fetch  ## run a chapter anew and store its outputs: make refresh CH=02
	@test -n "$(CH)" || { echo "refresh: which chapter? For example: make refresh CH=02" >&2; exit 2; }
	@$(BIN)/python tools/refresh.py $(CH)

prose: setup  ## fill in the values, links, citations and numbers that prose names, without running a chapter
	@$(BIN)/python tools/refresh.py --prose

fetch: setup  ## bring the models and data sets, verified (nothing is downloaded twice)
	@$(BIN)/peftlab fetch

screenshot: book  ## draw the README's picture from the rendered LoRA chapter (needs Chromium)
	@$(BIN)/python tools/screenshot.py --at equation-eq-lora --below 280 --height 1160

constraints:  ## renew constraints.txt from a fresh environment, with today's releases
	@sh tools/constraints.sh

clean:  ## remove the environment and everything built; fetched models and data stay
	rm -rf $(VENV) $(VENV)-newest $(VENV)-colab _build build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

setup: $(INSTALLED)

# The stamps are younger than what they were made from as long as nothing has changed.
$(INSTALLED): pyproject.toml constraints.txt tools/setup.sh
	@sh tools/setup.sh test
	@touch $@

$(VENV)/.lab: $(INSTALLED)
	@sh tools/setup.sh test,lab
	@touch $@

.PHONY: help book pdf epub archive test test-newest test-colab check kills mutants test-gpu lab refresh prose fetch screenshot constraints clean setup
