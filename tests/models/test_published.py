"""Oracles for SD3.5 and Qwen-Image: the stock pipelines in parts and as a whole, and which model a folder is."""

import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, StableDiffusion3Pipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage, pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import (
    AutoImageProcessor,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
)

import sde
from harness.card import model_card
from models import load as models
from models import lora as adapters
from models import qwen
from models.experts import STUDENT
from models.sd3 import SD35Model
from models.tiny import TinyModel, TinyQwenModel, new_tiny
from tests.helpers.checks import gap, parity, refusal
from tests.helpers.qwen_hub import PIPELINES, WIDTH, build_qwen
from tests.helpers.sd3 import CLIP_POOLED, T5_WIDTH, random_lora

EDITORS = ("edit", "plus")
PROMPTS = ["a red fox", "a much longer prompt: the user's texture, of 12 words or so", "x"]
LONG = "a crowded market square " * 60  # more than CLIP's 77 tokens, and than T5's 256 of this tokenizer
# Findings, 2: ten steps with SD3's shift 3, on the grid of a thousand training times.
TEN_STEPS = [1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.009, 0]


def load(folders, kind="", **more):
    return models.load(str(folders[kind]), **{"resolution": 64, **more})


@pytest.fixture(scope="module")
def stock(folders):
    """The published pipelines themselves; where they edit, with the token types that they forget."""
    pipes = {"sd35": StableDiffusion3Pipeline.from_pretrained(folders["sd35"])}
    pipes[""] = QwenImagePipeline.from_pretrained(folders[""])
    patch = pytest.MonkeyPatch()
    patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)  # there is no video half here
    for kind in EDITORS:
        images = AutoImageProcessor.from_pretrained(folders[kind] / "processor", backend="pil")
        both = Qwen2_5_VLProcessor(images, Qwen2Tokenizer.from_pretrained(folders[kind] / "processor"), None)
        pipes[kind] = getattr(diffusers, PIPELINES[kind]).from_pretrained(folders[kind], processor=both)
        typed(pipes[kind].text_encoder)
    patch.undo()
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


def typed(vlm):
    """Have a VLM take its image tokens for a picture, as transformers 4 had it without being told."""

    def add(module, args, kwargs):
        return args, {**kwargs, "mm_token_type_ids": (kwargs["input_ids"] == module.config.image_token_id).int()}

    return vlm.register_forward_pre_hook(add, with_kwargs=True)


