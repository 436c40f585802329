"""Oracles for SD3.5 and Qwen-Image: the stock pipelines, in both precisions, and which model a folder is."""

import math
import re
import shutil
from functools import cache

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
from tests.helpers.checks import gap, refusal, relative, shown
from tests.helpers.pretend_cuda import CPU, CUDA, place, pretend_cuda
from tests.helpers.qwen_hub import PIPELINES, build_qwen, noise, picture, pil, trained

EDITORS = ("edit", "plus")
PROMPTS = ["a red fox", "a much longer prompt: the user's texture, of 12 words or so", "x"]
LONG = "a crowded market square " * 60  # more than CLIP's 77 tokens, and than T5's 256 of this tokenizer
# Findings, 2: ten steps with SD3's shift 3, on the grid of a thousand training times.
TEN_STEPS = [1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.009, 0]


def load(folders, kind="", **more):
    return models.load(str(folders[kind]), **{"size": (64, 64), **more})


@pytest.fixture(scope="module")
def stock(folders):
    """stock(kind, precision): a published pipeline itself; if it edits, with the token types that it forgets."""

    @cache
    def pipeline(kind, precision="float32"):
        if kind == "sd35":
            pipe = StableDiffusion3Pipeline.from_pretrained(folders[kind], torch_dtype=getattr(torch, precision))
        else:
            more, patch = {}, pytest.MonkeyPatch()
            patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)  # no video half here
            if kind:
                images = AutoImageProcessor.from_pretrained(folders[kind] / "processor", backend="pil")
                tokenizer = Qwen2Tokenizer.from_pretrained(folders[kind] / "processor")
                more = {"processor": Qwen2_5_VLProcessor(images, tokenizer, None)}
            name = PIPELINES.get(kind, PIPELINES["plus"])
            pipe = getattr(diffusers, name).from_pretrained(
                folders[kind], torch_dtype=getattr(torch, precision), **more
            )
            patch.undo()
            if kind:
                typed(pipe.text_encoder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return pipeline


@pytest.fixture(scope="module")
def folders(folders, tmp_path_factory):
    """As everyone's, and "zero": Qwen-Image-Edit-2511 shows the source at time 0 to every block."""
    return {**folders, "zero": build_qwen(tmp_path_factory.mktemp("zero") / "base", "plus", zero_cond_t=True)}


def typed(vlm):
    """Have a VLM take its image tokens for a picture, as transformers 4 had it without being told."""

    def add(module, args, kwargs):
        return args, {**kwargs, "mm_token_type_ids": (kwargs["input_ids"] == module.config.image_token_id).int()}

    return vlm.register_forward_pre_hook(add, with_kwargs=True)


# ------------------------------------------------------------------------------- whole pictures, as the stock pipelines
def draw(model, x, prompts, cfg, images=None, steps=4):
    empty = [model.empty] * len(prompts)
    model.prepare([*prompts, *empty], images and images * 2)  # the text encoder is read once for both
    cond, uncond = model.encode(prompts, images), model.encode(empty, images)
    with torch.no_grad():
        return sde.sample(lambda x, t: model.velocity(x, t, cond, uncond, cfg), x, model.time_grid(steps))


def stock_draw(pipe, x, prompt, cfg, output="latent", **more):
    height, width = (8 * side for side in x.shape[2:])
    more = {"height": height, "width": width, "num_inference_steps": 4, **more}
    options = {"prompt": prompt, "output_type": output, **more}
    if isinstance(pipe, StableDiffusion3Pipeline):
        return pipe(latents=x.clone(), guidance_scale=cfg, **options).images
    guided = {"negative_prompt": " ", "true_cfg_scale": cfg} if cfg != 1 else {}
    found = pipe(latents=qwen.pack(x, 2), **options, **guided).images
    return qwen.unpack(found, 2, *x.shape[2:]) if output == "latent" else found


def saved(model, folder):
    config = model.adapters[STUDENT]
    adapters.save_adapter(folder, model.adapter_state(), config, model.source, model.fingerprint, model.pipeline)
    return folder


@pytest.fixture
def small_sources(monkeypatch):
    """Have the stock pipelines read sources with 64 x 64 pixels, and Qwen-Image-Edit's text encoder with them."""
    real = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: real(64 * 64, ratio))
    monkeypatch.setitem(qwen.EDITS, "QwenImageEditPipeline", qwen.Editor("", 64, 1))


