"""The laptop block of README.md: its commands, in their order, on small settings, do what their comments say."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness import page
from tests.helpers.runs import SMALL, SMALL2, command

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.search(r"## On a laptop\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
LINES = [shlex.split(line, comments=True) for line in BLOCK.splitlines() if line.startswith(("python", "torchrun"))]


def small(words):
    """A command of README -> its program and its flags on settings that train in a blink."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    program, flags = words[at], words[at + 1 :]
    stage = "eval" if program == "eval.py" else ""
    more = ["--steps", "2"] if stage == "" and "--help" not in flags else []
    return program, command(SMALL2 if "tiny-qwen" in flags else SMALL, *flags, *more, stage=stage)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What the commands leave: [(line, exit code)], and the folder they were started in."""
    import eval as evaluation
    import train

    folder, ended = tmp_path_factory.mktemp("laptop"), []
    (folder / "assets").symlink_to(ROOT / "assets")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "plot", lambda *_: "")  # curves take longer than such small runs do
        for words in LINES:
            program, flags = small(words)
            if words[0] == "torchrun":
                launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
                env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
                done = subprocess.run([*launch, ROOT / program, *flags], env=env, capture_output=True, timeout=300)
                ended.append((words, done.returncode))
                continue
            try:
                ended.append((words, {"train.py": train, "eval.py": evaluation}[program].main(flags)))
            except SystemExit as left:  # --help
                ended.append((words, left.code or 0))
    return ended, folder / "runs"


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_command_of_the_laptop_block_ends_well(runs):
    assert len(LINES) == 8 and [(words, code) for words, code in runs[0] if code] == []


def test_each_command_does_what_its_comment_says(runs):
    folder = runs[1]
    for name, curve in (("tiny-opd", "gap"), ("two", "gap"), ("literal", "gap"), ("tiny-qwen-opd", "gap"),
                        ("tiny-grpo-text", "reward")):  # fmt: skip
        assert [curve in row for row in metrics(folder / name)] == [True, True], f"{name} has trained two steps"
    assert json.loads((folder / "literal/config.json").read_text())["estimator"] == "literal"
    rows = json.loads((folder / "eval/results.json").read_text())
    assert set(rows) == {"base", "teacher composition", "teacher text", "teacher quality", "student"}
    everything = json.loads((folder / "everything/results.json").read_text())
    assert {"base", "merged", "sft", "opd student"} < set(everything) and (folder / "everything-pretrain").is_dir()
