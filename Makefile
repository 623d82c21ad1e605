# `make quickstart` shows the product, `make test` proves it; both make .venv first.
PYTHON ?= python3.11

.PHONY: quickstart test check bench clean

quickstart: .venv/installed
	.venv/bin/kd sweep pipelines/configs/sweeps/quickstart.yaml

# tests/clusters apart: a process of Ray's keeps the first token that it has read
test: .venv/installed check
	.venv/bin/python -m pytest -m "not slow" --ignore tests/clusters
	.venv/bin/python -m pytest -m "not slow" tests/clusters

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/installed
	.venv/bin/python -m pytest -m slow --ignore tests/clusters
	.venv/bin/python -m pytest -m slow tests/clusters

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv
