"""Oracles for Qwen-Image: packing and guidance by hand, the published pipelines in parts and as a whole."""

import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
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
from models import lora as adapters
from models import qwen, qwen_vl
from models.experts import STUDENT
from tests.helpers.checks import gap, parity, refusal
from tests.helpers.qwen_hub import PIPELINES, WIDTH, build_qwen
from tests.helpers.sd3 import random_lora

KINDS = tuple(PIPELINES)  # "" draws, "edit" and "plus" edit
EDITORS = ("edit", "plus")
PROMPTS = ["a red fox", "a much longer prompt: the user's texture, of 12 words or so", "x"]
LONG = "a crowded market square " * 60


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen-hub")
    return {kind: build_qwen(root / PIPELINES[kind], kind) for kind in KINDS}


def load(folders, kind="", **more):
    return qwen.load_qwen(folders[kind], PIPELINES[kind], **{"resolution": 64, **more})


@pytest.fixture(scope="module")
def stock(folders):
    """The published pipelines themselves; where they edit, with the token types that they forget."""
    pipes = {"": QwenImagePipeline.from_pretrained(folders[""])}
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


# ------------------------------------------------------------------------------------------------------- packing
def test_tokens_are_patches_row_by_row_and_channels_come_before_the_place_in_a_patch():
    x = torch.arange(16.0).reshape(1, 2, 2, 4)  # channel 0 is 0 1 2 3 / 4 5 6 7, channel 1 is 8 more
    expected = [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]
    assert qwen.pack(x, 2).tolist() == expected
    tall = x.reshape(1, 2, 4, 2)
    assert qwen.pack(tall, 2)[0, 1].tolist() == [4, 5, 6, 7, 12, 13, 14, 15], "the second row of patches"


def test_packing_is_the_stock_pipelines_and_unpacking_undoes_it():
    x = torch.randn(3, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    tokens = qwen.pack(x, 2)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(x, 3, 16, 8, 12)) and tokens.shape == (3, 24, 64)
    assert torch.equal(QwenImagePipeline._unpack_latents(tokens, 64, 96, 8)[:, :, 0], x)
    assert torch.equal(qwen.unpack(tokens, 2, 8, 12), x)
    odd = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(1))
    for p in (1, 2, 4):
        assert torch.equal(qwen.unpack(qwen.pack(odd, p), p, 8, 4), odd)
        assert qwen.pack(odd, p).shape == (2, 32 // p**2, 3 * p**2)


# ------------------------------------------------------------------------------------------------------ guidance
def test_rescaled_guidance_has_the_direction_of_guidance_and_the_length_of_the_velocity_with_the_prompt(folders):
    model = load(folders)
    # Two tokens of 1 x 2 x 2. The first: uncond (1,0,0,0), cond (0,1,0,0), scale 3: (-2,3,0,0), length sqrt 13 -> 1.
    uncond = torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 0]]).reshape(1, 1, 2, 4)
    cond = torch.tensor([[0.0, 1, 3, 4], [0, 0, 0, 0]]).reshape(1, 1, 2, 4)
    plain = [[-2, 3, 9, 8], [0, 0, 0, 0]]
    assert model.guide(uncond, cond, 3.0)[0, 0].tolist() == plain
    model.rescale = True
    found = model.guide(uncond, cond, 3.0)[0, 0]
    a, b = 13**-0.5, 5 / 145**0.5
    torch.testing.assert_close(found, torch.tensor([[-2 * a, 3 * a, 9 * b, 8 * b], [0, 0, 0, 0]]))
    assert model.guide(0 * uncond, 0 * cond, 3.0).isfinite().all()


# ---------------------------------------------------------------------------------------------------------- text
@pytest.mark.parametrize(("kind", "count"), [("", 34), ("edit", 64), ("plus", 64)])
def test_what_is_dropped_of_the_text_is_the_template(folders, kind, count):
    """The test pipelines' tokenizer has the templates' words: as many tokens as the real one makes of them."""
    template, drop = qwen._template(PIPELINES[kind])
    read = Qwen2Tokenizer.from_pretrained(folders[kind] / "tokenizer")
    before = re.split(re.escape("{}") + "|" + re.escape("<|vision_start|>"), template)[0]
    assert len(read(before).input_ids) == drop == count


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
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
    whole = {kind: load(folders, kind) for kind in ("", "plus")}
    short = {kind: load(folders, kind, text_length=20) for kind in ("", "plus")}
    assert torch.equal(short[""].encode([LONG]).tokens, whole[""].encode([LONG]).tokens[:, :20])
    seen = 9  # 84 x 84 pixels, the tiny processor's largest, in 28 x 28 a token
    cut, all_of_it = short["plus"].encode([LONG], [picture(64, 64)]), whole["plus"].encode([LONG], [picture(64, 64)])
    assert cut.tokens.shape[1] == 20 + seen and torch.equal(cut.tokens, all_of_it.tokens[:, : 20 + seen])


