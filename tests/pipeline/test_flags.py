"""Every flag acts or is refused: in each stage, each value of each field, also under other values of other fields.

A run of a blink is compared with one that leaves the flag out: its weights, metrics, files and scores, and the forwards
that its plan counts. `make test-all` tries every pair of a flag and a value of another one, `make test` some of them.
"""

import hashlib
import json
import os
import random
import re

import pytest
import safetensors.torch

import eval as evaluation
import settings as S
import train
from harness import cli
from harness.counting import forwards
from models import tiny
from tests.helpers.runs import command
from tiny import drawings
from tiny import judge as tiny_judge

WHOLE = bool(os.environ.get("WHOLE_GRID"))
SHARE = 3  # pairs of a stage, if not the whole grid
LINES_A_STAGE = 6  # single flags of a stage, likewise
# What moves no number on purpose: which run it is and where it lies; where and how it is computed, what a wait or a
# fault leads to. `parallel` has tests of its own under several processes.
ELSEWHERE = {
    "preset", "stage", "name", "out", "config", "resume", "dry_run", "device", "parallel", "timeout", "wandb",
    "on_reward_failure",
}  # fmt: skip
LINES = {  # what makes the other flags visible in three steps, beside tests.helpers.runs
    "": "--steps 3 --save-every 2 --keep 2 --warmup 2 --eval-prompts 3 --num-steps 4 --window 0:3",
    "grpo": "--task text --beta 0.1 --rewards quality=1,preference=2",
    "nft": "--task text --rewards quality=1,preference=2", "opd": "--mar 0.3",
    "curate": "--threshold 0.01", "reward": "--batch-size 4 --micro-batch 0 --holdout 0.2",
}  # fmt: skip
OTHER = {  # another value, if a number's double shows too little or a text has no choices
    "advantage_clip": "0.3", "ema_decay": "0.05", "weight_decay": "0.5", "grad_norm": "1e-9", "train_count": "1",
    "micro_batch": "2", "cfg": "2.5", "beta": "0.5", "holdout": "0.4", "seed": "5", "updates": "3", "keep": "1",
    "window": "1:2", "tasks": "text,quality", "rewards": "quality=1", "eval_prompts": "2", "threshold": "0.3",
    "noise_level": "0.4", "save_every": "3", "train_prompts": "1", "suite": "arena", "export": "flat",
}  # fmt: skip


class Blink:
    """Runs of one stage, by their flags."""

    def __init__(self, stage, world, folder):
        self.stage, self.world, self.folder, self.known = stage, world, folder, {}
        self.texts = {"anchor": str(world.teachers["text"]), "init": str(world.teachers["quality"])}
        self.texts |= {"compare": f"one={world.teachers['text']}", "model": str(world.root / "other")}
        self.texts |= {"prompts": f"text={world.root / 'own.txt'}"}
        self.texts |= {"teachers": [f"{t}={world.teachers['text']}" for t in world.teachers]}

    def parsed(self, flags):
        """The settings of a command line, or None if it is refused."""
        line = [*self.world.flags, *(LINES[""] + " " + LINES.get(self.stage, "")).split()]
        if self.stage == "eval" and "--compare" not in flags:  # a student, of which --guidance teacher says something
            flags = [*flags, "--compare", f"two={self.world.teachers['quality']}"]
        argv = command(line, *([] if self.stage == "eval" else ["--stage", self.stage]), *flags, stage=self.stage)
        argv += ["--name", "run", "--out", str(self.folder / str(len(self.known)))]
        try:
            return argv, cli.parse(argv, "eval.py" if self.stage == "eval" else "train.py")[0]
        except S.SettingsError:
            return None

    def others(self, name, value):
        """Flags that give a field each of its other values, or one of them."""
        f, flag = S.FIELDS[name], "--" + name.replace("_", "-")
        if f.type is bool:
            return [[f"--no-{flag[2:]}" if value else flag]]
        if "choices" in f.metadata:
            return [[flag, each] for each in f.metadata["choices"] if each not in ("", value)]
        other = self.texts.get(name) or OTHER.get(name) or str(2 * value or 1)
        return [[flag, *([other] if isinstance(other, str) else other)]]

    def outcome(self, flags=()):
        """What a run with these flags leaves behind, as a digest; None if they are refused."""
        key = tuple(flags)
        if key not in self.known:
            found = self.parsed(flags)
            self.known[key] = found and self.run(*found)
        return self.known[key]

    def run(self, argv, s):
        loop = train.LOOPS.get(self.stage)
        digest = self.digest = hashlib.sha256(repr(sorted(forwards(s, loop).items())).encode())
        code = (evaluation if self.stage == "eval" else train).main(argv)
        assert code in (0, 2), argv
        if code == 2:  # refused when the files were read
            return None
        for file in sorted((self.folder / str(len(self.known))).rglob("*")):
            if file.is_dir() or file.name in ("config.json", "README.md", "report.html") or "tfevents" in file.name:
                continue
            content = file.read_bytes()
            if file.suffix == ".safetensors":
                content = repr(sorted((k, v.numpy().tobytes()) for k, v in safetensors.torch.load(content).items()))
            elif file.name == "metrics.jsonl":
                rows = [json.loads(line) for line in content.splitlines()]
                content = repr([{key: row[key] for key in row if key != "seconds"} for row in rows])
            where = re.sub(r"-\w{12}/", "/", str(file.relative_to(self.folder)).split("/", 1)[1])
            if file.name != "rows.jsonl":  # it has the names of pictures, which follow from settings
                digest.update(repr((where, content)).encode())
        return digest.hexdigest()


