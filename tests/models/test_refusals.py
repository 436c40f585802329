"""Folders that are not whole, or would be misread: refused in one line that names the folder, nothing unpickled."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from diffusers import SD3Transformer2DModel

from models import load as models
from models import lora, qwen_vl
from models.hub import LORA_FILE, PEFT_FILES
from models.tiny import load_tiny, new_tiny
from tests.helpers import sd3
from tests.helpers.checks import edit_json, edit_tensors, refusal
from tests.helpers.qwen_hub import build_qwen21, build_vlm

RANK, ALPHA = 4, 12.0


@pytest.fixture(scope="module")
def sound(folders, tmp_path_factory):
    """{kind: a folder that is read}."""
    root = tmp_path_factory.mktemp("sound")
    small = new_tiny(0, width=32, layers=2)
    small.save_full(root / "tiny", small.transformer.state_dict())
    state, config = sd3.random_lora(
        SD3Transformer2DModel.from_pretrained(folders["sd35"] / "transformer"), RANK, ALPHA, 1
    )
    lora.save_adapter(root / "lora", state, config, pipeline="StableDiffusion3Pipeline")
    shutil.copytree(root / "lora", root / "diffusers", ignore=shutil.ignore_patterns("adapter_*"))
    more = {"tiny": root / "tiny", "lora": root / "lora", "diffusers": root / "diffusers"}
    more["qwen21"] = build_qwen21(root / "qwen21")
    return {"sd35": folders["sd35"], "plus": folders["plus"], "vlm": build_vlm(root / "vlm"), **more}


@pytest.fixture(scope="module")
def read(sound):
    """read(kind, folder): all of it, what is read late too."""
    modules = dict(SD3Transformer2DModel.from_pretrained(sound["sd35"] / "transformer").named_modules())

    def read(kind, folder):
        if kind in ("sd35", "plus", "qwen21"):
            model = models.load(str(folder), size=(64, 64))
            model.encode(["a"])
            model.decode(torch.zeros(1, *model.latent_shape))
        elif kind in ("lora", "diffusers"):
            lora.read_adapter(folder, modules, "the model")
        else:
            load_tiny(folder) if kind == "tiny" else qwen_vl.load(str(folder))

    return read


# ------------------------------------------------------------------------------------------------------- damages
def missing(kind, *parts):
    return {f"{kind}: no {part}": lambda f, part=part: shutil.rmtree(f / part) for part in parts}


def absent(kind, *files):
    return {f"{kind}: no {name}": lambda f, name=name: (f / name).unlink() for name in files}


def half(kind, *files):
    return {f"{kind}: half of {name}": lambda f, name=name: (f / name).write_bytes(
        (f / name).read_bytes()[: (f / name).stat().st_size // 2]) for name in files}  # fmt: skip


def pickled(kind, file, name):
    def change(folder):
        torch.save(safetensors.torch.load_file(folder / file), (folder / file).with_name(name))
        (folder / file).unlink()

    return {f"{kind}: pickled {file}": change}


def tensors(kind, file, **changes):
    return {f"{kind}: {file}, {what}": lambda f, change=change: edit_tensors(f / file, change)
            for what, change in changes.items()}  # fmt: skip


def entries(kind, file, **changes):
    """One fault an entry of a JSON file."""
    return {f"{kind}: {file}, {key} {value}": lambda f, entry={key: value}: edit_json(f / file, **entry)
            for key, value in changes.items()}  # fmt: skip


WEIGHTS = "diffusion_pytorch_model.safetensors"
LESS = {"a missing tensor": lambda t: t.popitem(), "another shape": lambda t: t.update({[*t][-1]: torch.ones(3)})}
MORE = {"a tensor too many": lambda t: t.update(extra=torch.ones(2))}
PIPELINES = {
    **missing("sd35", "scheduler", "tokenizer_3", "vae", "text_encoder_2", "transformer"),
    **missing("plus", "tokenizer", "processor", "text_encoder"),
    **missing("qwen21", "processor", "vae", "text_encoder", "transformer"),
    **absent("sd35", "model_index.json", "transformer/config.json", f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}"),
    **half("sd35", "model_index.json", "scheduler/scheduler_config.json", f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}",
           "transformer/config.json", "text_encoder_3/model.safetensors", "tokenizer/tokenizer.json"),
    **half("plus", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"),
    **pickled("sd35", "text_encoder/model.safetensors", "pytorch_model.bin"),
    **pickled("sd35", f"transformer/{WEIGHTS}", "diffusion_pytorch_model.bin"),
    **pickled("sd35", f"vae/{WEIGHTS}", "diffusion_pytorch_model.bin"),
    **tensors("sd35", f"transformer/{WEIGHTS}", **LESS, **MORE),
    **tensors("sd35", f"vae/{WEIGHTS}", **LESS),  # of the published parts, some may be too many
    **entries("sd35", "model_index.json", _class_name="FluxPipeline"),
    **entries("sd35", "transformer/config.json", _class_name="FluxTransformer2DModel"),
    **entries("plus", "transformer/config.json", _class_name="SD3Transformer2DModel"),
}  # fmt: skip
TINY = {
    **absent("tiny", "transformer/config.json", f"transformer/{WEIGHTS}", "text_encoder/model.safetensors"),
    **half("tiny", "transformer/config.json", f"transformer/{WEIGHTS}", "text_encoder/model.safetensors"),
    **tensors("tiny", "text_encoder/model.safetensors", width=lambda t: t.update({"word.weight": torch.ones(30, 64)})),
}
VLM = {
    **absent("vlm", "config.json", "preprocessor_config.json"),
    **half("vlm", "model.safetensors"),
    **pickled("vlm", "model.safetensors", "pytorch_model.bin"),
    **tensors("vlm", "model.safetensors", **MORE, missing=LESS["a missing tensor"]),
    **entries("vlm", "config.json", model_type="llava", image_token_id=3),
    "vlm: no tokenizer": lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
}
Q = f"{lora.PREFIX}transformer_blocks.1.attn.to_q."


def rename(tensors, old, new):
    for factor in ("lora_A.weight", "lora_B.weight"):
        tensors[(Q + factor).replace(old, new)] = tensors.pop(Q + factor)


TOLD = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}


def told(what, text, **more):
    """An adapter of diffusers whose metadata is `text`."""

    def change(folder):
        found = safetensors.torch.load_file(folder / LORA_FILE) | more
        safetensors.torch.save_file(found, folder / LORA_FILE, metadata={"lora_adapter_metadata": text})

    return {f"diffusers: {what}": change}


ADAPTERS = {
    **half("lora", *PEFT_FILES),
    **half("diffusers", LORA_FILE),
    **tensors("lora", PEFT_FILES[1], **{
        "nothing": lambda t: t.clear(),
        "no B": lambda t: t.pop(Q + "lora_B.weight"),
        "nan": lambda t: t[Q + "lora_A.weight"].__setitem__((2, 3), float("nan")),
        "dora": lambda t: t.update({Q + "lora_magnitude_vector": torch.ones(32)}),
        "alpha twice": lambda t: t.update({Q + "alpha": torch.tensor(6.0)}),
        "twice": lambda t: t.update({Q.replace(lora.PREFIX, "") + "lora_A.default.weight": torch.ones(RANK, 32)}),
        "bias": lambda t: t.update({Q + "lora_B.bias": torch.ones(32)}),
        "a saved module": lambda t: t.update({"proj_out.weight": torch.ones(64, 32)}),
        "width": lambda t: t.update({Q + "lora_A.weight": torch.ones(RANK, 31)}),
        "rank": lambda t: t.update({Q + "lora_A.weight": torch.ones(3, 32), Q + "lora_B.weight": torch.ones(32, 3)}),
        "a block too many": lambda t: rename(t, "blocks.1", "blocks.7"),
        "no linear layer": lambda t: rename(t, "attn.to_q", "norm1"),
    }),
    **entries("lora", PEFT_FILES[0], use_dora=True, lora_bias=True, bias="all", modules_to_save=["proj_out"],
              rank_pattern={"to_q": 2}, init_lora_weights="pissa", peft_type="LOKR",
              layer_replication=[[0, 1]], target_parameters=["proj_out.weight"], lora_alpha=float("nan"), r=8),
    **told("no JSON", "{"), **told("a list", "[1]"),
    **told("an unknown entry", json.dumps({**TOLD, "transformer.use_xyz": True})),
    **told("dora", json.dumps({**TOLD, "transformer.use_dora": True})),
    **told("alpha twice", json.dumps(TOLD), **{"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(6.0)}),
}  # fmt: skip
FAULTS = {**PIPELINES, **TINY, **VLM, **ADAPTERS}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_or_would_be_misread_is_refused(sound, read, tmp_path, monkeypatch, fault):
    kind = fault.partition(":")[0]
    folder = shutil.copytree(sound[kind], tmp_path / "copy")
    FAULTS[fault](folder)
    if fault in {**missing("sd35", "tokenizer_3", "vae", "text_encoder_2"), **missing("plus", "processor")}:
        monkeypatch.setattr(models, "read_transformer", lambda *_: pytest.fail("the transformer was read"))
    assert str(folder) in refusal(read, kind, folder)


def test_sound_folders_are_read_and_a_model_is_no_adapter(sound, read, tmp_path):
    for kind, folder in sound.items():
        read(kind, folder)
    told("sound", json.dumps(TOLD))["diffusers: sound"](shutil.copytree(sound["diffusers"], tmp_path / "copy"))
    read("diffusers", tmp_path / "copy")
    assert str(sound["sd35"]) in refusal(read, "lora", sound["sd35"])