@pytest.fixture
def asked(monkeypatch):
    """What is asked of the text encoders, "load", then (prompt, has a picture), and of the VAE, "source"."""
    seen, read, tokens, latents = [], qwen_vl.read, qwen.text_tokens, qwen.QwenModel.latents
    monkeypatch.setattr(qwen_vl, "read", lambda *args: (seen.append("load"), read(*args))[1])
    monkeypatch.setattr(
        qwen, "text_tokens", lambda *args: (seen.append((args[2], args[3] is not None)), tokens(*args))[1]
    )
    monkeypatch.setattr(qwen.QwenModel, "latents", lambda *args: (seen.append("source"), latents(*args))[1])
    return seen


def test_encoders_are_loaded_once_asked_once_for_a_prompt_and_a_picture_and_let_go(folders, asked):
    model, one, other = load(folders, "plus"), picture(64, 64, 0), picture(64, 64, 1)
    assert asked == [], "nothing is loaded before it is needed"
    # Pictures may come one by one, and need not outlive their turn: two may then have one address.
    pictures = (None if seed is None else picture(64, 64, seed) for seed in (None, 0, 0, 1, 0))
    model.prepare(iter(["a", "a", "b", "a", "a"]), pictures)
    expected = ["load", ("a", False), ("a", True), "source", ("b", True), ("a", True), "source"]
    assert asked == expected, "a picture is known by what it shows, not by the tensor that it is in"
    cond = model.encode(["a", "b", "a"], [one, one, other])
    model.prepare(["a"])
    model.prepare([])
    assert asked == expected, "all of it was known"
    assert torch.equal(cond.source[0], cond.source[1]) and gap(cond.source[0], cond.source[2]) > 1e-2
    assert not [key for key, value in vars(model).items() if isinstance(value, qwen_vl.VLM)]
    parts = [part for row in model.known.values() for part in row if part is not None]
    assert all(len(part) == 1 and not part.requires_grad and part.device.type == "cpu" for part in parts)
    model.encode(["b"])
    assert asked == [*expected, "load", ("b", False)], "an unknown prompt is encoded when it comes"


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
    assert torch.equal(model.latents(image), model.latents(image)), "nothing is drawn at random"


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
def test_latents_are_decoded_as_the_stock_pipeline_decodes_them(folders, stock):
    x = torch.randn(3, 16, 8, 6, generator=torch.Generator().manual_seed(0))
    config = stock[""].vae.config
    mean, std = (torch.tensor(row)[:, None, None, None] for row in (config.latents_mean, config.latents_std))
    raw = stock[""].vae.decode(x[:, :, None] * std + mean, return_dict=False)[0][:, :, 0]
    expected = stock[""].image_processor.postprocess(raw, output_type="pt")
    model = load(folders, precision="bfloat16")
    images = model.decode(x)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert images.shape == (3, 3, 64, 48) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and gap(images[0], images[1]) > 0.05
    assert torch.equal(model.decode(x[1:2])[0], images[1]), "alone or in a batch, to the last bit"
    assert torch.equal(model.decode(x.bfloat16()), model.decode(x.bfloat16().float()))


