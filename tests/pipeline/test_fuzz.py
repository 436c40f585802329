"""Whatever is given ends in a result or in one line. Seeded mutations of valid flags, settings, prompts, rewards,
adapters and checkpoints, in this process; a few whole runs, each in a child with a memory limit and a time-out.

MINOPD_FUZZ=50 does fifty times as many.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from data import files
from harness import cli, identity
from harness.ranks import USER_ERRORS
from models import hub, tiny
from scorers import registry
from tests.helpers.runs import SMALL, TASKS, command, save_random_adapter
from tests.helpers.toy import NFT, toy_in, train
from tiny import drawings

TIMES = int(os.environ.get("MINOPD_FUZZ", "1"))
DEEP = json.loads("[" * 200 + "]" * 200)
ODD = [
    None, True, -1, 0, 1, 2.5, -0.0, 1e308, 10**30, float("nan"), float("inf"), "", " ", "\x00", "a\nb", "x" * 300,
    "../..", "/", "~nobody/x", "\u202e\ud800", "nan", "inf", "1e9", "=", "text=", "0:0", ",", [], {}, [[]], DEEP,
    {"class": None}, [{"class": "cat", "count": -1}],
]  # fmt: skip
BYTES = [
    b"NaN", b"1e999", b"[" * 3000, b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"null", b'"', b"}", b"\r", b"9" * 5000, b"-",
]  # fmt: skip


def cut_up(rng, content):
    """Bytes with a few of them changed, lost, doubled or put in."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice([1, 2, 8, 200]))
        content[at:end] = rng.choice([b"", content[at:end] * 2, rng.randbytes(end - at), rng.choice(BYTES)])
    return bytes(content)


def changed(rng, value):
    """A JSON value with one value somewhere in it lost, moved to another name, or odd."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        value = value.copy()
        key = rng.choice([*value]) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.15:
            lost = value.pop(key)
            if isinstance(value, dict) and rng.random() < 0.5:
                value[str(rng.choice(ODD))] = lost
        else:
            value[key] = changed(rng, value[key])
        return value
    return rng.choice(ODD)


def ends_well(work, *arguments):
    """Does it return, or raise a user's error whose first line says something?"""
    try:
        work(*arguments)
    except USER_ERRORS as fault:
        assert str(fault).strip()


# ----------------------------------------------------------------------------------------- what is read in this process
def flags(rng, folder):
    stage = rng.choice(["pretrain", "curate", "grpo", "nft", "sft", "merge", "opd", "reward", "all"])
    words = [*command(SMALL, stage=stage), "--stage", stage, "--name", "n"]
    for _ in range(rng.randint(1, 2)):
        words[rng.randrange(len(words))] = str(rng.choice(ODD)) if rng.random() < 0.8 else rng.choice(words)
    ends_well(cli.parse, words)


def settings(rng, folder):
    given = {"preset": "tiny", "stage": "opd", "lr": 1e-3, "steps": 3, "name": "a"}
    given["teachers"] = dict.fromkeys(TASKS, "x")
    text = json.dumps(changed(rng, given)).encode()
    (folder / "c.json").write_bytes(cut_up(rng, text) if rng.random() < 0.5 else text)
    ends_well(cli.parse, ["--config", str(folder / "c.json")])


ENTRY = {
    "tag": "position", "prompt": 'a photo of a cow right of a laptop and a sign that says "HAT"', "category": "x",
    "include": [
        {"class": "laptop", "count": 1, "color": "red"}, {"class": "cow", "count": 2, "position": ["right of", 0]},
    ],
    "exclude": [{"class": "cow", "count": 3}], "image": "1.png", "t2i_prompt": "a cow",
}  # fmt: skip


def prompts(rng, folder):
    task, plain = rng.choice(files.TASKS), rng.random() < 0.3
    lines = [ENTRY["prompt"] if plain else json.dumps(changed(rng, ENTRY)) for _ in range(3)]
    text = "\n".join(lines).encode()
    file = folder / ("p.txt" if plain else "p.jsonl")
    file.write_bytes(cut_up(rng, text) if rng.random() < 0.5 else text)
    ends_well(files.read_prompts, file, task)
    ends_well(identity.data, file)


REWARDS = {
    "scorers": {"far": {"kind": "served", "scorer": "x", "endpoints": ["http://h:1"], "timeout": 5.0, "batch": 2}},
    "weights": {"default": {"far": 0.5, "quality": 1}, "counting": {"far": 1.0}}, "watch": ["preference"],
}  # fmt: skip


