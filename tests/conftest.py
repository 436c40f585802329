"""What the tests of whole runs share: bases small enough to train in a blink, and teachers for each.

`world` lives in the tiny world; `sd35`, `qwen` and `qwen21` are the published pipelines' own classes with random
weights, and have a teacher in each layout that users bring; the last two edit as well as draw, and have pictures to
edit. Nothing heavy is imported at the top.
"""

import json
import os
from types import SimpleNamespace

import pytest

from tests.helpers.runs import (
    QWEN_TASKS,
    SMALL,
    SMALL2,
    SMALL_QWEN,
    SMALL_QWEN21,
    SMALL_SD35,
    TASKS,
    command,
    flags_of,
    save_random_adapter,
    with_adapter,
)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread gives the same bits on every machine; torch is not here yet


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A random base (`base`), a random adapter a task (`teachers`), and the flags that choose them (`flags`)."""
    return _tiny_world(tmp_path_factory.mktemp("world"), TASKS, SMALL)


@pytest.fixture(scope="session")
def world2(tmp_path_factory):
    """As `world`, in the tiny-qwen world."""
    return _tiny_world(tmp_path_factory.mktemp("world2"), QWEN_TASKS, SMALL2)


def _tiny_world(root, tasks, small):
    import torch

    from models import tiny

    model = tiny.new_tiny(0, width=32, layers=1, qwen=tasks == QWEN_TASKS)
    with torch.no_grad():  # as it is initialised, a prompt or a source picture hardly shows in Qwen's velocity
        for name, p in model.transformer.named_parameters() if tasks == QWEN_TASKS else ():
            p.mul_(3.0 if p.ndim > 1 and "norm_out" not in name else 1.0)
    model.save_full(root / "base", model.transformer.state_dict())
    teachers = {task: root / f"teacher-{task}" for task in tasks}
    for number, folder in enumerate(teachers.values()):
        save_random_adapter(root / "base", folder, seed=number)
    return SimpleNamespace(root=root, base=root / "base", teachers=teachers, flags=flags_of(root, teachers, small))


@pytest.fixture
def model(world):
    """The base of `world` with one teacher's adapter as its student, which is what is selected."""
    return with_adapter(world, world.teachers["text"])


@pytest.fixture(scope="session")
def prompts():
    """Five test prompts of each task of the tiny world."""
    from tiny import drawings

    return {task: drawings.make_prompts(task, "test", 5) for task in TASKS}


