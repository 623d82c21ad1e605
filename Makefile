# `make quickstart` shows the product, `make test` proves it; both make .venv first.
PYTHON ?= python3.11

.PHONY: quickstart test check bench clean

quickstart: .venv/installed
	.venv/bin/kd sweep pipelines/configs/sweeps/quickstart.yaml

test: .venv/installed check
	.venv/bin/python -m pytest -m "not slow"

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/installed
	.venv/bin/python -m pytest -m slow

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv
