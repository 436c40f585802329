"""Oracles for the model card: the Hub's own parser reads it, any strings leave it valid, its code runs."""

import json
import re
import shutil

import huggingface_hub
import pytest
import torch
from diffusers import SD3Transformer2DModel

from harness.card import model_card
from models import lora
from tests.helpers import sd3

PIPELINE = "StableDiffusion3Pipeline"

SETTINGS = {
    "model": "stabilityai/stable-diffusion-3.5-medium@v1", "name": "my-run", "stage": "opd", "estimator": "analytic",
    "teachers": {"text": "CostaliyA/SD3.5M-FlowGRPO-OCR-3240", "quality": "runs/q"}, "lr": 1e-4, "steps": 300,
    "cfg": 4.5, "eval_steps": 2, "init": "", "guard": False, "beta": 0.0,
}  # fmt: skip


def blocks(card, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def test_the_card_has_front_matter_settings_scores_and_metrics():
    card = huggingface_hub.ModelCard(model_card(SETTINGS, {"gap": 0.125}, {"text": 0.75}, 300, PIPELINE))
    data = card.data.to_dict()
    assert data["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"lora", "text-to-image", "flow-matching"} <= set(data["tags"])
    found = json.loads(blocks(card.text, "json")[0])
    filled = {key: value for key, value in SETTINGS.items() if key != "init"}
    assert found == {"step": 300, "scores": {"text": 0.75}, "last training metrics": {"gap": 0.125}, "settings": filled}


def test_the_card_guides_as_the_run_guided_its_students_pictures():
    """Distilled from guided teachers (Q 4.3), a student has the guidance in its weights."""
    for guidance, scale in (("both", 4.5), ("rollout", 4.5), ("teacher", 1.0), ("neither", 1.0)):
        card = model_card(SETTINGS | {"guidance": guidance}, {}, {}, 1, PIPELINE)
        assert f'pipe("a photo of two cats", num_inference_steps=2, guidance_scale={scale}).images[0]' in card


@pytest.mark.parametrize("model", ["/data/sd35", "./sd35", "runs", "a b", 'o"w/n\nx: 1', ""])
def test_a_base_that_is_no_hub_id_stays_out_of_the_front_matter(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = huggingface_hub.ModelCard(model_card(SETTINGS | {"model": model}, {}, {}, 1, PIPELINE))
    assert "base_model" not in card.data.to_dict() and "x" not in card.data.to_dict()


def test_nasty_strings_leave_the_card_valid():
    nasty = ["a\nb", "---\nlicense: mit", '"quoted"', "```python\nx", "```\n```", "<script>", "[l](u)", "\u2028é\x00"]
    strings = [a + b for a in nasty for b in nasty]
    settings = {text: text for text in strings} | {key: "".join(nasty) for key in ("model", "name", "estimator")}
    settings |= {"stage": "opd", "teachers": {text: text for text in nasty}, "cfg": "1\n```", "eval_steps": "2\n```"}
    text = model_card(settings, dict.fromkeys(strings, float("nan")), {"s": "\n|"}, 1, PIPELINE)
    card = huggingface_hub.ModelCard(text)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    (code,), (record,) = blocks(text, "python"), blocks(text, "json")
    prose = text.replace(code, "").replace(record, "")
    assert text.count("\n---\n") == 1 and len([x for x in text.splitlines() if x.startswith("```")]) == 4
    assert "<script" not in prose and "[l]" not in prose and json.loads(record)["settings"] == settings
    compile(code, "card", "exec")


@torch.no_grad()
@pytest.mark.parametrize("pipeline", [PIPELINE, ""])
@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
def test_the_code_on_the_card_loads_what_lies_beside_it(tmp_path, sd35, pipeline, whole):
    base = sd35.base
    module = SD3Transformer2DModel.from_pretrained(base / "transformer")
    state, config = sd3.random_lora(module, 4, 12.0, seed=1)
    lora.save_adapter(tmp_path / "made", state, config, str(base), pipeline=PIPELINE)
    lora.add(module, "a", config, state)
    if whole:
        shutil.copytree(sd35.teachers["quality"] / "transformer", tmp_path / "made" / "transformer")
        module = SD3Transformer2DModel.from_pretrained(sd35.teachers["quality"] / "transformer")
    settings = SETTINGS | {"model": str(base), "parameters": "full" if whole else "lora"}
    (block,) = blocks(model_card(settings, {}, {}, 1, pipeline), "python")
    for there, here in (("path/to/this/folder", str(tmp_path / "made")), ('"cuda"', '"cpu"'), ("bfloat16", "float32")):
        block = block.replace(there, here)
    names = {}
    exec(block, names)
    found = names["pipe"].transformer if pipeline else names["transformer"]
    rng = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(3, 16, 8, 8, generator=rng),
        "encoder_hidden_states": torch.randn(3, 5, sd3.T5_WIDTH, generator=rng),
        "pooled_projections": torch.randn(3, sum(sd3.CLIP_POOLED), generator=rng),
        "timestep": torch.tensor([900.0, 500.0, 100.0]),
    }
    assert torch.equal(found(**inputs).sample, module(**inputs).sample)
    assert not pipeline or names["image"].size == (64, 64)
