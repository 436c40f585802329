"""What goes wrong while a run is under way is named as what it is: a poisoned part of the model, rewards that are all
equal, an output that nobody reads.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

import eval as evaluation
import opd
from models import hub
from tests.helpers.runs import command, the_error
from tiny import drawings

ROOT = Path(__file__).resolve().parents[2]


def poison(file, number=math.nan):
    """One number of one tensor."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    tensors[sorted(tensors)[-1]].flatten()[0] = number
    safetensors.torch.save_file(tensors, file, about)


BASE, WORDS = "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
POISONED = {  # which file of the base or of a teacher, the stage, and what the line says
    "the base of grpo": (BASE, ["--stage", "grpo", "--task", "text"], "the base .*number that is not finite"),
    "the encoder of nft": (WORDS, ["--stage", "nft", "--task", "text"], "the text encoder of "),
    "the encoder of opd": (WORDS, ["--stage", "opd"], "the text encoder of "),
    "a teacher of opd": ("teacher", ["--stage", "opd"], "teacher"),
}


@pytest.mark.parametrize("what", POISONED)
def test_a_part_that_is_poisoned_is_named_and_nothing_is_saved(go, world, tmp_path, capsys, what):
    file, flags, said = POISONED[what]
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    if file == "teacher":
        teacher = Path(shutil.copytree(world.teachers["text"], tmp_path / "teacher"))
        poison(teacher / "adapter_model.safetensors")
        flags = [*flags, "--teachers", f"text={teacher}"]
    else:
        poison(base / file)
    folder = go("run", *flags, "--model", str(base), code=2)
    assert re.search(said, the_error(capsys))
    assert hub.last_checkpoint(folder) is None


def test_a_poisoned_base_is_named_by_eval_py_too(world, tmp_path, capsys):
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    poison(base / WORDS, math.inf)
    flags = command(world.flags, "--out", str(tmp_path), "--model", str(base), stage="eval")
    assert evaluation.main(flags) == 2 and "the text encoder of " in the_error(capsys)


def test_a_gradient_that_explodes_says_so(go, monkeypatch, capsys):
    """A planted bug: the gradient is nan, and no weight and no checkpoint is written."""
    monkeypatch.setitem(opd.ESTIMATORS, "analytic", lambda at, v: ((v * math.nan).mean((1, 2, 3)), {}))
    folder = go("run", code=2)
    assert "the gradient's norm is nan" in the_error(capsys) and hub.last_checkpoint(folder) is None


def test_rewards_that_are_all_equal_are_one_warning_after_a_while(go, monkeypatch, capsys):
    monkeypatch.setitem(drawings.SCORERS, "quality", lambda images, prompts: [0.5] * len(images))
    go("run", "--stage", "grpo", "--task", "text", "--rewards", "quality=1", "--steps", "13", "--save-every", "20")
    assert re.findall(r"warning: step (\d+): for (\d+) steps no group's rewards differ", capsys.readouterr().err) == [
        ("10", "10")
    ]


@pytest.mark.parametrize("line", ["train.py --help | head -n 1", "train.py --steps 1e9", "eval.py --name $'a\\001b'"])
def test_an_output_that_nobody_reads_and_a_mistake_leave_no_traceback(line):
    script = f"set -o pipefail; {sys.executable} {line}"
    env = {**os.environ, "RANK": "0"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.stderr.count("\n") == (0 if "|" in line else 1) and "Traceback" not in done.stderr
    assert done.returncode == (2 if "|" not in line else done.returncode) and (done.stdout or done.stderr)
