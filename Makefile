# make demo         set up .venv and let the bundled model answer a word problem
# make frontier     set up .venv and compare every policy with three caches: table, plots and page in outputs/frontier
# make test         set up .venv with the development tools and run the test suite
# make test-all     the same with all combinations of parameters, of which make test takes a covering set
# make test-oldest  make test with the oldest declared dependencies, in .venv-oldest
# make notebooks    run docs/notebooks/*.py and write them with their outputs to build/notebooks
# make docs         build the documentation site in build/site; DLLM_DOCS_EXECUTE=false runs no notebook
# make check        lint, format, types, imports (make -k check goes on after a failure)
# make clean        remove the environments and everything built
#
# PYTHON names the interpreter to start from, for example: make test PYTHON=/usr/bin/python3.11

PYTHON ?= $(shell for python in python3.11 python3; do "$$python" -c "" 2>/dev/null && echo "$$python" && exit; done; echo python3)
PYTEST_ARGS ?= -n 2 --dist loadgroup --no-loadscope-reorder --covering
DLLM_ARGS ?=
# The extras that the tests need; those of the last seven are skipped without them.
TESTED := dev,docs,eval,plot,scale,serve,structure,sweep
# Nobody watches the progress of an installation in CI.
PIP_ARGS ?= $(if $(CI),--quiet)

SHELL := /bin/sh
.SHELLFLAGS := -eu -c
.DELETE_ON_ERROR:
.PHONY: demo frontier test test-all test-oldest docs notebooks check lint format types imports typing-links clean

# What is compiled once is not compiled again by every process that a test starts.
unexport PYTHONDONTWRITEBYTECODE

# The environments are called by path. Nothing of an active one may leak into them.
unexport VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The models here are so small that a second thread only gets in the way, and badly on a busy machine.
demo frontier test test-all test-oldest docs notebooks: export OMP_NUM_THREADS ?= 1
test test-all test-oldest docs check: export TOKENIZERS_PARALLELISM := false

demo: .venv/.installed
	.venv/bin/dllm generate $(DLLM_ARGS)

frontier: .venv/.installed-plot
	.venv/bin/dllm evaluate sweep=frontier $(DLLM_ARGS)
	.venv/bin/dllm report outputs/frontier

test: .venv/.installed-dev
	.venv/bin/python -m pytest $(PYTEST_ARGS)

test-all: .venv/.installed-dev
	.venv/bin/python -m pytest $(filter-out --covering,$(PYTEST_ARGS))

test-oldest: .venv-oldest/.installed-dev
	.venv-oldest/bin/python -m pytest $(PYTEST_ARGS)

notebooks: .venv/.installed-dev
	mkdir -p build/notebooks
	for book in docs/notebooks/*.py; do .venv/bin/python -m jupytext --quiet --to ipynb --execute "$$book" \
		--output "build/notebooks/$$(basename "$$book" .py).ipynb"; done

docs: export NO_MKDOCS_2_WARNING := 1
docs: .venv/.installed-dev typing-links
	.venv/bin/python -m mkdocs build --strict

check: lint format types imports

lint: .venv/.installed-dev
	.venv/bin/ruff check .

format: .venv/.installed-dev
	.venv/bin/ruff format --check .

types: .venv/.installed-dev typing-links
	.venv/bin/mypy

imports: .venv/.installed-dev typing-links
	cd .typing && ../.venv/bin/lint-imports --config ../pyproject.toml --no-cache

# samplers/, cache/, conf/ and scripts/ become dllm.* only when installed; tools that read source
# files see them there through this tree of links.
typing-links:
	@rm -f .typing/dllm/*
	@for path in dllm/*.py dllm/py.typed $(patsubst %/__init__.py,%,$(wildcard dllm/*/__init__.py)) \
		samplers cache conf scripts; do ln -s "../../$$path" ".typing/dllm/$${path##*/}"; done

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment ignores itself, so that no other file needs to know its name.
.venv/.created .venv-oldest/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than Python 3.11; name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(@D) || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@echo '*' > $(@D)/.gitignore
	@touch $@

define install
	$(@D)/bin/python -m pip install $(PIP_ARGS) --no-compile --constraint $< setuptools
	$(@D)/bin/python -m pip install $(PIP_ARGS) --no-compile --constraint $< --no-build-isolation --editable $(1)
	@touch $@
endef

.venv/.installed: constraints.txt pyproject.toml .venv/.created
	$(call install,.)

.venv/.installed-plot: constraints.txt pyproject.toml .venv/.created
	$(call install,'.[plot]')
	@touch $(@D)/.installed

.venv/.installed-dev: constraints.txt pyproject.toml .venv/.created
	$(call install,'.[$(TESTED)]')
	@touch $(@D)/.installed $(@D)/.installed-plot

.venv-oldest/.installed-dev: constraints-oldest.txt pyproject.toml .venv-oldest/.created
	$(call install,'.[dev]')