# Which pipeline, its guidance, how many pictures it edits, and the size (width, height) of what it draws. "plus" draws,
# too: one transformer for both tasks.
WHOLE = [("sd35", 4.5, 0, (96, 64)), ("", 1.0, 0, (64, 64)), ("", 4.0, 0, (48, 96)), ("plus", 4.0, 0, (64, 64)),
         ("edit", 4.0, 1, (64, 80)), ("plus", 4.0, 2, (80, 64)), ("zero", 4.0, 1, (64, 64)), ("zero", 4.0, 3, (32, 64))]
SHAPES = [(96, 160), (64, 64), (200, 80)]  # (height, width) of sources


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "cfg", "edits", "size"), WHOLE)
@pytest.mark.usefixtures("small_sources")
def test_a_picture_is_the_stock_pipelines_with_and_without_a_lora(
    folders, stock, tmp_path, kind, cfg, edits, size, precision
):
    """Text, masks, sources, time, guidance, adapter and its files at once; prompts of unequal length in one batch.

    Relative to the latents. Edits are compared one by one, which is all that EditPlus can.
    """
    more = {"rescale": True, "source_resolution": 64} if kind != "sd35" else {}
    model = load(folders, kind, text_length=256, precision=precision, size=size, **more)
    pipe = stock(kind if edits or kind == "sd35" else "", precision)
    if kind == "plus" and not edits:  # with the weights of the model that edits
        parts = {name: part for name, part in stock(kind, precision).components.items() if name != "processor"}
        pipe = QwenImagePipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
    trained(model)
    x, prompts = noise(model, 2), [PROMPTS[1], LONG if kind == "sd35" else PROMPTS[0]]
    images = [shown(*(picture(*SHAPES[i], seed + i) for i in range(edits))) for seed in (0, 10)] if edits else None

    def stock_latents(output="latent"):
        if not edits:
            return stock_draw(pipe, x.to(pipe.dtype), prompts, cfg, output).float()
        shown = [[pil(source.pixels()) for source in some] for some in images]
        shown = shown if kind != "edit" else sum(shown, [])  # it does not resize what is in a list
        rows = zip(x.to(pipe.dtype).split(1), prompts, shown, strict=True)
        return torch.cat([stock_draw(pipe, row, text, cfg, output, image=i) for row, text, i in rows]).float()

    def apart(expected, cfg=cfg, images=images):
        return relative(draw(model, x, prompts, cfg, images), expected)

    near, other = {"float32": (1e-5, 1e-2), "bfloat16": (2e-2, 3e-2)}[precision]
    pipe.load_lora_weights(saved(model, tmp_path))
    expected, pixels = stock_latents(), stock_latents("pt") if precision == "float32" else None
    pipe.unload_lora_weights()
    assert apart(expected) < near
    assert apart(expected, cfg + 1) > other, "guidance matters"
    if pixels is not None:
        torch.testing.assert_close(model.decode(draw(model, x, prompts, cfg, images)), pixels, atol=1e-4, rtol=0)
    if edits:
        assert apart(expected, images=images[::-1]) > other, "the source matters"
        assert edits == 1 or gap(*(model.encode(prompts, [some[::step] for some in images]).tokens for step in (1, -1)))
    with model.adapter(None):
        assert apart(expected) > other, "the adapter matters"
        assert apart(stock_latents()) < near
    model.rescale = False
    assert (apart(expected) > other) == (kind != "sd35" and cfg != 1), "rescaling matters"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sd35", ""])
def test_every_time_of_40_steps_is_the_stock_pipelines_to_the_last_bit(folders, stock, kind, precision):
    """As the transformer embeds it: SD3 in float32, Qwen-Image rounded to its precision, in the stock order."""
    model, pipe, told = load(folders, kind, precision=precision), stock(kind, precision), []
    for transformer in (pipe.transformer, model.transformer):
        transformer.time_text_embed.register_forward_pre_hook(lambda module, args: told.append(args[0][0].item()))
    x = noise(model, 1)
    stock_draw(pipe, x.to(pipe.dtype), PROMPTS[:1], 1.0, num_inference_steps=40)
    draw(model, x, PROMPTS[:1], 1.0, steps=40)
    pipe.transformer.time_text_embed._forward_pre_hooks.clear()
    assert told[:40] == told[40:] and len(told) == 80 and len(set(told)) > 30


