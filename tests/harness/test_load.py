"""What stands on the accelerator: experts that share one backbone, and everything found before it loads."""

import json
import shutil

import pytest
import safetensors.torch
import torch

import eval as evaluation
import train
from harness import cli, identity, load, ranks
from models import hub
from models import load as models
from models.tiny import load_tiny
from tests.helpers.checks import edit_json, edit_tensors
from tests.helpers.runs import TASKS, command, the_one_line, tiny_settings


@pytest.mark.parametrize("stage, mar, anchor, expected", [
    ("opd", 0.02, "quality", "teacher:quality"),  # a teacher's task: no second copy
    ("opd", 0.02, "path", "anchor"), ("opd", 0.0, "quality", None), ("sft", 0.02, "quality", None),
])  # fmt: skip
def test_teachers_and_anchor_share_one_backbone(world, stage, mar, anchor, expected):
    teachers = {task: str(folder) for task, folder in world.teachers.items()}
    anchor = teachers["text"] if anchor == "path" else anchor
    model = load_tiny(world.base)
    experts = load.load_teachers(model, tiny_settings(stage=stage, mar=mar, anchor=anchor, teachers=teachers))
    assert experts.pop("anchor", None) == expected
    assert experts == {task: f"teacher:{task}" for task in TASKS}
    assert len(model.adapters) == 3 + (expected == "anchor")


@pytest.mark.parametrize("what", ["model", "teachers", "anchor", "init", "compare"])
def test_everything_is_found_before_anything_is_loaded(world, monkeypatch, tmp_path, what):
    good = {"model": str(world.base), "teachers": {"text": str(world.teachers["text"])}, "tasks": "text"}
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("nothing may be loaded yet"))
    missing = {"teachers": {"text": "./no"}, "compare": {"x": "./no"}}.get(what, "./no")
    load.locate_all(tiny_settings(**good, mar=0.0, anchor="./no"))  # an anchor that nobody asks for
    stage = "eval" if what == "compare" else "opd"
    with pytest.raises(hub.ModelError, match=f"^--{what}.*: ./no"):
        load.locate_all(tiny_settings(**{**good, "stage": stage, "anchor": "text", what: missing}))


# Files that do not fit: what the line says of them, and what makes one of the base's own LoRA.
UNFIT = {
    "nan": ("not finite", lambda t: next(iter(t.values())).fill_(torch.nan)),
    "another width": ("linear layer", lambda t: t.update({k: torch.ones(4, 7) for k in t if "to_q.lora_A" in k})),
    "another base's": ("another base", None), "another architecture": ("layers", None), "the other model's": ("", None),
}  # fmt: skip
FLAGS = {"teachers": "{task}=", "init": "", "anchor": "", "compare": "x="}


@pytest.mark.parametrize("what", UNFIT)
@pytest.mark.parametrize("world", ["sd35", "qwen"])
def test_an_expert_that_does_not_fit_is_found_before_the_base_is_read(
    request, world, what, tmp_path, monkeypatch, capsys
):
    other, world = (request.getfixturevalue(name) for name in ({"sd35": "qwen", "qwen": "sd35"}[world], world))
    task, copy, (said, change) = next(iter(world.teachers)), tmp_path / "copy", UNFIT[what]
    if what == "another architecture":
        shutil.copytree(world.base / "transformer", copy / "transformer")
        edit_json(copy / "transformer/config.json", num_layers=9)
    else:
        shutil.copytree(next(iter((other if what == "the other model's" else world).teachers.values())), copy)
        edit_tensors(copy / "adapter_model.safetensors", change or dict, base="0" * 16)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the base is read"))
    flag = [*FLAGS][([*UNFIT].index(what) + (other.base < world.base)) % 4]
    main, stage = (evaluation.main, "eval") if flag == "compare" else (train.main, "opd")
    words = [*world.flags, "--out", str(tmp_path), "--name", "n", "--eval-prompts", "1"]
    words += ["--mar", str(float(flag == "anchor"))]
    assert main(command(words, f"--{flag}", FLAGS[flag].format(task=task) + str(copy), stage=stage)) == 2
    line = the_one_line(capsys)
    assert line.startswith(f"error: --{flag}") and str(copy) in line and said in line


@pytest.mark.parametrize("local, expected", [(0, ["locate"] * 4 + ["wait"]), (1, ["wait"] + ["locate"] * 4)])
def test_one_rank_a_node_looks_first(world, monkeypatch, local, expected):
    """What it fetches, the others find in the cache."""
    s = tiny_settings(model=str(world.base), teachers={task: str(folder) for task, folder in world.teachers.items()})
    order, real = [], hub.locate
    monkeypatch.setattr(hub, "locate", lambda *args: order.append("locate") or real(*args))
    monkeypatch.setattr(ranks, "wait", lambda: order.append("wait"))
    monkeypatch.setattr(ranks, "local_rank", lambda: local)
    load.locate_all(s)
    assert order == expected


def test_auto_says_once_which_prompts_have_a_quote_that_is_not_closed(tmp_path, capsys):
    lines = ['a 27" screen that shows "HELLO"', 'a sign that says "OPEN', "the dog's bed", "a 「menu", 'a 6"x9" print']
    (tmp_path / "mine.txt").write_text("\n".join(lines))
    s = cli.resolve({"prompts": {"auto": str(tmp_path / "mine.txt")}})
    for _ in range(2):
        found = load.read_own_prompts(s, "train")
    routed = {task: [lines.index(p.text) for p in some] for task, some in found.items()}
    assert routed == {"text": [0], "quality": [1, 2, 3, 4]}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "2 prompts" in said and "mine.txt:2" in said


