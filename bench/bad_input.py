"""Does whatever is given end in a result or in one line? Seeded mutations of valid input, and what survived them.

    python -m bench.bad_input                # some minutes
    python -m bench.bad_input --times 1      # what `make test` does

Flags, --config, prompt files, rewards files and adapters are read in this process. Whole runs of odd flags are forks
with a memory limit, a time-out and a folder of their own. A mutation is survived if it ends in a result or in one line.
"""

import argparse
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import train
from bench.runs import survival
from data import files
from harness import cli, identity
from harness.ranks import USER_ERRORS
from models import hub, lora, tiny
from models.experts import STUDENT
from scorers import registry
from settings import FLOW_TASKS
from tiny import drawings

SAMPLED = "--prompts-per-step 3 --group-size 2 --num-steps 3 --train-prompts 12"
TRAINED = "--steps 1 --lr 1e-3 --warmup 0 --ema-decay 0.9 --save-every 1 --keep 2"
FLAGS = {  # valid flags of a run that takes a second, by stage
    "pretrain": f"{TRAINED} --batch-size 3 --eval-prompts 0 --tasks text",
    "curate": f"{SAMPLED} --threshold 0.1 --tasks text,quality",
    "grpo": f"{TRAINED} {SAMPLED} --task text --window 0:2 --eval-prompts 0 --rank 4 --alpha 8",
    "nft": f"{TRAINED} {SAMPLED} --task quality --eval-prompts 0 --beta 0.1",
    "sft": f"{TRAINED} --batch-size 3 --sft-images 6 --eval-prompts 2 --eval-steps 2",
    "merge": "--merge-method cat --eval-prompts 2 --eval-steps 2",
    "opd": f"{TRAINED} {SAMPLED} --window 0:2 --mar 0.1 --anchor quality --eval-prompts 0 --estimator analytic",
    "reward": f"{TRAINED} --batch-size 4 --objective pairwise --holdout 0.3",
}


# ----------------------------------------------------------------------------------------------------- the mutations
DEEP = json.loads("[" * 200 + "]" * 200)
ODD = [
    None, True, -1, 0, 1, 2.5, -0.0, 1e308, 10**30, float("nan"), float("inf"), "", " ", "\x00", "a\nb", "x" * 300,
    "../..", "/", "~nobody/x", "\u202e\ud800", "nan", "inf", "1e9", "=", "text=", "0:0", ",", [], {}, [[]], DEEP,
    {"class": None}, [{"class": "cat", "count": -1}],
]  # fmt: skip
BYTES = [
    b"NaN", b"1e999", b"[" * 3000, b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"null", b'"', b"}", b"\r", b"9" * 5000, b"-",
]  # fmt: skip


def cut_up(rng: random.Random, content: bytes) -> bytes:
    """Bytes with a few of them changed, lost, doubled or put in."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice([1, 2, 8, 200]))
        content[at:end] = rng.choice([b"", content[at:end] * 2, rng.randbytes(end - at), rng.choice(BYTES)])
    return bytes(content)


def changed(rng: random.Random, value: object) -> object:
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


def _ends_well(work: Callable, *arguments) -> None:
    """Return if the work does, or raises a user's error that says something."""
    try:
        work(*arguments)
    except USER_ERRORS as fault:
        assert str(fault).strip()


# ----------------------------------------------------------------------------------------- what is read in this process
def flags(rng: random.Random, folder: Path) -> None:
    stage = rng.choice([*FLAGS])
    words = [*shlex.split(FLAGS[stage]), "--preset", "tiny", "--stage", stage, "--name", "n"]
    for _ in range(rng.randint(1, 2)):
        words[rng.randrange(len(words))] = str(rng.choice(ODD)) if rng.random() < 0.8 else rng.choice(words)
    _ends_well(cli.parse, words)


def settings(rng: random.Random, folder: Path) -> None:
    given = {"preset": "tiny", "stage": "opd", "lr": 1e-3, "steps": 3, "name": "a"}
    given["teachers"] = dict.fromkeys(FLOW_TASKS, "x")
    text = json.dumps(changed(rng, given)).encode()
    (folder / "c.json").write_bytes(cut_up(rng, text) if rng.random() < 0.5 else text)
    _ends_well(cli.parse, ["--config", str(folder / "c.json")])


ENTRY = {
    "tag": "position", "prompt": 'a photo of a cow right of a laptop and a sign that says "HAT"', "category": "x",
    "include": [
        {"class": "laptop", "count": 1, "color": "red"}, {"class": "cow", "count": 2, "position": ["right of", 0]},
    ],
    "exclude": [{"class": "cow", "count": 3}], "image": "1.png", "t2i_prompt": "a cow",
}  # fmt: skip