def rewards(rng, folder):
    text = json.dumps(changed(rng, REWARDS)).encode()
    (folder / "r.json").write_bytes(cut_up(rng, text) if rng.random() < 0.5 else text)
    short = "geneval=0.8,jpeg=0.2,x.py:f=1"
    for asked in (str(folder / "r.json"), cut_up(rng, short.encode()).decode("utf-8", "replace")):
        ends_well(lambda: registry.check(registry.read(asked, ("text",), drawings)))  # noqa: B023


def adapters(rng, folder):
    start, target = folder / "adapter", folder / "damaged"
    if not start.exists():
        model = tiny.new_tiny(0, width=32, layers=1)
        model.save_full(folder / "base", model.transformer.state_dict())
        save_random_adapter(folder / "base", start, seed=0)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(start, target)
    file = rng.choice([p for p in target.iterdir() if p.suffix in (".json", ".safetensors")])
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little") + 8 if file.suffix == ".safetensors" else len(content)
    if file.suffix == ".json":
        file.write_text(json.dumps(changed(rng, json.loads(content))))
    else:  # its header
        file.write_bytes(cut_up(rng, content[:length]) + content[length:])
    ends_well(lambda: tiny.load_tiny(folder / "base").read_adapter(hub.locate(target)))
    ends_well(identity.weights, target, hub.ADAPTER_FILES)


def runs(rng, folder):
    """What lies in a run's folder: its newest checkpoint, its config, its metrics."""
    start, out = folder / "start", folder / "out"
    if not start.exists():
        train(toy_in(start, **NFT, keep=5))
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(start, out)
    file = rng.choice([p for p in (out / "toy").rglob("*") if p.is_file() and "tfevents" not in p.name])
    if file.suffix == ".json" and rng.random() < 0.5:
        file.write_text(json.dumps(changed(rng, json.loads(file.read_text()))))
    else:
        file.write_bytes(cut_up(rng, file.read_bytes()))

    def resume():
        run = toy_in(out, **NFT, steps=4)
        assert run.step in (0, 1, 2, 3)
        train(run)

    ends_well(resume)


LAYERS = {flags: 150, settings: 150, prompts: 300, rewards: 100, adapters: 60, runs: 40}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_whatever_is_read_ends_in_a_result_or_in_one_line(layer, tmp_path, capsys):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PEFT's, of names that it does not know
    for seed in range(LAYERS[layer] * TIMES):
        try:
            layer(random.Random(seed), tmp_path)
        except SystemExit as stop:  # --help among the flags
            assert stop.code == 0
        except BaseException as fault:
            raise AssertionError(f"{layer.__name__}, seed {seed}") from fault


# ---------------------------------------------------------------------------------------------------------- whole runs
def in_a_child(argv, folder, seconds=60, memory=6 << 30):
    """train.main(argv) in a fork -> (exit code, negative for a signal; what it has printed as an error)."""
    import train as program

    child = os.fork()
    if child == 0:
        code = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
            signal.alarm(seconds)
            sys.stdout, sys.stderr = open(os.devnull, "w"), open(folder / "err", "w")  # noqa: SIM115
            os.chdir(folder)
            code = program.main(argv)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), (folder / "err").read_text()


def test_whole_runs_with_odd_values_end_in_a_result_or_in_one_line(world, tmp_path, no_pictures):
    for seed in range(10 * TIMES):
        rng = random.Random(seed)
        stage = rng.choice(["pretrain", "curate", "grpo", "nft", "sft", "merge", "opd", "reward"])
        flags = command(world.flags, "--stage", stage, "--out", str(tmp_path), "--name", f"n{seed}", stage=stage)
        flags += ["--steps", "1"] if stage not in ("curate", "merge") else []
        for _ in range(rng.randint(1, 2)):
            values = [i for i, word in enumerate(flags) if word[:2] != "--" and flags[i - 1][:2] == "--"]
            flags[rng.choice(values)] = str(rng.choice([x for x in ODD if x != "\x00"]))
        code, said = in_a_child(flags, tmp_path)
        assert code in (0, 2) and "Traceback" not in said, (seed, flags, code, said[-3000:])
        assert code == 0 or said.rstrip("\n").splitlines()[-1].startswith("error: "), said