# ------------------------------------------------------------------------------------ what such pictures do not show
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


@torch.no_grad()
@pytest.mark.parametrize("kind", EDITORS)
def test_the_stock_pipelines_leave_out_which_tokens_are_the_picture(folders, stock, kind):
    """What the ERRATUM in qwen.py says; if this fails, diffusers has been corrected and the comment can go."""
    fresh = Qwen2_5_VLForConditionalGeneration.from_pretrained(folders[kind] / "text_encoder")
    as_it_is = type(stock(kind))(**{**stock(kind).components, "text_encoder": fresh})
    shown = pil(picture(84, 84))
    right, _ = stock(kind).encode_prompt(PROMPTS[:1], image=[shown])
    wrong, _ = as_it_is.encode_prompt(PROMPTS[:1], image=[shown])
    assert right.shape == wrong.shape and gap(right, wrong) > 1e-2
    typed(fresh)
    assert torch.equal(as_it_is.encode_prompt(PROMPTS[:1], image=[shown])[0], right)


@torch.no_grad()
def test_the_length_of_the_text_is_a_setting_that_does_not_cut_the_picture(folders):
    whole, short = load(folders, "plus"), load(folders, "plus", text_length=20)
    assert gap(short.encode([LONG]).tokens, whole.encode([LONG]).tokens[:, :20]) < 1e-5
    seen = 9  # 84 x 84 pixels, the tiny processor's largest, in 28 x 28 a token
    cut, all_of_it = (model.encode([LONG], [shown(picture(64, 64))]) for model in (short, whole))
    assert cut.tokens.shape[1] == 20 + seen and gap(cut.tokens, all_of_it.tokens[:, : 20 + seen]) < 1e-5


def test_encoders_are_loaded_once_asked_once_for_a_prompt_and_a_picture_and_let_go(folders, monkeypatch):
    model, asked = load(folders, "plus"), []
    read, encode, latents = model.read_encoders, model.encode_row, model.latents
    monkeypatch.setattr(model, "read_encoders", lambda: (asked.append("load"), read())[1])
    monkeypatch.setattr(model, "encode_row", lambda *args: (asked.append((args[1], len(args[2]))),
                                                            encode(*args))[1])  # fmt: skip
    monkeypatch.setattr(model, "latents", lambda *args: (asked.append("source"), latents(*args))[1])
    a, b = (shown(picture(64, 64, seed)) for seed in (0, 1))
    images = [(), a, (a[0]._replace(),), b, a]  # a picture is known by its place
    model.prepare(["a", "a", "b", "a", "a"], images)
    expected = ["load", ("a", 0), ("a", 1), "source", ("b", 1), ("a", 1), "source"]
    assert asked == expected
    unread = [tuple(image._replace(pixels=None) for image in some) for some in images[1:4]]
    cond = model.encode(["a", "b", "a"], unread)
    model.prepare(["a"])
    model.prepare([])
    assert asked == expected, "all of it was known, and no picture is decoded again"
    assert gap(cond.tokens[0], cond.tokens[1]) > 1e-3
    (source,) = cond.sources
    assert torch.equal(source[0], source[1]) and gap(source[0], source[2]) > 1e-2
    parts = [part for row in model.known.values() for part in (*row[:3], *row.sources) if part is not None]
    assert all(len(part) == 1 and not part.requires_grad and part.device.type == "cpu" for part in parts)
    model.encode(["c"])
    assert asked == [*expected, "load", ("c", 0)], "an unknown prompt is encoded when it comes"


