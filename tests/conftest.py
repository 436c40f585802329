"""What the tests of whole runs share: two bases small enough to train in a blink, and three teachers for each.

`world` lives in the tiny world; `sd35` is the published pipeline's own classes with random weights, and has a teacher
in each layout that users bring. Nothing heavy is imported at the top: the tests of the equation files must not pay
for diffusers.
"""

import json
from types import SimpleNamespace

import pytest

TASKS = ("composition", "text", "quality")

# Three steps of sampling, six images a batch: a training step takes milliseconds and still runs every line.
COMMON = [
    *("--prompts-per-step", "3", "--group-size", "2", "--batch-size", "3", "--sft-images", "6", "--rank", "4"),
    *("--num-steps", "3", "--window", "0:2", "--alpha", "8", "--train-prompts", "12", "--eval-steps", "2"),
    *("--threads", "1", "--device", "cpu"),
]
SMALL = ["--preset", "tiny", *COMMON, "--train-steps", "first", "--train-count", "2", "--eval-prompts", "6"]
SMALL_SD35 = [
    *COMMON, *("--resolution", "64", "--precision", "float32", "--micro-batch", "3", "--eval-prompts", "1"),
    *("--ema-every", "1", "--updates", "1", "--text-length", "16"),
]  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A random base (`base`), a random adapter a task (`teachers`), and the flags that choose them (`flags`)."""
    import torch

    import models

    root = tmp_path_factory.mktemp("world")
    model = models.new_tiny(0, width=32, layers=1)
    model.save_full(root / "base", model.transformer.state_dict())
    teachers = {task: root / f"teacher-{task}" for task in TASKS}
    for number, folder in enumerate(teachers.values()):
        save_random_adapter(root / "base", folder, seed=number)
    torch.set_num_threads(1)
    return SimpleNamespace(root=root, base=root / "base", teachers=teachers, flags=_flags(root, teachers, SMALL))


@pytest.fixture(scope="session")
def sd35(tmp_path_factory):
    """A random SD3.5 (`base`), its `teachers` in PEFT's layout, in diffusers' and as a full checkpoint, and `flags`.

    `lora` is a fourth one, in PEFT's layout again, for what takes adapters only.
    """
    import torch
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from sd3 import build_sd35, random_lora

    import adapters
    import flow

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("sd35")
    base = build_sd35(root / "base", num_layers=2)
    teachers = {task: root / f"teacher-{task}" for task in TASKS}
    transformer = SD3Transformer2DModel.from_pretrained(base / "transformer")
    for number, folder in enumerate((teachers["composition"], root / "lora")):
        state, config = random_lora(transformer, 4, 8.0, seed=number)
        adapters.save_adapter(folder, state, config, str(base), flow.fingerprint(base / "transformer"))
    state, config = random_lora(transformer, 3, 9.0, seed=2)
    StableDiffusion3Pipeline.save_lora_weights(
        teachers["text"], transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict()
    )
    with torch.no_grad():
        rng = torch.Generator().manual_seed(3)
        for p in transformer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    transformer.save_pretrained(teachers["quality"] / "transformer")
    flags = _flags(root, teachers, SMALL_SD35)
    return SimpleNamespace(root=root, base=base, teachers=teachers, lora=root / "lora", flags=flags)


def _flags(root, teachers, small):
    pairs = [f"{task}={path}" for task, path in teachers.items()]
    return [*small, "--model", str(root / "base"), "--teachers", *pairs]


def save_random_adapter(base, folder, seed, rank=4):
    """An adapter whose B factors are not zero: it draws other pictures than the base and than any other seed's."""
    import torch

    import adapters
    import flow
    import models

    model, config = models.load_tiny(base), adapters.lora_config(rank, 2.0 * rank)
    model.add_adapter(flow.STUDENT, config)
    rng = torch.Generator().manual_seed(seed)
    state = {k: 0.2 * torch.randn(v.shape, generator=rng) for k, v in model.adapter_state().items()}
    adapters.save_adapter(folder, state, config, model.source, model.fingerprint)


# ------------------------------------------------------------------------------------------------ runs
@pytest.fixture
def no_pictures(monkeypatch):
    """Grids and curves take longer than such small runs do; test_train.py draws them."""
    import report

    monkeypatch.setattr(report, "plot_metrics", lambda folder: [])
    monkeypatch.setattr(report, "save_samples", lambda *args: None)


@pytest.fixture
def go(world, tmp_path, no_pictures):
    """go(NAME, flags...): one call of train.py on the small world, one step, unevaluated -> the run's folder."""
    import train

    def go(name, *flags, code=0):
        short = ["--out", str(tmp_path), "--name", name, "--steps", "1", "--eval-prompts", "0"]
        assert train.main([*world.flags, *short, *flags]) == code
        return tmp_path / name

    return go


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name): the calls of a function from now on, each with `args` and `result`."""

    def spy(owner, name):
        calls, real = [], getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = real(*args, **kwargs)
            calls.append(SimpleNamespace(args=args, kwargs=kwargs, result=result))
            return result

        monkeypatch.setattr(owner, name, wrapped)
        return calls

    return spy


@pytest.fixture
def updates(monkeypatch):
    """What every optimizer update found: the weights before it, and their gradients."""
    from runtime import Run

    found, real = [], Run.update

    def update(run):
        weights = [p.detach().clone() for p in run.parameters.values()]
        grads = [p.grad.clone() for p in run.parameters.values()]
        found.append(SimpleNamespace(weights=weights, grads=grads))
        return real(run)

    monkeypatch.setattr(Run, "update", update)
    return found


@pytest.fixture
def real(sd35, tmp_path, no_pictures):
    """real(NAME, flags...): one call of train.py on a small SD3.5, a teacher of each kind -> the run's folder."""
    import train

    def real(name, *flags, code=0):
        assert train.main([*sd35.flags, "--out", str(tmp_path), "--name", name, "--steps", "1", *flags]) == code
        return tmp_path / name

    return real


# ------------------------------------------------------------------------------------ what a run leaves behind
def metrics(folder, drop=("seconds",)):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


def stored(folder):
    """All that continuing a run needs, as its newest checkpoint has it: {name: tensor}, "step" and "updates"."""
    import safetensors.torch

    import adapters

    last, found = adapters.last_checkpoint(folder), {}
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