def picture(height, width, seed=0):
    """(3, H, W) in [0, 1], blocks of four pixels, in steps of 1/255."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    return torch.from_numpy(blocks).permute(2, 0, 1) / 255


def pil(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def noise(model, rows, seed=7):
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------- packing and guidance
def test_tokens_are_the_stock_pipelines_patches_row_by_row_and_unpacking_undoes_it():
    x = torch.arange(16.0).reshape(1, 2, 2, 4)  # channel 0 is 0 1 2 3 / 4 5 6 7, channel 1 is 8 more
    assert qwen.pack(x, 2).tolist() == [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]
    x = torch.randn(3, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    tokens = qwen.pack(x, 2)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(x, 3, 16, 8, 12)) and tokens.shape == (3, 24, 64)
    assert torch.equal(QwenImagePipeline._unpack_latents(tokens, 64, 96, 8)[:, :, 0], x)
    for p in (1, 2, 4):
        assert torch.equal(qwen.unpack(qwen.pack(x, p), p, 8, 12), x)


def test_rescaled_guidance_has_the_direction_of_guidance_and_the_length_of_the_velocity_with_the_prompt(folders):
    model = load(folders)
    # Two tokens of 1 x 2 x 2. The first: uncond (1,0,0,0), cond (0,1,0,0), scale 3: (-2,3,0,0), length sqrt 13 -> 1.
    uncond = torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 0]]).reshape(1, 1, 2, 4)
    cond = torch.tensor([[0.0, 1, 3, 4], [0, 0, 0, 0]]).reshape(1, 1, 2, 4)
    assert model.guide(uncond, cond, 3.0)[0, 0].tolist() == [[-2, 3, 9, 8], [0, 0, 0, 0]]
    model.rescale = True
    a, b = 13**-0.5, 5 / 145**0.5
    expected = torch.tensor([[-2 * a, 3 * a, 9 * b, 8 * b], [0, 0, 0, 0]])
    torch.testing.assert_close(model.guide(uncond, cond, 3.0)[0, 0], expected)
    assert model.guide(0 * uncond, 0 * cond, 3.0).isfinite().all()


# ---------------------------------------------------------------------------------------------------------- text
@torch.no_grad()
@pytest.mark.parametrize("length", [256, 20])
def test_sd35s_text_is_encoded_as_the_stock_pipeline_encodes_it(folders, stock, length):
    prompts = [*PROMPTS, "", LONG]
    cond = load(folders, "sd35", text_length=length).encode(prompts)
    assert cond.tokens.shape == (5, 77 + length, T5_WIDTH) and cond.pooled.shape == (5, sum(CLIP_POOLED))
    for i, prompt in enumerate(prompts):
        tokens, empty, pooled, empty_pooled = stock["sd35"].encode_prompt(
            prompt, None, None, max_sequence_length=length
        )
        assert torch.equal(cond.tokens[i], tokens[0]) and torch.equal(cond.pooled[i], pooled[0])
        assert torch.equal(cond.tokens[3], empty[0]) and torch.equal(cond.pooled[3], empty_pooled[0]), "guidance's"
    assert gap(cond.pooled[0], cond.pooled[2]) > 1e-2, "prompts differ"


@torch.no_grad()
@pytest.mark.parametrize("kind", PIPELINES)
def test_a_prompt_without_a_picture_is_encoded_as_qwen_image_encodes_it(folders, stock, kind):
    """On a model that edits too: one transformer draws and edits."""
    model, prompts = load(folders, kind, text_length=200), [*PROMPTS, "", " ", "\n\n  it's", LONG]
    for prompt in prompts:
        tokens, mask = stock[""].encode_prompt([prompt], max_sequence_length=200)
        cond = model.encode([prompt])
        assert mask is None and cond.mask is None and cond.pooled is None and cond.source is None
        assert cond.tokens.shape == tokens.shape and gap(cond.tokens, tokens) < 1e-5
    together, mask = stock[""].encode_prompt(prompts, max_sequence_length=200)
    cond = model.encode(prompts)
    assert torch.equal(cond.mask, mask.bool()) and gap(cond.tokens, together) < 1e-4
    assert cond.tokens.shape == (7, 200, WIDTH) and cond.mask.sum(1).min() < 10
    assert gap(cond.tokens[0, :4], cond.tokens[2, :4]) > 1e-2, "prompts differ"


@torch.no_grad()
@pytest.mark.parametrize("kind", EDITORS)
def test_an_edit_is_encoded_as_its_own_pipeline_encodes_it(folders, stock, kind):
    model, side = load(folders, kind), qwen.EDITS[PIPELINES[kind]][1]
    images = [picture(64, 64, 0), picture(64, 64, 1), picture(96, 96, 2)]
    for prompt, image in zip([*PROMPTS[:2], " "], images, strict=True):
        shown = pil(image).resize((side, side), Image.Resampling.LANCZOS)
        expected, mask = stock[kind].encode_prompt([prompt], image=[shown])
        found = model.encode([prompt], [image])
        assert found.tokens.shape == expected.shape and gap(found.tokens, expected) < 1e-5 and mask is None
    same_text = model.encode(PROMPTS[:1] * 2, images[:2])
    assert gap(same_text.tokens[0], same_text.tokens[1]) > 1e-2, "it sees the picture"
    assert found.tokens.shape[1] != model.encode([" "]).tokens.shape[1], "and has another template without"


@torch.no_grad()
@pytest.mark.parametrize("kind", EDITORS)
def test_the_stock_pipelines_leave_out_which_tokens_are_the_picture(folders, stock, kind):
    """What the ERRATUM in qwen.py says; if this fails, diffusers has been corrected and the comment can go."""
    fresh = Qwen2_5_VLForConditionalGeneration.from_pretrained(folders[kind] / "text_encoder")
    as_it_is = type(stock[kind])(**{**stock[kind].components, "text_encoder": fresh})
    shown = pil(picture(84, 84))
    right, _ = stock[kind].encode_prompt(PROMPTS[:1], image=[shown])
    wrong, _ = as_it_is.encode_prompt(PROMPTS[:1], image=[shown])
    assert right.shape == wrong.shape and gap(right, wrong) > 1e-2
    typed(fresh)
    assert torch.equal(as_it_is.encode_prompt(PROMPTS[:1], image=[shown])[0], right)


@torch.no_grad()
def test_the_length_of_the_text_is_a_setting_that_does_not_cut_the_picture(folders):
    whole, short = load(folders, "plus"), load(folders, "plus", text_length=20)
    assert torch.equal(short.encode([LONG]).tokens, whole.encode([LONG]).tokens[:, :20])
    seen = 9  # 84 x 84 pixels, the tiny processor's largest, in 28 x 28 a token
    cut, all_of_it = short.encode([LONG], [picture(64, 64)]), whole.encode([LONG], [picture(64, 64)])
    assert cut.tokens.shape[1] == 20 + seen and torch.equal(cut.tokens, all_of_it.tokens[:, : 20 + seen])


@pytest.mark.parametrize("kind", ["sd35", "plus"])
def test_encoders_are_loaded_once_asked_once_for_a_prompt_and_a_picture_and_let_go(folders, monkeypatch, kind):
    model, asked = load(folders, kind), []
    read, encode, latents = model.read_encoders, model.encode_row, getattr(model, "latents", None)
    monkeypatch.setattr(model, "read_encoders", lambda: (asked.append("load"), read())[1])
    monkeypatch.setattr(model, "encode_row", lambda *args: (asked.append((args[1], args[2] is not None)),
                                                            encode(*args))[1])  # fmt: skip
    monkeypatch.setattr(model, "latents", lambda *args: (asked.append("source"), latents(*args))[1], raising=False)
    seeds = (None, 0, 0, 1, 0) if kind == "plus" else (None,) * 5
    # Pictures may come one by one, and need not outlive their turn: two may then have one address.
    model.prepare(iter(["a", "a", "b", "a", "a"]), (None if seed is None else picture(64, 64, seed) for seed in seeds))
    expected = ["load", ("a", False), ("b", False)]
    if kind == "plus":  # a picture is known by what it shows, not by the tensor that it is in
        expected = ["load", ("a", False), ("a", True), "source", ("b", True), ("a", True), "source"]
    assert asked == expected
    images = [None if seed is None else picture(64, 64, seed) for seed in seeds[1:4]]
    cond = model.encode(["a", "b", "a"], images)
    model.prepare(["a"])
    model.prepare([])
    assert asked == expected, "all of it was known"
    assert gap(cond.tokens[0], cond.tokens[1]) > 1e-3
    if kind == "plus":
        assert torch.equal(cond.source[0], cond.source[1]) and gap(cond.source[0], cond.source[2]) > 1e-2
    parts = [part for row in model.known.values() for part in row if part is not None]
    assert all(len(part) == 1 and not part.requires_grad and part.device.type == "cpu" for part in parts)
    model.encode(["c"])
    assert asked == [*expected, "load", ("c", False)], "an unknown prompt is encoded when it comes"


@pytest.mark.parametrize("kind", ["sd35", "plus"])
def test_a_prompts_encoding_depends_on_the_models_precision_and_on_no_other_prompt(folders, kind):
    alone, together, later = (load(folders, kind) for _ in range(3))
    one, many = alone.encode(PROMPTS[:1]), together.encode([*PROMPTS, LONG])
    later.prepare([LONG, PROMPTS[1]])
    for row in (many.rows(slice(0, 1)), later.encode([PROMPTS[0], LONG]).rows(slice(0, 1))):
        assert torch.equal(row.tokens[:, : one.tokens.shape[1]], one.tokens)
    half = load(folders, kind, precision="bfloat16").encode(PROMPTS[:1])
    assert half.tokens.dtype == torch.bfloat16
    assert 0 < gap(half.tokens.float(), one.tokens) < 0.1 * one.tokens.abs().max()


# ------------------------------------------------------------------------------------------------ pictures, latents
@torch.no_grad()
@pytest.mark.parametrize("kind", EDITORS)
def test_a_square_source_becomes_the_stock_pipelines_latents(folders, stock, kind):
    model, image = load(folders, kind), picture(64, 64)
    shown = stock[kind].image_processor.preprocess(pil(image), 64, 64).unsqueeze(2)
    expected = stock[kind]._encode_vae_image(shown, None)[:, :, 0]
    assert expected.shape == (1, *model.latent_shape) and gap(model.latents(image), expected) < 1e-5
    found = model.encode(PROMPTS[:1], [image])
    assert torch.equal(found.source, model.latents(image)) and 0.1 < found.source.std() < 10


def test_of_another_shape_the_middle_is_taken_and_of_another_size_it_is_resized(folders):
    model, small = load(folders, "plus"), load(folders, "plus", source_resolution=32)
    wide = picture(64, 96)
    assert torch.equal(model.latents(wide), model.latents(wide[:, :, 16:80]))
    assert torch.equal(model.latents(wide.transpose(1, 2)), model.latents(wide[:, :, 16:80].transpose(1, 2)))
    shrunk = torch.from_numpy(np.array(pil(wide[:, :, 16:80]).resize((32, 32), Image.Resampling.LANCZOS)))
    assert small.latents(wide).shape == (1, 16, 4, 4) and model.latents(wide).shape == (1, 16, 8, 8)
    assert torch.equal(small.latents(wide), small.latents(shrunk.permute(2, 0, 1) / 255))
    assert torch.equal(model.encode(["a"], [wide]).tokens, model.encode(["a"], [wide[:, :, 16:80]]).tokens)
    assert qwen.square(1.5 * wide - 0.2, 64).getextrema() == ((0, 255),) * 3, "clamped"


def test_the_text_encoder_sees_pictures_in_the_stock_pipelines_sizes(monkeypatch, stock):
    seen, real = [], pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions",
                        lambda area, ratio: (seen.append(area), real(area, ratio))[1])  # fmt: skip
    with pytest.raises(ValueError):
        stock["edit"](pil(picture(64, 64)), prompt=None)
    assert real(seen[0], 1.0)[:2] == (1024, 1024) == 2 * (qwen.EDITS["QwenImageEditPipeline"][1],)
    side = qwen.EDITS["QwenImageEditPlusPipeline"][1]
    assert side**2 == pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd35", ""])
def test_latents_are_decoded_as_the_stock_pipeline_decodes_them(folders, stock, kind):
    x = torch.randn(3, 16, 8, 6, generator=torch.Generator().manual_seed(0))
    vae, config = stock[kind].vae, stock[kind].vae.config
    if kind == "sd35":
        raw = vae.decode(x / 1.5305 + 0.0609, return_dict=False)[0]  # SD3's own constants
    else:
        mean, std = (torch.tensor(row)[:, None, None, None] for row in (config.latents_mean, config.latents_std))
        raw = vae.decode(x[:, :, None] * std + mean, return_dict=False)[0][:, :, 0]
    expected = stock[kind].image_processor.postprocess(raw, output_type="pt")
    model = load(folders, kind, precision="bfloat16")
    images = model.decode(x)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert images.shape == (3, 3, 64, 48) and images.dtype == torch.float32 and images.device.type == "cpu"
    assert gap(images[0], images[1]) > 0.05
    assert torch.equal(model.decode(x[1:2])[0], images[1]), "alone or in a batch, to the last bit"
    loud = model.decode(20 * x[:1].bfloat16())
    assert loud.min() >= 0 and loud.max() <= 1 and loud.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- time
@pytest.mark.parametrize("side", [64, 256, 1024])
@pytest.mark.parametrize("kind", ["sd35", ""])
def test_the_time_grid_is_the_stock_pipelines(folders, kind, side):
    model = load(folders, kind, resolution=side)
    for steps in (2, 7, 10, 40):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folders[kind] / "scheduler")
        config, tokens = scheduler.config, (side // 16) ** 2
        if kind == "sd35":
            scheduler.set_timesteps(steps)
        else:
            mu = pipeline_qwenimage.calculate_shift(
                tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
            )
            pipeline_qwenimage.retrieve_timesteps(scheduler, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        grid = model.time_grid(steps)
        assert torch.equal(grid, scheduler.sigmas) and grid.shape == (steps + 1,)
        assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
        assert kind == "sd35" or grid[-2].item() == pytest.approx(0.02, abs=1e-6), "shift_terminal"
    if kind == "sd35":
        torch.testing.assert_close(model.time_grid(10), torch.tensor(TEN_STEPS), atol=5e-4, rtol=0)
    assert model.time_grid(1).tolist() == [1, 0]
    model.time_grid(7).zero_()
    assert model.time_grid(7)[0] == 1, "a caller may change its copy"


def test_training_times_are_shifted_as_the_grid_is(folders, tmp_path):
    """Without the stretch at its end, the grid is logistic(logit(t) + train_shift) of even times."""
    copy = shutil.copytree(folders[""], tmp_path / "copy")
    edit(copy / "scheduler/scheduler_config.json", '"shift_terminal": 0.02', '"shift_terminal": null')
    model = load({"": copy}, resolution=512)
    even = torch.arange(8, 0, -1) / 8
    expected = torch.sigmoid(torch.logit(even.double()) + model.train_shift).float()
    torch.testing.assert_close(model.time_grid(8)[:-1], expected)


# ------------------------------------------------------------------------------- whole pictures, as the stock pipelines
def draw(model, x, prompts, cfg, images=None, steps=4):
    empty = [model.empty] * len(prompts)
    model.prepare([*prompts, *empty], images and [*images, *images])  # the text encoder is read once for both
    cond, uncond = model.encode(prompts, images), model.encode(empty, images)
    with torch.no_grad():
        return sde.sample(lambda x, t: model.velocity(x, t, cond, uncond, cfg), x, model.time_grid(steps))


def stock_draw(pipe, x, prompt, cfg, output="latent", **more):
    options = {"prompt": prompt, "num_inference_steps": 4, "height": 64, "width": 64, "output_type": output, **more}
    if isinstance(pipe, StableDiffusion3Pipeline):
        return pipe(latents=x.clone(), guidance_scale=cfg, **options).images
    guided = {"negative_prompt": " ", "true_cfg_scale": cfg} if cfg != 1 else {}
    found = pipe(latents=qwen.pack(x, 2), **options, **guided).images
    return qwen.unpack(found, 2, 8, 8) if output == "latent" else found


def trained(model, seed=1):
    """Put a student that differs from the base on a model; alpha is not its rank."""
    state, config = random_lora(model.transformer, rank=4, alpha=12.0, seed=seed)
    model.add_adapter(STUDENT, config, state)


def saved(model, folder):
    config = model.adapters[STUDENT]
    adapters.save_adapter(folder, model.adapter_state(), config, model.source, model.fingerprint, model.pipeline)
    return folder


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize(("kind", "cfg"), [("sd35", 4.5), ("", 1.0), ("", 4.0)])
def test_drawing_is_the_stock_pipelines_drawing(folders, stock, tmp_path, kind, cfg, adapted):
    """Text, masks, time, guidance, adapter and its files at once; prompts of unequal length in one batch."""
    model, pipe = load(folders, kind, rescale=kind == "", text_length=256), stock[kind]
    if adapted:
        trained(model)
        pipe.load_lora_weights(saved(model, tmp_path))
    x, prompts = noise(model, 2), [PROMPTS[1], LONG if kind == "sd35" else PROMPTS[0]]
    expected = stock_draw(pipe, x, prompts, cfg)
    shown = stock_draw(pipe, x, prompts, cfg, "pt")
    pipe.unload_lora_weights()
    found = draw(model, x, prompts, cfg)
    parity(f"{model.pipeline} cfg {cfg}{' with a LoRA' * adapted}", found, expected)
    torch.testing.assert_close(model.decode(found), shown, atol=1e-4, rtol=0)
    with model.adapter(None):
        assert (gap(draw(model, x, prompts, cfg), expected) > 1e-2) == adapted, "the adapter matters"
    assert gap(draw(model, x, prompts, cfg + 1), expected) > 1e-2, "guidance matters"
    model.rescale = False
    assert (gap(draw(model, x, prompts, cfg), expected) > 1e-2) == (kind == "" and cfg != 1), "so does rescaling"


@pytest.fixture
def small_sources(monkeypatch):
    """Have the stock pipelines read sources at 64 x 64 pixels, and Qwen-Image-Edit's text encoder with them."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (64, 64, None))
    monkeypatch.setitem(qwen.EDITS, "QwenImageEditPipeline", ("", 64))


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("kind", EDITORS)
def test_editing_is_the_stock_pipelines_editing(folders, stock, small_sources, tmp_path, kind, adapted):
    """Two edits in one batch here, one by one there, which is all that EditPlus can; sizes agree, so must pictures."""
    model, pipe = load(folders, kind, rescale=True), stock[kind]
    x, images = noise(model, 2), [picture(64, 64, 0), picture(64, 64, 1)]
    if adapted:
        trained(model)
        pipe.load_lora_weights(saved(model, tmp_path))
        cond = model.encode(PROMPTS[:2], images)
        with torch.no_grad():  # the student's velocity in the stock pipeline, to the last bit
            v, model.active = model.velocity(x, 0.9, cond), pipe.transformer
            assert gap(model.velocity(x, 0.9, cond), v) == 0.0
        model.active = model.transformer
    rows = [stock_draw(pipe, x[i : i + 1], PROMPTS[i], 4.0, image=pil(images[i])) for i in range(2)]
    expected = torch.cat(rows)
    pipe.unload_lora_weights()
    found = draw(model, x, PROMPTS[:2], 4.0, images)
    parity(f"{PIPELINES[kind]}{' with a LoRA' * adapted}", found, expected)
    assert gap(draw(model, x, PROMPTS[:2], 4.0, images[::-1]), expected) > 1e-2, "the source matters"
    with model.adapter(None):
        assert (gap(draw(model, x, PROMPTS[:2], 4.0, images), expected) > 1e-2) == adapted


