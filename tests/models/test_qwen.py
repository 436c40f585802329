"""Oracles for Qwen-Image: packing and guidance by hand, the published pipelines in parts and as a whole."""

import re
import shutil

import diffusers
import numpy as np
import pytest
import safetensors.torch
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
from tests.helpers.qwen_hub import PIPELINES, WIDTH, build_qwen
from tests.helpers.refusals import refusal
from tests.helpers.sd3 import random_lora

KINDS = tuple(PIPELINES)  # "" draws, "edit" and "plus" edit
EDITORS = ("edit", "plus")
PROMPTS = ["a red fox", "a much longer prompt: the user's texture, of 12 words or so", "x"]
LONG = "a crowded market square " * 60


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def gap(a, b):
    return (a - b).abs().max().item()


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


def test_rescaling_is_token_by_token_and_sample_by_sample(folders):
    model = load(folders, rescale=True)
    uncond, cond = noise(model, 3, 0), noise(model, 3, 1)
    found = qwen.pack(model.guide(uncond, cond, 4.0), 2)
    torch.testing.assert_close(found.norm(dim=-1), qwen.pack(cond, 2).norm(dim=-1))
    plain = qwen.pack(uncond + 4 * (cond - uncond), 2)
    torch.testing.assert_close(torch.cosine_similarity(found, plain, dim=-1), torch.ones(3, 16))
    other = cond.clone()
    other[1, :, :2, :2] *= 3  # the first token of the second sample
    changed = (qwen.pack(model.guide(uncond, other, 4.0), 2) - found).abs().amax(-1) > 0
    assert changed.nonzero().tolist() == [[1, 0]]


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
    assert refusal(load, folders, text_length=1025) == "--text-length 1025: Qwen-Image reads at most 1024 tokens"


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


def test_a_prompts_encoding_does_not_depend_on_what_else_is_encoded(folders):
    images = [picture(64, 64, seed) for seed in range(3)]
    alone, together = load(folders, "plus"), load(folders, "plus")
    one, many = alone.encode(PROMPTS[:1], images[:1]), together.encode(PROMPTS, images)
    length = one.tokens.shape[1]
    assert torch.equal(many.tokens[:1, :length], one.tokens) and torch.equal(many.source[:1], one.source)
    assert many.mask[0].sum() == length and (many.tokens[0, length:] == 0).all()


def test_edits_and_prompts_without_a_picture_do_not_share_a_batch(folders):
    model = load(folders, "plus")
    with pytest.raises(ValueError, match="do not fit into one batch"):
        model.encode(["a", "b"], [picture(64, 64), None])


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


def test_the_shift_grows_with_the_picture(folders):
    # 1024 pixels a side are 64 x 64 tokens: 0.5 + (4096 - 256) / (8192 - 256) * (0.9 - 0.5)
    assert load(folders, resolution=1024).train_shift == pytest.approx(0.5 + 3840 / 7936 * 0.4)
    assert load(folders, resolution=256).train_shift == pytest.approx(0.5)
    assert load(folders, resolution=64).train_shift < 0.5
    for tokens in (16, 256, 5000):  # what the stock pipelines assume where a scheduler's file says nothing
        assert qwen.shift_of({}, tokens) == pytest.approx(pipeline_qwenimage.calculate_shift(tokens))


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
    assert gap(found, expected) < 1e-5 * max(1, expected.abs().max().item())
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
    assert gap(found, expected) < 1e-5 * max(1, expected.abs().max().item())
    assert gap(draw(model, x, PROMPTS[:2], 4.0, images[::-1]), expected) > 1e-2, "the source matters"
    with model.adapter(None):
        assert (gap(draw(model, x, PROMPTS[:2], 4.0, images), expected) > 1e-2) == adapted


def test_a_model_that_edits_draws_as_qwen_image_does(folders, stock):
    model, pipe = load(folders, "plus", rescale=True), stock["plus"]
    parts = {name: part for name, part in pipe.components.items() if name != "processor"}
    x = noise(model, 1)
    expected = stock_draw(QwenImagePipeline(**parts), x, PROMPTS[0], 4.0)
    assert gap(draw(model, x, PROMPTS[:1], 4.0), expected) < 1e-5 * max(1, expected.abs().max().item())


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
    assert gap(draw(model, x, PROMPTS[:1], 4.0, images), expected) < 1e-5 * max(1, expected.abs().max().item())
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


