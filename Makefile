# make demo        merge + OPD from the shipped teachers, then the table and the pictures (about 3 minutes on 2 idle cores)
# make test        the proofs, in two processes (about five and a half minutes on 2 cores)
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
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

reproduce: .venv/installed
	$(PY) -m bench.flow_opd learning
	$(PY) -m bench.flow_opd judges
	for job in merging guidance timesteps curation student nft; do $(PY) -m bench.qwen_rl $$job; done

bench: .venv/installed
	$(PY) -m bench.flow_opd estimators
	$(PY) -m bench.flow_opd speed
	$(PY) -m bench.flow_opd overlap
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
	find assets \( -name training -o -name training.json -o -name README.md \) -exec rm -rf {} +

clean:
	rm -rf runs .venv