@pytest.mark.usefixtures("small_sources")
@pytest.mark.parametrize("source", [False, True], ids=["without", "with a source"])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_a_model_that_edits_draws_as_qwen_image_does_and_zero_cond_t_works(tmp_path, stock, source, zero_cond_t):
    """Qwen-Image-Edit-2511 shows the source at time 0 to every block; its weights are those of a model without."""
    folder = build_qwen(tmp_path / "base", "plus", zero_cond_t=zero_cond_t)
    model, plain = load({"plus": folder}, "plus", rescale=True), build_qwen(tmp_path / "2509", "plus")
    parts = {**stock["plus"].components, "transformer": model.transformer}
    x, images = noise(model, 1), [picture(64, 64)] if source else None
    if source:
        expected = stock_draw(type(stock["plus"])(**parts), x, PROMPTS[0], 4.0, image=pil(images[0]))
    else:
        parts.pop("processor")
        expected = stock_draw(QwenImagePipeline(**parts), x, PROMPTS[0], 4.0)
    parity(f"zero_cond_t {zero_cond_t}", draw(model, x, PROMPTS[:1], 4.0, images), expected)
    without = draw(load({"plus": plain}, "plus", rescale=True), x, PROMPTS[:1], 4.0, images)
    assert (gap(without, expected) > 1e-2) == (source and zero_cond_t), "it matters where there is a source"