@pytest.mark.parametrize("stage", ["opd", "grpo"])
def test_more_sources_than_the_model_takes_are_refused_by_line_before_it_loads(stage, sd35, qwen, tmp_path, capsys):
    flags = ["--preset", "qwen-rl", "--stage", stage, "--tasks", "edit", "--model", str(sd35.base), "--device", "cpu"]
    flags += ["--prompts", f"edit={qwen.root / 'mixed.jsonl'}", "--out", str(tmp_path)]
    flags += ["--task", "edit", "--rewards", "jpeg=1"] if stage == "grpo" else ["--teachers", "edit=./no"]
    assert train.main(flags) == 2
    said = the_one_line(capsys)
    assert "mixed.jsonl:1: " in said and str(sd35.base) in said and "no source picture, not 2" in said


# ------------------------------------------------------------------------------------------------ known by content
def resaved(folder):
    """The same weights in a file whose header has another order, and another file beside them."""
    (folder / "README.md").write_text("a card")
    for file in folder.rglob("*.safetensors"):
        edit_tensors(file, lambda tensors: [tensors.update({key: tensors.pop(key)}) for key in reversed([*tensors])])


def nudged(file):
    edit_tensors(file, lambda tensors: [tensor.add_(1e-3) for tensor in tensors.values()])


EDITS = {  # which flag -> what changes the content behind it
    "--model": lambda d: nudged(d / "base/transformer/diffusion_pytorch_model.safetensors"),
    "--teachers text": lambda d: nudged(d / "teacher-text/adapter_model.safetensors"),
    "--init": lambda d: nudged(d / "init/adapter_model.safetensors"),
    "--anchor": lambda d: nudged(d / "anchor/adapter_model.safetensors"),
    "--prompts text": lambda d: (d / "signs.txt").open("a").write('a sign that says "TEN"\n'),
}


def of_copies(root, small):
    """Flags of an opd run whose inputs all lie in `root`."""
    teachers = [f"{task}={root / f'teacher-{task}'}" for task in TASKS]
    return [
        *small, "--stage", "opd", "--model", root / "base", "--teachers", *teachers, "--init", root / "init",
        "--anchor", root / "anchor", "--prompts", f"text={root / 'signs.txt'}",
    ]  # fmt: skip


def test_a_run_goes_on_with_the_same_content_anywhere_and_with_no_other_under_the_same_path(
    go, world, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "inputs"
    shutil.copytree(world.root, root)
    for name in ("init", "anchor"):
        shutil.copytree(world.teachers["quality"], root / name)
    (root / "signs.txt").write_text('a sign that says "CAT"\na sign that says "HAT"\n')

    def run(where, *flags, code=0):
        return go("run", *map(str, of_copies(where, [])), *flags, "--eval-prompts", "0", code=code)

    folder = run(root)
    before = json.loads((folder / "config.json").read_text())["identity"]["inputs"]
    assert before.keys() == {*EDITS, "--teachers composition", "--teachers quality"}
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    resaved(moved / "teacher-text")  # of the base an adapter knows the bytes of its file (hub.fingerprint)
    monkeypatch.chdir(tmp_path)
    for where, steps in ((moved, "2"), (moved.relative_to(tmp_path), "3")):
        run(where, "--steps", steps)
    assert json.loads((folder / "config.json").read_text())["identity"]["inputs"] == before
    for flag, edit in EDITS.items():
        shutil.rmtree(tmp_path / "edited", ignore_errors=True)
        shutil.copytree(root, tmp_path / "edited")
        edit(tmp_path / "edited")
        run(tmp_path / "edited", "--steps", "4", code=2)
        assert f"other content of {flag}" in capsys.readouterr().err
    run(root, "--steps", "4", "--prompts", f"text={root / 'signs.txt'}", f"quality={root / 'signs.txt'}", code=2)
    assert "--prompts quality" in capsys.readouterr().err, "what was not there"


def test_an_identity_of_weights_sees_names_types_shapes_bytes_and_nothing_of_the_layout(tmp_path):
    import torch

    tensors = {f"layer.{n}": torch.arange(4.0 * n).reshape(n, 4) for n in (1, 3, 5000)}

    def of(tensors, *more, about=None):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        (tmp_path / "x").mkdir()
        for number, part in enumerate((tensors, *more)):
            safetensors.torch.save_file(part, tmp_path / f"x/model-{number}.safetensors", about)
        return identity.weights(tmp_path / "x", ("model*",))

    same = of(tensors)
    assert same == of(dict(reversed(tensors.items()))) == of(*({name: value} for name, value in tensors.items()))
    others = [
        {**tensors, "layer.3": tensors["layer.3"] + 1}, {**tensors, "layer.3": tensors["layer.3"].T.contiguous()},
        {**tensors, "layer.3": tensors["layer.3"].int()}, {"a": torch.ones(1), **tensors},
        {**tensors, "layer.5000": torch.cat([tensors["layer.5000"][:-1], torch.ones(1, 4)])},
    ]  # fmt: skip
    found = [of(other) for other in others] + [of(tensors, about={"alpha": "4"})]
    assert len({same, *found}) == 7
