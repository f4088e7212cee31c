# Everything lives in .venv; each target sets up what is missing before it starts.
#   PYTHON=python3.12      the interpreter to build .venv with
#   TORCH_INDEX_URL=...    the package index to take PyTorch from (CPU or GPU build)
#   ARGS=--full            passed on to the demo, and to demo-session

BIN := .venv/bin
SCRIPTS = $$(grep -l "^\#!.*python" tools/* tests/contract/*)

.PHONY: help setup demo demo-session test check slow bench-peers old-server clean

help:
	@echo "make demo    the whole loop on a year of real flights; ARGS=--full plays all of it"
	@echo "make demo-session  a local page whose ranking adapts to whoever clicks"
	@echo "make test    checks and every test, with small counts"
	@echo "make slow    checks and every test, with full counts"
	@echo "make check   ruff and mypy"
	@echo "make bench-peers  what tools/bench-serving compares with, below var/peers"
	@echo "make old-server  an older broker below var/old-server, for the test of upgrades"
	@echo "make clean   remove .venv, var and caches"

setup:
	@tools/setup

demo: setup
	@$(BIN)/cloud-learner demo $(ARGS)

demo-session: setup
	@$(BIN)/cloud-learner demo-session $(ARGS)

check: setup
	$(BIN)/ruff check . $(SCRIPTS)
	$(BIN)/ruff format --check . $(SCRIPTS)
	$(BIN)/mypy

test: check
	$(BIN)/pytest -m "not slow"

slow: check
	$(BIN)/pytest

bench-peers: setup
	@tools/bench-peers

old-server: setup
	@tools/old-server

clean:
	rm -rf .venv var dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
