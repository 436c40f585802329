"""What the tests of whole runs share: flags of small runs, what a run leaves behind, and models of a test's own.

Nothing heavy is imported at the top: the tests of the equation files must not pay for diffusers.
"""

import json
import re

TASKS, QWEN_TASKS = ("composition", "text", "quality"), ("t2i", "edit")

# Three steps of sampling, six images a batch: a training step takes milliseconds and still runs every line.
COMMON = [
    *("--prompts-per-step", "3", "--group-size", "2", "--batch-size", "3", "--sft-images", "6", "--rank", "4"),
    *("--num-steps", "3", "--window", "0:2", "--alpha", "8", "--train-prompts", "12", "--eval-steps", "2"),
    *("--drawn-states", "0", "--device", "cpu"),
]
SMALL = ["--preset", "tiny", *COMMON, "--train-steps", "first", "--train-count", "2", "--eval-prompts", "6"]
SMALL2 = [
    *("--preset", "tiny-qwen", *COMMON, "--prompts-per-step", "4", "--train-steps", "first", "--train-count", "2"),
    *("--eval-prompts", "7"),
]  # fmt: skip
SMALL_SD35 = [
    *COMMON, *("--resolution", "64", "--precision", "float32", "--micro-batch", "3", "--eval-prompts", "1"),
    *("--ema-every", "1", "--updates", "1", "--text-length", "16", "--anchor", "quality"),
]  # fmt: skip
SMALL_QWEN = [
    "--preset", "qwen-rl", *COMMON, *("--resolution", "64", "--precision", "float32", "--micro-batch", "3"),
    *("--eval-prompts", "1", "--ema-every", "1", "--updates", "1", "--text-length", "48", "--tasks", "t2i,edit"),
    *("--num-steps", "4", "--train-count", "2", "--cfg-rescale"),
]  # fmt: skip
SMALL_QWEN21 = SMALL_QWEN[:-1]


def flags_of(root, teachers, small):
    pairs = [f"{task}={path}" for task, path in teachers.items()]
    return [*small, "--model", str(root / "base"), "--teachers", *pairs]


def command(small, *flags, stage=""):
    """A command line: what the stage of `flags` reads, under them, of the flags `small`, then `flags`."""
    from harness import cli
    from settings import FIELDS

    def items(words):  # (field, value as given), flag by flag
        for i, word in enumerate(words):
            if word.startswith("--"):
                name = word[2:].replace("-", "_")
                name, on = (name, True) if name in FIELDS else (name.removeprefix("no_"), False)
                after = [w for w in words[i + 1 : i + 2] if not w.startswith("--")]
                kind = FIELDS[name].type if name in FIELDS else str
                yield name, on if kind is bool else {"x": "x"} if kind is dict else kind(*after)

    given = {name: value for name, value in items([*small, *flags]) if name in FIELDS}
    given["stage"] = stage or given.get("stage", "opd")
    found = []
    for flag in small:
        if flag.startswith("--"):
            mine = not all(cli.why_unread(given, flag[2:].replace("-", "_").removeprefix("no_")))
        found += [flag] if mine else []
    return [*found, *flags]


def save_random_adapter(base, folder, seed, rank=4):
    """An adapter whose B factors are not zero: it draws other pictures than the base and than any other seed's."""
    import torch

    from models import lora, tiny
    from models.experts import STUDENT

    model, config = tiny.load_tiny(base), lora.lora_config(rank, 2.0 * rank)
    model.add_adapter(STUDENT, config)
    rng = torch.Generator().manual_seed(seed)
    state = {k: 0.2 * torch.randn(v.shape, generator=rng) for k, v in model.adapter_state().items()}
    lora.save_adapter(folder, state, config, model.source, model.fingerprint)


# ------------------------------------------------------------------------------------ what a run leaves behind
def metrics(folder, drop=("seconds",)):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line.get("seconds", 0) < 3600 for line in lines)
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


def stored(folder):
    """All that continuing a run needs, as its newest checkpoint has it: {name: tensor}, "step" and "updates"."""
    import safetensors.torch

    from models import hub

    last, found = hub.last_checkpoint(folder), {}
    for shard in sorted((last / "training").iterdir()):
        found |= safetensors.torch.load_file(shard)
    return found | json.loads((last / "training.json").read_text())


def same(a, b):
    """Bitwise equality of nested states."""
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def flat(tensors):
    """All numbers of some tensors, one after the other."""
    import torch

    return torch.cat([t.detach().flatten() for t in tensors])


def weights(folder, kind="weights"):
    """All trained numbers of a run's newest checkpoint; kind "average" or "old": those instead."""
    return flat([value for key, value in sorted(stored(folder).items()) if key.startswith(f"{kind}.")])


def close(a, b, tolerance=1e-5):
    import torch

    return torch.allclose(a, b, rtol=float(tolerance), atol=float(tolerance))


def with_adapter(world, folder):
    """A tiny model of the test's own that runs as one adapter (and could train it)."""
    from models import tiny
    from models.experts import STUDENT

    model = tiny.load_tiny(world.base)
    state, config = model.read_adapter(folder)
    model.add_adapter(STUDENT, config, state)
    return model


def tiny_settings(**changes):
    """Settings of the tiny world, two sampling steps."""
    from harness import cli

    return cli.resolve({"preset": "tiny", "eval_steps": 2, "eval_prompts": 5, **changes})


def write_marks(root):
    """Twelve pictures with marks (pointwise.jsonl) and eight preferences (pairwise.jsonl): bright is good -> root."""
    import numpy as np
    from PIL import Image

    for i in range(12):
        Image.fromarray(np.full((40, 60, 3), 255 * i // 11, np.uint8)).save(root / f"{i}.png")
    marks = [{"image": f"{i}.png", "prompt": f"prompt {i}", "score": 1 + 4 * i / 11} for i in range(12)]
    pairs = [{"image_w": f"{i + 4}.png", "image_l": f"{i}.png", "prompt": f"prompt {i}"} for i in range(8)]
    for name, lines in (("pointwise", marks), ("pairwise", pairs)):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def the_one_line(capsys):
    """What a user reads: a single line that begins "error:", and no stack."""
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def the_error(capsys):
    """The last line of what a user reads, which begins "error:"."""
    last = re.split(r"[\r\n]+", capsys.readouterr().err.strip())[-1]
    assert last.startswith("error: "), last
    return last