@torch.no_grad()
@pytest.mark.parametrize("edits", [False, True], ids=["t2i", "edit"])
def test_padding_changes_nothing(folders, edits):
    """A short prompt alone, and beside a long one; and whatever stands where it is padded."""
    model = load(folders, "plus")
    images = [picture(64, 64, i) for i in range(2)] if edits else [None, None]
    short, both = model.encode(PROMPTS[:1], images[:1]), model.encode(PROMPTS[:2], images)
    assert short.mask is None and both.mask[0].sum() < both.mask.shape[1]
    x = noise(model, 2)
    found = model.velocity(x, 0.6, both)
    assert gap(found[:1], model.velocity(x[:1], 0.6, short)) < 1e-5
    loud = both._replace(tokens=both.tokens + 100.0 * ~both.mask[..., None])
    assert gap(model.velocity(x, 0.6, loud), found) < 1e-5
    unmasked = both._replace(mask=None)
    assert gap(model.velocity(x, 0.6, unmasked)[:1], found[:1]) > 1e-3, "without the mask it does"


# ------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_what_trains_is_exactly_what_gets_a_gradient(tmp_path, full, zero_cond_t):
    model = load({"plus": build_qwen(tmp_path / "base", "plus", zero_cond_t=zero_cond_t)}, "plus")
    model.train_fully() if full else trained(model)
    cond = model.encode(PROMPTS[:2], [picture(64, 64, i) for i in range(2)])
    model.velocity(noise(model, 2), 0.5, cond).square().mean().backward()
    got = {name for name, p in model.transformer.named_parameters() if p.grad is not None}
    assert set(model.trainable()) == got
    unread = {name for name, p in model.transformer.named_parameters() if p.requires_grad} - got
    assert unread and all(re.match(r"transformer_blocks\.1\.(attn\.to_add_out|txt_mlp)\.", name) for name in unread)


