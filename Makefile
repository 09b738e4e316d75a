# make test, make demo: each sets up .venv and the extension where that has not been done, then does its job.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
EXTENSION := $(VENV)/extension.stamp
REQUIREMENTS := $(VENV)/requirements.stamp
TEST_REQUIREMENTS := $(VENV)/requirements-test.stamp

.PHONY: test demo demo-short setup clean

setup: $(EXTENSION)

test: setup $(TEST_REQUIREMENTS)
	$(PY) -m pytest -q tests

demo: setup
	$(PY) demo/run.py

demo-short: setup
	$(PY) demo/run.py --short --out out/demo-short

$(REQUIREMENTS): requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "SALT-VLA needs Python 3.10 or newer; give make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt
	touch $@

$(TEST_REQUIREMENTS): $(REQUIREMENTS) requirements-test.txt
	$(PY) -m pip install -q -r requirements-test.txt
	touch $@

$(EXTENSION): $(REQUIREMENTS) setup.py $(wildcard csrc/*)
	$(PY) setup.py -q build_ext
	touch $@

clean:
	rm -rf $(VENV) build salt_ops*.so