@torch.no_grad()
def test_a_row_moves_its_own_velocity_only(folders):
    model = load(folders, "plus")
    images = [picture(64, 64, i) for i in range(3)]
    cond, uncond = model.encode(PROMPTS, images), model.encode([" "] * 3, images)
    x, t = noise(model, 3), torch.tensor([0.9, 0.5, 0.1])
    found = model.velocity(x, t, cond, uncond, 3.0)
    other = model.encode([PROMPTS[0], PROMPTS[1] + "!", PROMPTS[2]], images)
    bump = torch.tensor([0.0, 1.0, 0.0])
    changes = {
        "x": (x + bump[:, None, None, None], t, cond), "t": (x, t - 0.2 * bump, cond),
        "source": (x, t, cond._replace(source=cond.source + bump[:, None, None, None])), "prompt": (x, t, other),
    }  # fmt: skip
    for name, (x_, t_, cond_) in changes.items():
        moved = (model.velocity(x_, t_, cond_, uncond, 3.0) - found).abs().amax((1, 2, 3))
        assert moved[1] > 1e-3 and moved[0] < 1e-5 and moved[2] < 1e-5, name


@torch.no_grad()
def test_guidance_is_of_two_branches_with_the_same_source(folders):
    model = load(folders, "plus")
    images = [picture(64, 64, i) for i in range(2)]
    cond, uncond, x = model.encode(PROMPTS[:2], images), model.encode([" "] * 2, images), noise(model, 2)
    apart = model.velocity(x, 0.7, uncond), model.velocity(x, 0.7, cond)
    for found, expected in zip(model.branches(x, 0.7, cond, uncond), apart, strict=True):
        assert gap(found, expected) < 1e-5
    found = model.velocity(x, 0.7, cond, uncond, 2.5)
    assert gap(found, apart[0] + 2.5 * (apart[1] - apart[0])) < 1e-4
    with pytest.raises(ValueError, match="guidance scale 2.5 needs"):
        model.velocity(x, 0.7, cond, cfg=2.5)


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


def test_gradient_checkpointing_gives_the_same_gradients(folders):
    plain, thrifty = load(folders, "plus"), load(folders, "plus")
    for model in (plain, thrifty):
        trained(model)
    thrifty.transformer.enable_gradient_checkpointing()
    expected, found = losses(plain), losses(thrifty)
    assert {n for n, g in found.items() if g is not None} == {n for n, g in expected.items() if g is not None}
    assert all(torch.equal(g, expected[n]) for n, g in found.items() if g is not None)
    assert sum(g.abs().sum() for g in found.values() if g is not None) > 0


def test_a_full_student_is_saved_and_comes_back_as_base_expert_and_student(folders, tmp_path):
    model = load(folders, "plus")
    model.train_fully()
    with torch.no_grad():
        for p in model.transformer.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    images = [picture(64, 64, i) for i in range(2)]
    cond, x = model.encode(PROMPTS[:2], images), noise(model, 2)
    with torch.no_grad():
        expected = model.velocity(x, 0.4, cond)
        with model.adapter(None):
            assert gap(model.velocity(x, 0.4, cond), expected) > 1e-2, "the base stays"
    model.save_full(tmp_path, model.transformer.state_dict())
    again = load(folders, "plus")
    again.add_expert("teacher:edit", str(tmp_path))
    student = load(folders, "plus")
    student.train_fully(str(tmp_path))
    whole = shutil.copytree(folders["plus"], tmp_path / "base")
    shutil.copytree(tmp_path / "transformer", whole / "transformer", dirs_exist_ok=True)
    with torch.no_grad():
        with again.adapter("teacher:edit"):
            assert torch.equal(again.velocity(x, 0.4, cond), expected)
        assert torch.equal(student.velocity(x, 0.4, cond), expected)
        assert torch.equal(load({"plus": whole}, "plus").velocity(x, 0.4, cond), expected)


def test_a_lora_is_on_every_projection_of_every_joint_attention_and_nowhere_else(folders):
    model = load(folders)
    model.add_adapter(STUDENT, adapters.lora_config(3, 6.0))
    layers = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    expected = {f"transformer_blocks.{block}.attn.{layer}" for block in range(2) for layer in layers}
    assert {name.partition(".lora_")[0] for name in model.adapter_state()} == expected