# -------------------------------------------------------------------------------------------------------- loading
def test_the_model_in_a_folder_is_loaded_as_asked(folders, tmp_path):
    model = load(folders, "sd35", precision="bfloat16", resolution=96, gradient_checkpointing=True)
    assert isinstance(model, SD35Model) and model.source == str(folders["sd35"])
    assert (model.precision, model.latent_shape, model.text_length) == ("bfloat16", (16, 12, 12), 256)
    assert {(p.dtype, p.requires_grad) for p in model.transformer.parameters()} == {(torch.bfloat16, False)}
    assert model.transformer.is_gradient_checkpointing and re.fullmatch("[0-9a-f]{16}", model.fingerprint)
    assert not load(folders, "sd35").transformer.is_gradient_checkpointing
    for is_qwen, kind in ((False, TinyModel), (True, TinyQwenModel)):
        small = new_tiny(0, width=32, layers=1, qwen=is_qwen)
        small.save_full(tmp_path / str(is_qwen), small.transformer.state_dict())
        found = models.load(str(tmp_path / str(is_qwen)), tiny=True, rescale=is_qwen)
        assert type(found) is kind and getattr(found, "rescale", False) is is_qwen
    editor = load(folders, "plus", source_resolution=32, rescale=True)
    assert (editor.pipeline, editor.source_side, editor.rescale) == ("QwenImageEditPlusPipeline", 32, True)


