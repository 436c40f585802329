"""Oracles for SD3.5: the stock pipeline, in parts and as a whole; and for which model a folder is."""

import re
import shutil

import pytest
import safetensors.torch
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

import sde
from models import load as models
from models import lora as adapters
from models import sd3 as ours
from models.experts import STUDENT
from models.tiny import TinyModel, TinyQwenModel, new_tiny
from tests.helpers import sd3
from tests.helpers.checks import gap, parity, refusal
from tests.helpers.qwen_hub import build_qwen

PROMPTS = ["a photo of a red circle", 'a sign that says "CAT"', "a photo of two crosses"]
# Findings, 2: ten steps with shift 3, on the grid of a thousand training times.
TEN_STEPS = [1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.009, 0]


@torch.no_grad()
def velocity(model):
    """v of three fixed samples and prompts."""
    x = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return model.velocity(x, torch.tensor([0.9, 0.5, 0.1]), model.encode(PROMPTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sd3.build_sd35(tmp_path_factory.mktemp("sd35"))


def load(folder, **more):
    return ours.load_sd35(folder, **{"resolution": 64, **more})


@pytest.fixture(scope="module")
def stock(folder):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the text encoders: "load", then the prompts."""
    seen, read = [], ours._read_text_encoders

    def watched(*arguments):
        pipe = read(*arguments)
        seen.append("load")
        plain = pipe.encode_prompt
        pipe.encode_prompt = lambda prompt, *rest, **more: (seen.append(prompt), plain(prompt, *rest, **more))[1]
        return pipe

    monkeypatch.setattr(ours, "_read_text_encoders", watched)
    return seen


LONG = "a crowded market square " * 30  # more than CLIP's 77 tokens, and than T5's 256 of this tokenizer


@torch.no_grad()
def test_text_is_encoded_as_the_stock_pipeline_encodes_it(folder, stock):
    prompts = [*PROMPTS, "", LONG]
    cond = load(folder).encode(prompts)
    assert cond.tokens.shape == (5, 77 + 256, sd3.T5_WIDTH) and cond.pooled.shape == (5, sum(sd3.CLIP_POOLED))
    for i, prompt in enumerate(prompts):
        tokens, _, pooled, _ = stock.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        assert torch.equal(cond.tokens[i], tokens[0]) and torch.equal(cond.pooled[i], pooled[0])
    together, _, pooled, _ = stock.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(cond.tokens, together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cond.pooled, pooled, atol=1e-4, rtol=1e-4)
    assert gap(cond.pooled[0], cond.pooled[2]) > 1e-2, "prompts differ"


def test_a_picture_for_a_model_that_draws_only_is_refused(folder):
    refusal(load(folder).encode, PROMPTS[:1], [torch.rand(3, 24, 24)])


def test_the_empty_prompt_is_the_stock_pipelines_unconditional_branch(folder, stock):
    _, tokens, _, pooled = stock.encode_prompt(PROMPTS[:2], None, None, do_classifier_free_guidance=True)
    cond = load(folder).encode(["", ""])
    torch.testing.assert_close(cond.tokens, tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cond.pooled, pooled, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_length_of_t5s_text_is_a_setting(folder, stock):
    cond = load(folder, text_length=20).encode([LONG])
    tokens, _, pooled, _ = stock.encode_prompt(LONG, None, None, max_sequence_length=20)
    assert cond.tokens.shape == (1, 77 + 20, sd3.T5_WIDTH) and torch.equal(cond.tokens, tokens)


def test_a_prompts_encoding_does_not_depend_on_what_else_is_encoded(folder):
    alone, together, later = load(folder), load(folder), load(folder)
    one, many = alone.encode(PROMPTS[1:2]), together.encode([*PROMPTS, LONG])
    later.prepare([LONG, PROMPTS[0]])
    for row in (many.rows(slice(1, 2)), later.encode([PROMPTS[1], LONG]).rows(slice(0, 1))):
        assert torch.equal(row.tokens, one.tokens) and torch.equal(row.pooled, one.pooled)


def test_encoders_are_loaded_once_asked_once_a_prompt_and_let_go(folder, calls):
    model = load(folder)
    assert calls == [], "nothing is loaded before it is needed"
    model.prepare(iter(["a", "b", "a", "", "b"]))
    assert calls == ["load", "a", "b", ""]
    cond = model.encode(["b", "", "b", "a"])
    model.prepare(["", "b"])
    assert calls == ["load", "a", "b", ""], "all of it was known"
    assert torch.equal(cond.tokens[0], cond.tokens[2]) and gap(cond.tokens[0], cond.tokens[3]) > 1e-3
    assert all(row.tokens.shape[0] == row.pooled.shape[0] == 1 for row in model.known.values())
    assert not any(row.tokens.requires_grad or row.pooled.requires_grad for row in model.known.values())
    assert not [key for key, value in vars(model).items() if isinstance(value, StableDiffusion3Pipeline)]
    model.encode(["c", "a"])
    assert calls == ["load", "a", "b", "", "load", "c"], "an unknown prompt is encoded when it comes"
    model.prepare([])
    assert len(calls) == 6
    model.prepare(iter(["a", "b"]), (None for _ in "ab"))
    assert len(calls) == 6


def test_text_is_encoded_in_the_models_precision(folder):
    model = load(folder, precision="bfloat16")
    cond = model.encode(PROMPTS)
    assert cond.tokens.dtype == cond.pooled.dtype == torch.bfloat16
    exact = load(folder).encode(PROMPTS)
    assert 0 < gap(cond.tokens.float(), exact.tokens) < 0.1 * exact.tokens.abs().max()


@torch.no_grad()
def test_latents_are_decoded_as_the_stock_pipeline_decodes_them(folder, stock):
    x = torch.randn(3, 16, 8, 6, generator=torch.Generator().manual_seed(0))
    raw = stock.vae.decode(x / 1.5305 + 0.0609, return_dict=False)[0]  # SD3's own constants
    expected = stock.image_processor.postprocess(raw, output_type="pt")
    model = load(folder, precision="bfloat16")
    images = model.decode(x)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert images.shape == (3, 3, 64, 48) and images.dtype == torch.float32 and images.device.type == "cpu"
    assert images.min() >= 0 and images.max() <= 1 and gap(images[0], images[1]) > 0.05
    assert torch.equal(model.decode(x[1:2])[0], images[1]), "alone or in a batch, to the last bit"
    model._vae.decoder.conv_out.weight.data *= 20  # louder pictures; the VAE is read once, so that they stay loud
    loud = model.decode(x[:1].bfloat16())
    assert loud.min() == 0 and loud.max() == 1, "clamped"


def test_the_time_grid_is_the_stock_schedulers(folder):
    model = load(folder)
    found = model.time_grid(10)
    torch.testing.assert_close(found, torch.tensor(TEN_STEPS), atol=5e-4, rtol=0)
    for steps in (1, 2, 7, 10, 40):
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
        scheduler.set_timesteps(steps)
        grid = model.time_grid(steps)
        assert torch.equal(grid, scheduler.sigmas) and grid.shape == (steps + 1,)
        assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    model.time_grid(10).zero_()
    assert torch.equal(model.time_grid(10), found), "a caller may change its copy"


def draw(model, x, prompts, steps, cfg):
    cond, uncond = model.encode(prompts), model.encode([""] * len(prompts))
    with torch.no_grad():
        return sde.sample(lambda x, t: model.velocity(x, t, cond, uncond, cfg), x, model.time_grid(steps))


@pytest.mark.parametrize("trained", [False, True], ids=["base", "adapter"])
def test_drawing_with_guidance_is_the_stock_pipelines_drawing(folder, tmp_path, trained):
    """The whole path at once: text, time, guidance, adapter and its files; one prompt is longer than CLIP reads."""
    model = load(folder)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if trained:
        state, config = sd3.random_lora(model.transformer, rank=4, alpha=12.0, seed=1)
        model.add_adapter(STUDENT, config, state)
        saved = (model.adapter_state(), config, model.source, model.fingerprint, model.pipeline)
        adapters.save_adapter(tmp_path, *saved)
        pipe.load_lora_weights(tmp_path)
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(7))
    prompts = [PROMPTS[1], LONG]
    options = {"num_inference_steps": 5, "guidance_scale": 4.5, "output_type": "latent", "height": 64, "width": 64}
    expected = pipe(prompts, latents=x.clone(), **options).images
    found = draw(model, x, prompts, 5, 4.5)
    parity(f"SD3.5 {'with a LoRA' if trained else 'base'}", found, expected)
    assert gap(draw(model, x, prompts, 5, 4.4), expected) > 1e-2, "guidance matters"
    with model.adapter(None):
        assert (gap(draw(model, x, prompts, 5, 4.5), expected) > 1e-2) == trained, "so does the adapter"
    shown = pipe(prompts, latents=x.clone(), **{**options, "output_type": "pt"}).images
    torch.testing.assert_close(model.decode(found), shown, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------ loading
def test_the_model_in_a_folder_is_loaded_as_asked(folder, tmp_path):
    model = models.load(str(folder), precision="bfloat16", resolution=96, gradient_checkpointing=True)
    assert isinstance(model, ours.SD35Model) and model.source == str(folder)
    assert (model.precision, model.latent_shape, model.text_length) == ("bfloat16", (16, 12, 12), 256)
    assert {p.dtype for p in model.transformer.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.transformer.parameters())
    assert model.transformer.is_gradient_checkpointing
    assert re.fullmatch("[0-9a-f]{16}", model.fingerprint) and model.fingerprint == load(folder).fingerprint
    plain = models.load(str(folder), resolution=64, text_length=16)
    assert plain.text_length == 16 and not plain.transformer.is_gradient_checkpointing
    for qwen, kind in ((False, TinyModel), (True, TinyQwenModel)):
        small = new_tiny(0, width=32, layers=1, qwen=qwen)
        small.save_full(tmp_path / str(qwen), small.transformer.state_dict())
        found = models.load(str(tmp_path / str(qwen)), tiny=True, rescale=qwen)
        assert type(found) is kind and getattr(found, "rescale", False) is qwen
    editor = models.load(str(build_qwen(tmp_path / "qwen", "plus")), resolution=64, source_resolution=32, rescale=True)
    assert (editor.pipeline, editor.source_side, editor.rescale) == ("QwenImageEditPlusPipeline", 32, True)
    assert str(folder) in refusal(models.load, str(folder), rescale=True), "it is Qwen-Image's guidance"
    assert str(folder) in refusal(models.load, str(folder), tiny=True), "and a pipeline is no base of a tiny world"
    refusal(load, folder, resolution=208)  # 12 patches of 2 latents of 8 pixels are the most
    assert load(folder, resolution=192).latent_shape == (16, 24, 24)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(file):
    torch.save(safetensors.torch.load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


EARLY = {
    **{f"no {part}": lambda f, part=part: shutil.rmtree(f / part)
       for part in ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3", "vae", "transformer")},
    "no index": lambda f: (f / "model_index.json").unlink(), "half an index": lambda f: cut(f / "model_index.json"),
    "a list": lambda f: (f / "model_index.json").write_text("[]"),
    "another pipeline": lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
    "a broken scheduler": lambda f: cut(f / "scheduler/scheduler_config.json"),
}  # fmt: skip
LATE = {
    "half a VAE": lambda f: cut(f / "vae/diffusion_pytorch_model.safetensors"),
    "no text encoder": lambda f: shutil.rmtree(f / "text_encoder_2"),
    "half a text encoder": lambda f: cut(f / "text_encoder_3/model.safetensors"),
    "a pickled text encoder": lambda f: pickled(f / "text_encoder/model.safetensors"),
    "half a tokenizer": lambda f: cut(f / "tokenizer/tokenizer.json"),
}


@pytest.mark.parametrize("fault", [*EARLY, *LATE])
def test_a_base_that_is_not_whole_is_refused_in_one_line(folder, tmp_path, fault):
    """What is missing before anything is read; what is broken in a part when the part is needed."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    {**EARLY, **LATE}[fault](copy)
    if fault in EARLY:
        assert str(copy) in refusal(models.load, str(copy))
        return
    model = load(copy)
    call, given = (model.decode, torch.zeros(1, 16, 8, 8)) if "VAE" in fault else (model.encode, PROMPTS)
    assert str(copy) in refusal(call, given) and model.known == {}