@torch.no_grad()
def test_in_bfloat16_the_velocity_is_float32_and_nearly_the_same(folders):
    exact, coarse = load(folders, "plus"), load(folders, "plus", precision="bfloat16")
    images, x = [picture(64, 64, i) for i in range(2)], noise(exact, 2)
    assert {p.dtype for p in coarse.transformer.parameters()} == {torch.bfloat16}
    pair = []
    for model in (exact, coarse):
        cond, uncond = model.encode(PROMPTS[:2], images), model.encode([" "] * 2, images)
        pair.append(model.velocity(x, torch.tensor([0.75, 0.25]), cond, uncond, 2.0))
    assert cond.tokens.dtype == torch.bfloat16 and cond.source.dtype == torch.float32
    assert pair[1].dtype == torch.float32 and 0 < gap(*pair) < 0.1 * pair[0].abs().max()


# -------------------------------------------------------------------------------------------------------- loading
def test_a_picture_for_a_model_that_cannot_edit_is_refused_with_the_way_out(folders):
    assert str(folders[""]) in refusal(load(folders).encode, ["a"], [picture(64, 64)])


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop(file):
    """Take the last tensor out of a file."""
    tensors = safetensors.torch.load_file(file)
    tensors.popitem()
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "text_encoder", "vae", "processor"])
def test_a_base_that_lacks_a_part_is_refused_before_anything_is_read(folders, tmp_path, monkeypatch, part):
    copy = shutil.copytree(folders["plus"], tmp_path / "copy")
    shutil.rmtree(copy / part)
    monkeypatch.setattr(qwen, "read_transformer", lambda *_: pytest.fail("the transformer was read"))
    message = refusal(load, {"plus": copy}, "plus")
    assert message == f"{copy / part}: missing; the base must be a pipeline in diffusers' layout"


def test_another_pipelines_transformer_and_odd_sizes_are_refused(folders, tmp_path):
    copy = shutil.copytree(folders[""], tmp_path / "copy")
    edit(copy / "transformer/config.json", "QwenImageTransformer2DModel", "SD3Transformer2DModel")
    assert "_class_name is SD3Transformer2DModel" in refusal(load, {"": copy})
    shutil.rmtree(copy / "transformer")
    assert "transformer" in refusal(load, {"": copy})
    message = refusal(load, folders, source_resolution=72)
    assert message == "--source-resolution 72: must be a multiple of 16 (VAE 8 x patch 2)"


LATE = {
    "half a VAE": lambda f: cut(f / "vae/diffusion_pytorch_model.safetensors"),
    "a VAE that lacks a tensor": lambda f: drop(f / "vae/diffusion_pytorch_model.safetensors"),
    "half a text encoder": lambda f: cut(f / "text_encoder/model.safetensors"),
    "a text encoder that lacks a tensor": lambda f: drop(f / "text_encoder/model.safetensors"),
    "half a tokenizer": lambda f: cut(f / "tokenizer/tokenizer.json"),
    "an empty tokenizer": lambda f: [file.unlink() for file in (f / "tokenizer").iterdir()],
    "another tokenizer": lambda f: edit(f / "text_encoder/config.json", '"image_token_id": ', '"image_token_id": 1'),
    "no image processor": lambda f: (f / "processor/preprocessor_config.json").unlink(),
}


@pytest.mark.parametrize("fault", LATE)
def test_parts_that_are_read_when_they_are_needed_are_refused_in_one_line_then(folders, tmp_path, fault):
    copy = shutil.copytree(folders["plus"], tmp_path / "copy")
    LATE[fault](copy)
    model = load({"plus": copy}, "plus")
    if "VAE" in fault:
        message = refusal(model.decode, torch.zeros(1, 16, 8, 8))
        assert message.startswith(f"{copy}/vae: not readable as AutoencoderKLQwenImage (")
    else:
        message = refusal(model.encode, PROMPTS, [picture(64, 64)] * 3)
        assert re.match(f"{copy}/(text_encoder|tokenizer|processor): not readable as a part of a Qwen-VL", message)
        assert model.known == {}


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


def test_the_card_says_how_the_runs_pictures_are_guided():
    about = {"model": "Qwen/Qwen-Image-Edit-2509", "stage": "opd", "cfg": 4.0, "eval_steps": 40, "resolution": 512}
    both = model_card({**about, "guidance": "both"}, {}, {}, 1, "QwenImageEditPlusPipeline")
    assert 'negative_prompt=" ", true_cfg_scale=4.0, num_inference_steps=40, height=512, width=512' in both
    assert "pipeline_tag: image-to-image" in both and "- image-to-image\n- text-to-image" in both
    student = model_card({**about, "guidance": "teacher"}, {}, {}, 1, "QwenImagePipeline")
    assert "true_cfg_scale=1.0" in student and "negative_prompt" not in student and "load_image" not in student
    assert "pipeline_tag: text-to-image" in student and "image-to-image" not in student