# ---------------------------------------------------------------------------------------------------------- time
def test_the_time_grid_is_the_stock_pipelines(folders):
    for side in (64, 256, 1024):
        model = load(folders, resolution=side)
        for steps in (2, 7, 10, 40):
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folders[""] / "scheduler")
            config, tokens = scheduler.config, (side // 16) ** 2
            mu = pipeline_qwenimage.calculate_shift(
                tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
            )
            pipeline_qwenimage.retrieve_timesteps(scheduler, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            grid = model.time_grid(steps)
            assert torch.equal(grid, scheduler.sigmas) and grid.shape == (steps + 1,)
            assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
            assert grid[-2].item() == pytest.approx(0.02, abs=1e-6), "shift_terminal"
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
    guided = {"negative_prompt": " ", "true_cfg_scale": cfg} if cfg != 1 else {}
    options = {"num_inference_steps": 4, "height": 64, "width": 64, "output_type": output, **guided, **more}
    found = pipe(prompt=prompt, latents=qwen.pack(x, 2), **options).images
    return qwen.unpack(found, 2, 8, 8) if output == "latent" else found


def trained(model, seed=1):
    """Put a student that differs from the base on a model; alpha is not its rank."""
    state, config = random_lora(model.transformer, rank=4, alpha=12.0, seed=seed)
    model.add_adapter(STUDENT, config, state)
    return config


def saved(model, folder):
    config = model.adapters[STUDENT]
    adapters.save_adapter(folder, model.adapter_state(), config, model.source, model.fingerprint, model.pipeline)
    return folder


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_drawing_is_the_stock_pipelines_drawing(folders, stock, tmp_path, cfg, adapted):
    """Text, masks, time, rescaled guidance, adapter and its files at once; prompts of unequal length in one batch."""
    model, pipe = load(folders, rescale=True, text_length=512), stock[""]
    if adapted:
        trained(model)
        pipe.load_lora_weights(saved(model, tmp_path))
    x = noise(model, 2)
    expected = stock_draw(pipe, x, PROMPTS[:2], cfg)
    shown = stock_draw(pipe, x, PROMPTS[:2], cfg, "pt")
    pipe.unload_lora_weights()
    found = draw(model, x, PROMPTS[:2], cfg)
    parity(f"Qwen-Image cfg {cfg}{' with a LoRA' * adapted}", found, expected)
    torch.testing.assert_close(model.decode(found), shown, atol=1e-4, rtol=0)
    with model.adapter(None):
        assert (gap(draw(model, x, PROMPTS[:2], cfg), expected) > 1e-2) == adapted, "the adapter matters"
    model.rescale = False
    assert (gap(draw(model, x, PROMPTS[:2], cfg), expected) > 1e-2) == (cfg != 1), "so does rescaling, where it guides"


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
    if adapted:
        trained(model)
        pipe.load_lora_weights(saved(model, tmp_path))
    x, images = noise(model, 2), [picture(64, 64, 0), picture(64, 64, 1)]
    expected = torch.cat([
        stock_draw(pipe, x[i : i + 1], PROMPTS[i], 4.0, image=pil(images[i])) for i in range(2)
    ])  # fmt: skip
    pipe.unload_lora_weights()
    found = draw(model, x, PROMPTS[:2], 4.0, images)
    parity(f"{PIPELINES[kind]}{' with a LoRA' * adapted}", found, expected)
    assert gap(draw(model, x, PROMPTS[:2], 4.0, images[::-1]), expected) > 1e-2, "the source matters"
    with model.adapter(None):
        assert (gap(draw(model, x, PROMPTS[:2], 4.0, images), expected) > 1e-2) == adapted


def test_a_model_that_edits_draws_as_qwen_image_does(folders, stock):
    model, pipe = load(folders, "plus", rescale=True), stock["plus"]
    parts = {name: part for name, part in pipe.components.items() if name != "processor"}
    x = noise(model, 1)
    expected = stock_draw(QwenImagePipeline(**parts), x, PROMPTS[0], 4.0)
    parity("Qwen-Image-Edit-Plus draws", draw(model, x, PROMPTS[:1], 4.0), expected)


@pytest.mark.parametrize("source", [False, True], ids=["without", "with a source"])
def test_zero_cond_t_works_as_in_the_stock_pipeline(tmp_path, stock, small_sources, source):
    """Qwen-Image-Edit-2511 shows the source at time 0 to every block; its weights are those of a model without."""
    folder = build_qwen(tmp_path / "2511", "plus", zero_cond_t=True)
    model, plain = load({"plus": folder}, "plus", rescale=True), build_qwen(tmp_path / "2509", "plus")
    parts = {**stock["plus"].components, "transformer": model.transformer}
    x, images = noise(model, 1), [picture(64, 64)] if source else None
    if source:
        expected = stock_draw(type(stock["plus"])(**parts), x, PROMPTS[0], 4.0, image=pil(images[0]))
    else:
        parts.pop("processor")
        expected = stock_draw(QwenImagePipeline(**parts), x, PROMPTS[0], 4.0)
    parity(f"zero_cond_t{' with a source' * source}", draw(model, x, PROMPTS[:1], 4.0, images), expected)
    without = draw(load({"plus": plain}, "plus", rescale=True), x, PROMPTS[:1], 4.0, images)
    assert (gap(without, expected) > 1e-2) == source, "it matters where there is a source"


def test_an_adapter_in_the_stock_pipeline_is_the_students_velocity_to_the_last_bit(folders, stock, tmp_path):
    model, pipe = load(folders, "plus"), stock["plus"]
    trained(model)
    cond, x = model.encode(PROMPTS[:2], [picture(64, 64, i) for i in range(2)]), noise(model, 2)
    t = torch.tensor([0.9, 0.3])
    with torch.no_grad():
        expected = model.velocity(x, t, cond)
        pipe.load_lora_weights(saved(model, tmp_path))
        model.active = pipe.transformer
        assert gap(model.velocity(x, t, cond), expected) == 0.0
        pipe.unload_lora_weights()
        assert gap(model.velocity(x, t, cond), expected) > 1e-2


# ------------------------------------------------------------------------------------------- one row and the others
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
def losses(model, rows=2):
    """A loss through the student's velocity; its gradients."""
    cond = model.encode(PROMPTS[:rows], [picture(64, 64, i) for i in range(rows)])
    model.velocity(noise(model, rows), 0.5, cond).square().mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.transformer.named_parameters()}


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_what_trains_is_exactly_what_gets_a_gradient(tmp_path, full, zero_cond_t):
    model = load({"plus": build_qwen(tmp_path / "base", "plus", zero_cond_t=zero_cond_t)}, "plus")
    model.train_fully() if full else trained(model)
    grads = losses(model)
    got = {name for name, grad in grads.items() if grad is not None}
    assert set(model.trainable()) == got
    asked = {name for name, p in model.transformer.named_parameters() if p.requires_grad}
    unread = {name for name in asked - got}
    assert unread and all(re.match(r"transformer_blocks\.1\.(attn\.to_add_out|txt_mlp)\.", name) for name in unread)


# -------------------------------------------------------------------------------------------------------- loading
def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "text_encoder", "vae", "processor", "another pipeline's"])
def test_a_base_that_lacks_a_part_is_refused_before_anything_is_read(folders, tmp_path, monkeypatch, part):
    copy = shutil.copytree(folders["plus"], tmp_path / "copy")
    if part == "another pipeline's":
        edit(copy / "transformer/config.json", "QwenImageTransformer2DModel", "SD3Transformer2DModel")
    else:
        shutil.rmtree(copy / part)
        monkeypatch.setattr(qwen, "read_transformer", lambda *_: pytest.fail("the transformer was read"))
    assert str(copy) in refusal(load, {"plus": copy}, "plus")


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_parts_that_are_read_when_they_are_needed_are_refused_in_one_line_then(folders, tmp_path, part):
    copy = shutil.copytree(folders["plus"], tmp_path / "copy")
    (copy / f"{part}.safetensors").write_bytes(b"half a file")
    model = load({"plus": copy}, "plus")
    call, given = (model.decode, torch.zeros(1, 16, 8, 8)) if "vae" in part else (model.encode, PROMPTS)
    assert str(copy) in refusal(call, given) and model.known == {}


def test_what_a_model_cannot_do_is_refused(folders):
    refusal(load(folders).encode, ["a"], [picture(64, 64)])  # it does not edit
    for option in ({"source_resolution": 72}, {"text_length": 1025}):  # a patch of two latents is 16 pixels
        assert str([*option.values()][0]) in refusal(load, folders, **option)


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
    shown = torch.from_numpy(np.array(names["image"])).permute(2, 0, 1) / 255
    torch.manual_seed(0)
    model.rescale, x = True, noise(model, 1)
    drawer = names["draw"] if kind else names["pipe"]
    expected = drawer("a photo of two cats", latents=qwen.pack(x, 2), negative_prompt=" ", true_cfg_scale=4.0,
                      num_inference_steps=2, height=64, width=64, output_type="latent").images  # fmt: skip
    found = draw(model, x, ["a photo of two cats"], 4.0, steps=2)
    assert shown.shape == (3, 64, 64) and gap(qwen.pack(found, 2), expected) < 1e-5 * expected.abs().max()
