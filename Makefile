PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test lint

demo: $(VENV)/installed
	$(VENV)/bin/python -m sklearn_backdoor demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/installed: pyproject.toml constraints/ci.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints/ci.txt -e '.[dev]'
	touch $@