@pytest.fixture(scope="session")
def sd35(tmp_path_factory):
    """A random SD3.5 (`base`), its `teachers` in PEFT's layout, as a LoRA file and as a full checkpoint, and `flags`.

    `lora` is a fourth one, in PEFT's layout again, for what takes adapters only.
    """
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    from tests.helpers.sd3 import build_sd35, random_lora

    root = tmp_path_factory.mktemp("sd35")
    base = build_sd35(root / "base", num_layers=2)
    teachers = {task: root / f"teacher-{task}" for task in TASKS}
    transformer = SD3Transformer2DModel.from_pretrained(base / "transformer")
    for number, folder in enumerate((teachers["composition"], root / "lora")):
        _save_lora(transformer, folder, base, number)
    state, config = random_lora(transformer, 3, 9.0, seed=2)
    StableDiffusion3Pipeline.save_lora_weights(
        teachers["text"], transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict(),
        weight_name="style_000001500.safetensors",
    )  # fmt: skip
    teachers["text"] /= "style_000001500.safetensors"
    _save_moved(transformer, teachers["quality"])
    flags = flags_of(root, teachers, SMALL_SD35)
    return SimpleNamespace(root=root, base=base, teachers=teachers, lora=root / "lora", flags=flags)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A random Qwen-Image-Edit-2509 (`base`), a LoRA and a full checkpoint as its `teachers`, and `flags`.

    `prompts` are its files: t2i.txt, and edits.jsonl, which edits the three pictures of 64 x 64 pixels beside it.
    """
    from tests.helpers.qwen_hub import build_qwen

    root = tmp_path_factory.mktemp("qwen")
    return _editor(root, build_qwen(root / "base", "plus"), SMALL_QWEN)


@pytest.fixture(scope="session")
def qwen21(tmp_path_factory):
    """As `qwen`: a random Qwen-Image-2.1."""
    from tests.helpers.qwen_hub import build_qwen21

    root = tmp_path_factory.mktemp("qwen21")
    return _editor(root, build_qwen21(root / "base"), SMALL_QWEN21)


def _editor(root, base, small):
    import torch

    from models import hub

    teachers = {task: root / f"teacher-{task}" for task in ("t2i", "edit")}
    transformer = hub.read_transformer(base, torch.float32)
    _save_lora(transformer, teachers["t2i"], base, 0)
    _save_moved(transformer, teachers["edit"])
    prompts = {"t2i": root / "t2i.txt", "edit": _edits(root)}
    prompts["t2i"].write_text("a red cat\ntwo dogs on a bench\na sign\nthe sea at night, from above\n")
    flags = [*flags_of(root, teachers, small), "--prompts", *(f"{task}={path}" for task, path in prompts.items())]
    return SimpleNamespace(root=root, base=base, teachers=teachers, prompts=prompts, flags=flags)


def _save_lora(transformer, folder, base, seed):
    from models import hub, lora
    from tests.helpers.sd3 import random_lora

    state, config = random_lora(transformer, 4, 8.0, seed=seed)
    lora.save_adapter(folder, state, config, str(base), hub.fingerprint(base / "transformer"))


def _save_moved(transformer, folder):
    """A full checkpoint: the transformer with noise on every parameter."""
    import torch

    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in transformer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    transformer.save_pretrained(folder / "transformer")


def _edits(root):
    """A prompt file of four edits of three pictures, in the format that Flow-GRPO's users have.

    Beside it mixed.jsonl: the same with one, two or three pictures each, of two shapes.
    """
    import numpy as np
    from PIL import Image

    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)  # not single pixels, which resizing would grey out
        Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(root / "images" / f"{number}.png")
    asked = (("make it blue", 0), ("add a second cat on the left", 1), ("remove the sign", 2), ("make it blue", 2))
    lines = [{"prompt": text, "image": f"images/{n}.png", "t2i_prompt": "a cat", "tag": "edit",
              "include": [{"class": "cat", "count": 1}]} for text, n in asked]  # fmt: skip
    Image.open(root / "images/0.png").crop((0, 0, 64, 32)).save(root / "images/wide.png")
    shown = (["1", "wide"], ["wide"], ["2", "0", "1"], ["0", "wide"])
    mixed = [{**line, "image": [f"images/{n}.png" for n in some]} for line, some in zip(lines, shown, strict=True)]
    for name, some in (("edits", lines), ("mixed", mixed)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
    return root / "edits.jsonl"


# ------------------------------------------------------------------------------------------------ runs
@pytest.fixture
def no_pictures(monkeypatch):
    """Curves take longer than such small runs do; test_page.py draws them."""
    from harness import page

    monkeypatch.setattr(page, "plot", lambda *_: "")


def _runs(world, *short):
    """A fixture: run(NAME, flags...), one call of train.py in a world of above, of one step -> the run's folder."""

    @pytest.fixture
    def runs(request, tmp_path, no_pictures):
        import train

        def run(name, *flags, code=0):
            small = [*request.getfixturevalue(world).flags, "--out", str(tmp_path), "--name", name, "--steps", "1"]
            assert train.main(command([*small, *short], *flags)) == code
            return tmp_path / name

        return run

    return runs


go, go2 = (_runs(world, "--eval-prompts", "0") for world in ("world", "world2"))  # unevaluated
real, real2, real21 = map(_runs, ("sd35", "qwen", "qwen21"))


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
def forwards(monkeypatch):
    """Every forward of a transformer from now on: whose it is, of which rows, with a gradient?

    `who`: the expert that is selected (None: the base); `empty` (B,), where texts have masks: rows of the empty prompt;
    `out`: the velocities, which keep their gradients.
    """
    import torch

    from models import flow

    found, select, run = [], flow.FlowModel._use, flow.FlowModel._forward

    def _use(model, name):
        model.using = name
        select(model, name)

    def _forward(model, x, t, cond):
        out = run(model, x, t, cond)
        if out.requires_grad:
            out.retain_grad()
        who, empty = getattr(model, "using", None), None if cond.mask is None else ~cond.mask.any(1)
        found.append(SimpleNamespace(who=who, grad=torch.is_grad_enabled(), x=x, t=t, cond=cond, empty=empty, out=out))
        return out

    monkeypatch.setattr(flow.FlowModel, "_use", _use)
    monkeypatch.setattr(flow.FlowModel, "_forward", _forward)
    return found


@pytest.fixture
def updates(monkeypatch):
    """What every optimizer update found: the weights before it, and their gradients."""
    from harness.run import Run

    found, real = [], Run.update

    def update(run):
        weights = [p.detach().clone() for p in run.weights.parameters.values()]
        grads = [p.grad.clone() for p in run.weights.parameters.values()]
        found.append(SimpleNamespace(weights=weights, grads=grads))
        return real(run)

    monkeypatch.setattr(Run, "update", update)
    return found


@pytest.fixture
def stock(sd35):
    """The stock pipeline of `sd35`'s base, as a user loads it."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(sd35.base)
    pipe.set_progress_bar_config(disable=True)
    return pipe