def test_what_a_model_cannot_do_is_refused(folders):
    for kind in ("sd35", ""):
        refusal(load(folders, kind).encode, ["a"], [picture(64, 64)])  # they do not edit
    for kind, option in (("", {"source_resolution": 72}), ("", {"text_length": 1025}), ("sd35", {"rescale": True}),
                         ("sd35", {"tiny": True})):  # fmt: skip
        refusal(load, folders, kind, **option)


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


# ----------------------------------------------------------------------------------------------------- the card
@pytest.mark.parametrize("kind", ["", "plus"])
@pytest.mark.usefixtures("small_sources")
def test_the_code_on_the_card_draws_and_edits_with_the_adapter(folders, stock, tmp_path, monkeypatch, kind):
    model = load(folders, kind)
    trained(model)
    about = {"model": str(folders[kind]), "stage": "opd", "cfg": 4.0, "guidance": "rollout", "eval_steps": 2,
             "resolution": 64}  # fmt: skip
    card = model_card(about, {}, {}, 1, PIPELINES[kind])
    code = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)[0]
    pil(picture(64, 64)).save(tmp_path / "source.png")
    for there, here in (("path/to/this/folder", str(saved(model, tmp_path / "lora"))), ('"cuda"', '"cpu"'),
                        ("path/to/a/picture.png", str(tmp_path / "source.png")), ("bfloat16", "float32")):  # fmt: skip
        code = code.replace(there, here)
    processor = {"processor": stock[kind].processor} if kind else {}
    kind_of_pipe, read = type(stock[kind]), type(stock[kind]).from_pretrained
    monkeypatch.setattr(kind_of_pipe, "from_pretrained", lambda *args, **more: read(*args, **processor, **more))
    names = {}
    exec(code, names)
    assert names["image"].size == (64, 64)
    model.rescale, x = True, noise(model, 1)
    drawer = names["draw"] if kind else names["pipe"]
    expected = drawer("a photo of two cats", latents=qwen.pack(x, 2), negative_prompt=" ", true_cfg_scale=4.0,
                      num_inference_steps=2, height=64, width=64, output_type="latent").images  # fmt: skip
    found = draw(model, x, ["a photo of two cats"], 4.0, steps=2)
    assert gap(qwen.pack(found, 2), expected) < 1e-5 * expected.abs().max()