def prompts(rng: random.Random, folder: Path) -> None:
    task, plain = rng.choice(files.TASKS), rng.random() < 0.3
    lines = [ENTRY["prompt"] if plain else json.dumps(changed(rng, ENTRY)) for _ in range(3)]
    text = "\n".join(lines).encode()
    file = folder / ("p.txt" if plain else "p.jsonl")
    file.write_bytes(cut_up(rng, text) if rng.random() < 0.5 else text)
    _ends_well(files.read_prompts, file, task)
    _ends_well(identity.data, file)


REWARDS = {
    "scorers": {"far": {"kind": "served", "scorer": "x", "endpoints": ["http://h:1"], "timeout": 5.0, "batch": 2}},
    "weights": {"default": {"far": 0.5, "quality": 1}, "counting": {"far": 1.0}}, "watch": ["preference"],
}  # fmt: skip


def rewards(rng: random.Random, folder: Path) -> None:
    text = json.dumps(changed(rng, REWARDS)).encode()
    (folder / "r.json").write_bytes(cut_up(rng, text) if rng.random() < 0.5 else text)
    short = "geneval=0.8,jpeg=0.2,x.py:f=1"
    for asked in (str(folder / "r.json"), cut_up(rng, short.encode()).decode("utf-8", "replace")):
        _ends_well(lambda: registry.check(registry.read(asked, ("text",), drawings)))  # noqa: B023


def adapters(rng: random.Random, folder: Path) -> None:
    start, target = folder / "adapter", folder / "damaged"
    if not start.exists():
        model = tiny.new_tiny(0, width=32, layers=1)
        model.save_full(folder / "base", model.transformer.state_dict())
        model.add_adapter(STUDENT, config := lora.lora_config(4, 8.0))
        lora.save_adapter(start, model.adapter_state(), config, str(folder / "base"))
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(start, target)
    file = rng.choice([p for p in target.iterdir() if p.suffix in (".json", ".safetensors")])
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little") + 8 if file.suffix == ".safetensors" else len(content)
    if file.suffix == ".json":
        file.write_text(json.dumps(changed(rng, json.loads(content))))
    else:  # its header
        file.write_bytes(cut_up(rng, content[:length]) + content[length:])
    _ends_well(lambda: tiny.load_tiny(folder / "base").read_adapter(hub.locate(target)))
    _ends_well(identity.weights, target, hub.ADAPTER_FILES)


LAYERS = {flags: 150, settings: 150, prompts: 300, rewards: 100, adapters: 60}  # the least of each


def survived(layer: Callable[[random.Random, Path], None], count: int) -> tuple[int, int]:
    """(mutations tried, mutations survived); each of the others is printed with its seed."""
    good = 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):  # PEFT's, of odd names
        for seed in range(count):
            try:
                layer(random.Random(seed), Path(folder))
                good += 1
            except SystemExit as stop:  # --help among the flags
                good += stop.code == 0
            except BaseException:
                print(f"{layer.__name__}, seed {seed}:\n{traceback.format_exc()}", file=sys.stderr)
    return count, good


# ---------------------------------------------------------------------------------------------------------- whole runs
def in_a_child(argv: list[str], folder: Path, seconds: int = 60, memory: int = 6 << 30) -> tuple[int, str]:
    """train.main(argv) in a fork -> (exit code, negative for a signal; what it has printed as an error)."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
            signal.alarm(seconds)
            sys.stdout, sys.stderr = open(os.devnull, "w"), open(folder / "err", "w")  # noqa: SIM115
            os.chdir(folder)
            code = train.main(argv)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), (folder / "err").read_text()


def whole_runs(rng: random.Random, folder: Path) -> None:
    stage = rng.choice([*FLAGS])
    words = [*shlex.split(FLAGS[stage]), "--preset", "tiny", "--stage", stage, "--device", "cpu", "--name", "n"]
    for _ in range(rng.randint(1, 2)):
        values = [i for i, word in enumerate(words) if word[:2] != "--" and words[i - 1][:2] == "--"]
        words[rng.choice(values)] = str(rng.choice([x for x in ODD if x != "\x00"]))
    if not (folder / "assets").exists():
        (folder / "assets").symlink_to(Path(train.__file__).parent / "assets")
    words += ["--out", str(folder / f"runs-{rng.random()}")]  # nothing odd: that is where it writes
    code, said = in_a_child(words, folder)
    assert code in (0, 2) and "Traceback" not in said, (words, code, said[-3000:])
    assert code == 0 or said.rstrip("\n").splitlines()[-1].startswith("error: "), (words, said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10, help="how many times as many as `make test` tries")
    times = parser.parse_args().times
    found = ((layer, *survived(layer, count * times)) for layer, count in {**LAYERS, whole_runs: 10}.items())
    return survival((layer.__name__, tried, "mutations", good) for layer, tried, good in found)


if __name__ == "__main__":
    sys.exit(main())
