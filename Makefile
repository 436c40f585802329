# make demo        merge + OPD from the shipped teachers, then the table and the pictures (about 6 minutes on 2 cores)
# make test        the proofs (about 8 minutes on 2 cores)
# make reproduce   the README's learning results, three seeds each (hours)
# make bench       the README's speed figures and the estimator table
# Each builds .venv on first use.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test reproduce bench assets clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -e '.[test]'
	touch $@

demo: .venv/installed
	$(PY) train.py --preset tiny --stage merge --name demo-merge
	$(PY) train.py --preset tiny --stage opd --name demo-opd --init runs/demo-merge
	$(PY) eval.py --preset tiny --name demo --compare merged=runs/demo-merge "opd student=runs/demo-opd"

test: .venv/installed
	.venv/bin/ruff check
	$(PY) -m pytest

clean:
	rm -rf runs .venv