@pytest.fixture
def blink(request, world, tmp_path, no_pictures, monkeypatch):
    real = tiny.new_tiny
    monkeypatch.setattr(tiny, "new_tiny", lambda seed, **more: real(seed, **{**more, "width": 32, "layers": 1}))
    monkeypatch.setattr(tiny_judge, "PROMPTS", 24)
    whole = tiny_judge.TinyJudge
    monkeypatch.setattr(tiny_judge, "TinyJudge", lambda width=32, layers=1, seed=0: whole(width, layers, seed))
    if not (world.root / "own.txt").exists():
        (world.root / "own.txt").write_text("".join(f"{p.text}\n" for p in drawings.make_prompts("text", "train", 9)))
        model = real(1, width=32, layers=1)
        model.save_full(world.root / "other", model.transformer.state_dict())
    return Blink(request.param, world, tmp_path)


def changed(blink, context=(), only=S.FIELDS):
    """Command lines that give one more field another value than it has under the flags of `context`."""
    found = blink.parsed(context)
    for name in S.FIELDS if found else ():
        if name in only and name not in ELSEWHERE and "--" + name.replace("_", "-") not in context:
            yield from ([*context, *flags] for flags in blink.others(name, getattr(found[1], name)))


def silent(blink, lines, context=()):
    """Those of `lines` that are let through and do what the flags of `context` do alone."""
    base = blink.outcome(context)
    return [" ".join(line) for line in lines if base and blink.outcome(line) == base]


@pytest.mark.parametrize("blink", S.READERS, indirect=True)
def test_every_value_of_every_flag_changes_what_a_stage_does_or_is_refused(blink):
    lines = list(changed(blink))
    tried = lines if WHOLE else random.Random(blink.stage).sample(lines, min(len(lines), LINES_A_STAGE))
    assert blink.outcome(()) and silent(blink, tried) == []


CHOICES = {name for name, f in S.FIELDS.items() if f.type is bool or "choices" in f.metadata}
OFF = [*([f"--{name}", "0"] for name in ("mar", "beta", "eval-prompts", "noise-level")), ["--cfg", "2.5"]]


@pytest.mark.parametrize("blink", S.READERS, indirect=True)
def test_so_it_does_under_every_value_of_another_flag(blink):
    contexts = [line for line in (*changed(blink, (), CHOICES), *OFF) if blink.parsed(line)]
    pairs = [(context, line) for context in contexts for line in changed(blink, context, CHOICES | {*S.UNREAD})]
    tried = pairs if WHOLE else random.Random(blink.stage).sample(pairs, SHARE)
    assert [found for context, line in tried for found in silent(blink, [line], context)] == []