@pytest.mark.parametrize("kind", ["sd35", "plus"])
def test_while_prompts_are_encoded_the_base_waits_on_the_host_and_comes_back_bit_identical(folders, kind):
    """The student's factors, which the optimizer holds, stay where they are."""
    model, t, places = trained(load(folders, kind)), torch.tensor([0.5]), set()
    x, row = noise(model, 1), model.encode(PROMPTS[:1])

    def encode_row(*_):
        every = (*model.transformer.parameters(), *model.transformer.buffers())
        places.update((p.requires_grad, place(p)) for p in every)
        return row

    with pretend_cuda():
        model.device = CUDA
        model.transformer.to(CUDA)
        before = model.velocity(x.to(CUDA), t.to(CUDA), row.to(CUDA))
        model.read_encoders, model.length, model.encode_row = (lambda: None), (lambda *_: 1), encode_row
        model.prepare(PROMPTS[1:])
        assert places == {(True, CUDA), (False, CPU)}
        assert {place(p) for p in (*model.transformer.parameters(), *model.transformer.buffers())} == {CUDA}
        assert torch.equal(model.velocity(x.to(CUDA), t.to(CUDA), row.to(CUDA)).cpu(), before.cpu())


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


def test_a_source_keeps_its_shape_and_is_resized_as_the_stock_pipelines_do_it(folders):
    for ratio in (0.2, 0.5, 2 / 3, 0.99, 1, 4 / 3, 1.7, 3.1):
        for side in (64, 384, 1000, 1024):
            assert qwen.fitted(ratio, side**2) == pipeline_qwenimage_edit_plus.calculate_dimensions(side**2, ratio)
    assert qwen.fitted(1e-4, 64**2)[0] == 32, "never nothing"
    wide, drawn = picture(48, 120), load(folders, "plus", size=(96, 128))
    assert drawn.latents(wide).shape == (1, 16, 8, 20), "96 x 128 pixels, as what is drawn has"
    small = load(folders, "plus", source_resolution=32)
    assert small.latents(wide).shape == (1, 16, 4, 8)
    shrunk = np.array(pil(wide).resize((64, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(qwen.resized(wide, 32**2), shrunk)
    assert qwen.resized(1.5 * wide - 0.2, 64**2).getextrema() == ((0, 255),) * 3, "clamped"


def test_the_text_encoder_sees_pictures_in_the_stock_pipelines_sizes(monkeypatch, stock):
    seen, real = [], pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions",
                        lambda area, ratio: (seen.append(area), real(area, ratio))[1])  # fmt: skip
    with pytest.raises(ValueError):
        stock("edit")(pil(picture(64, 64)), prompt=None)
    assert real(seen[0], 1.0)[:2] == (1024, 1024) == 2 * (qwen.EDITS["QwenImageEditPipeline"].side,)
    side = qwen.EDITS["QwenImageEditPlusPipeline"].side
    assert side**2 == pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE
    assert list(map(qwen.picture_tokens, qwen.EDITS)) == [1369, 196]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd35", ""])
def test_pictures_are_float32_in_0_1_on_the_cpu_and_alone_as_in_a_batch(folders, kind):
    model = load(folders, kind, precision="bfloat16")
    x = torch.randn(3, 16, 8, 6, generator=torch.Generator().manual_seed(0))
    images = model.decode(x)
    assert images.shape == (3, 3, 64, 48) and images.dtype == torch.float32 and images.device.type == "cpu"
    assert torch.equal(model.decode(x[1:2])[0], images[1]) and gap(images[0], images[1]) > 0.05
    loud = model.decode(20 * x[:1].bfloat16())
    assert loud.min() >= 0 and loud.max() <= 1 and loud.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- time
@pytest.mark.parametrize("kind, side", [("sd35", 64), ("sd35", 192), ("", 64), ("", 1024)])
def test_the_time_grid_is_the_stock_schedulers_for_the_pictures_size(folders, kind, side):
    size = (side, side // 2)
    model = load(folders, kind, size=size)
    for steps in (2, 10, 40):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folders[kind] / "scheduler")
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        more = {}
        if kind == "":
            mu = pipeline_qwenimage.calculate_shift(math.prod(size) // 256, *(scheduler.config[name] for name in names))
            more = {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}
        pipeline_qwenimage.retrieve_timesteps(scheduler, None if more else steps, **more)
        grid = model.time_grid(steps)
        assert torch.equal(grid, scheduler.sigmas) and grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
        assert kind == "sd35" or grid[-2].item() == pytest.approx(0.02, abs=1e-6), "shift_terminal"
    if kind == "sd35":
        torch.testing.assert_close(model.time_grid(10), torch.tensor(TEN_STEPS), atol=5e-4, rtol=0)
    assert model.time_grid(1).tolist() == [1, 0]


def test_training_times_are_shifted_as_the_grid_is(folders, tmp_path):
    """Without the stretch at its end, the grid is logistic(logit(t) + train_shift) of even times."""
    copy = shutil.copytree(folders[""], tmp_path / "copy")
    edit(copy / "scheduler/scheduler_config.json", '"shift_terminal": 0.02', '"shift_terminal": null')
    model = load({"": copy}, size=(512, 512))
    even = torch.arange(8, 0, -1) / 8
    expected = torch.sigmoid(torch.logit(even.double()) + model.train_shift).float()
    torch.testing.assert_close(model.time_grid(8)[:-1], expected)


@torch.no_grad()
@pytest.mark.parametrize("edits", [False, True], ids=["t2i", "edit"])
def test_padding_changes_nothing(folders, edits):
    """A short prompt alone, and beside a long one; and whatever stands where it is padded."""
    model = load(folders, "plus")
    images = [shown(picture(64, 64, i), picture(32, 64, i)) for i in range(2)] if edits else [(), ()]
    short, both = model.encode(PROMPTS[:1], images[:1]), model.encode(PROMPTS[:2], images)
    assert short.mask is None and both.mask[0].sum() < both.mask.shape[1]
    x = noise(model, 2)
    found = model.velocity(x, 0.6, both)
    assert gap(found[:1], model.velocity(x[:1], 0.6, short)) < 1e-5
    loud = both._replace(tokens=both.tokens + 100.0 * ~both.mask[..., None])
    assert gap(model.velocity(x, 0.6, loud), found) < 1e-5
    unmasked = both._replace(mask=None)
    assert gap(model.velocity(x, 0.6, unmasked)[:1], found[:1]) > 1e-3, "without the mask it does"


# -------------------------------------------------------------------------------------------------------- loading
def test_the_model_in_a_folder_is_loaded_as_asked_and_what_it_cannot_do_is_refused(folders):
    model = load(folders, "sd35", precision="bfloat16", size=(80, 96), gradient_checkpointing=True)
    assert isinstance(model, SD35Model) and model.source == str(folders["sd35"]) and model.latent_shape == (16, 12, 10)
    assert {(p.dtype, p.requires_grad) for p in model.transformer.parameters()} == {(torch.bfloat16, False)}
    assert model.transformer.is_gradient_checkpointing and re.fullmatch("[0-9a-f]{16}", model.fingerprint)
    editor = load(folders, "plus", source_resolution=32, rescale=True)
    assert (editor.pipeline, editor.source_area, editor.rescale) == ("QwenImageEditPlusPipeline", 1024, True)
    for kind, most in (("sd35", 0), ("", 0), ("edit", 1)):
        too_many = [picture(64, 64, seed) for seed in range(most + 1)]
        refusal(load(folders, kind).encode, ["a"], [shown(*too_many)])
        assert models.most_sources(str(folders[kind])) == most
    assert models.most_sources(str(folders["plus"])) == models.most_sources("owner/unknown") == math.inf
    for option in ({"rescale": True}, {"source_resolution": 32}, {"tiny": True}, {"size": (16, 4096)}):
        refusal(load, folders, "sd35", **option)


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
             "resolution": "64"}  # fmt: skip
    card = model_card(about, {}, {}, 1, PIPELINES[kind])
    code = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)[0]
    pil(picture(64, 64)).save(tmp_path / "source.png")
    for there, here in (("path/to/this/folder", str(saved(model, tmp_path / "lora"))), ('"cuda"', '"cpu"'),
                        ("path/to/a/picture.png", str(tmp_path / "source.png")), ("bfloat16", "float32")):  # fmt: skip
        code = code.replace(there, here)
    processor = {"processor": stock(kind).processor} if kind else {}
    kind_of_pipe, read = type(stock(kind)), type(stock(kind)).from_pretrained
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
