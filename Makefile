PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test lint docs

demo: $(VENV)/installed
	$(VENV)/bin/python -m sklearn_backdoor demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/installed
	$(VENV)/bin/python -m sphinx -W --keep-going -b html docs docs/_build

$(VENV)/installed: pyproject.toml constraints/ci.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints/ci.txt -e '.[dev]'
	touch $@
