"""Oracles for Qwen-Image-2.1: the stock pipeline with and without its cache, and forwards without a kept prefix."""

from functools import cache
from itertools import product

import diffusers
import peft
import pytest
import torch
from transformers import AutoImageProcessor, ProcessorMixin, Qwen2Tokenizer, Qwen3VLProcessor

import sde
from harness.rollout import Field
from models import load as models
from models import lora as adapters
from models import qwen
from models.experts import STUDENT
from tests.helpers.checks import gap, refusal, relative, shown
from tests.helpers.qwen_hub import build_qwen21, noise, picture, pil, trained
from tests.helpers.sd3 import random_lora

PROMPTS = ["a red fox", "a much longer prompt: the user's texture, of 12 words or so", "x"]
SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_qwen21(tmp_path_factory.mktemp("qwen21") / "base")


@pytest.fixture(scope="module")
def stock(folder):
    """stock(precision): the published pipeline itself, whose processor has no half for videos here."""

    @cache
    def pipeline(precision="float32"):
        images = AutoImageProcessor.from_pretrained(folder / "processor", backend="pil")
        template = (folder / "processor" / "chat_template.jinja").read_text()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
            tokenizer = Qwen2Tokenizer.from_pretrained(folder / "processor")
            processor = Qwen3VLProcessor(images, tokenizer, None, chat_template=template)
            pipe = diffusers.QwenImage21Pipeline.from_pretrained(
                folder, processor=processor, torch_dtype=getattr(torch, precision)
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return pipeline


def load(folder, **more):
    return models.load(str(folder), **{"size": (SIDE, SIDE), **more})


SOURCES = [picture(64, 64), picture(80, 152, 1)]  # the second one is read as 64 x 96 pixels


def conditions(model, prompts, count):
    images = [shown(*SOURCES[:count])] * len(prompts)
    return model.encode(prompts, images), model.encode([model.empty] * len(prompts), images)


def draw(model, x, prompts, cfg, count=0, steps=4):
    """As a rollout does it, the prefix kept from step to step."""
    return sde.sample(Field(model, *conditions(model, prompts, count), cfg), x, model.time_grid(steps))


def stock_draw(pipe, x, prompt, cfg, count=0, output="latent", **more):
    more |= {"image": list(map(pil, SOURCES[:count]))} if count else {}
    more |= {"negative_prompt": " ", "true_cfg_scale": cfg} if cfg != 1 else {}
    options = {"num_inference_steps": 4, "height": SIDE, "width": SIDE, "output_resolution": SIDE, **more}
    found = pipe(prompt, latents=qwen.pack(x.to(pipe.dtype), 1), output_type=output, **options).images
    return qwen.unpack(found, 1, 4, 4) if output == "latent" else found


# ---------------------------------------------------------------------------------------------------- whole pictures
WHOLE = [*product([1.0, 2.0], [0, 1, 2], ["float32", "bfloat16"], ["diffusers"]), (2.0, 1, "float32", "peft")]


@pytest.mark.parametrize(("cfg", "count", "precision", "reader"), WHOLE)
def test_a_picture_is_the_stock_pipelines_with_the_trained_adapter(
    folder, stock, tmp_path, cfg, count, precision, reader
):
    """Texts of unequal length in one batch, sources of two shapes, time, guidance, adapter and its files at once; stock
    with its own cache and without. The adapter is read by the pipeline, or by PEFT alone."""
    model, pipe = trained(load(folder, precision=precision)), stock(precision)
    x, prompts = noise(model, 2), PROMPTS[:2]
    adapters.save_adapter(tmp_path, model.adapter_state(), model.adapters[STUDENT], pipeline=model.pipeline)

    def stock_latents(count=count, **more):
        rows = zip(x.split(1), prompts, strict=True)
        return torch.cat([stock_draw(pipe, *row, cfg, count, **more) for row in rows]).float()

    near, other = {"float32": (1e-5, 1e-2), "bfloat16": (2e-2, 3e-2)}[precision]
    if reader == "peft":
        unload = peft.PeftModel.from_pretrained(pipe.transformer, tmp_path).unload
    else:
        pipe.load_lora_weights(tmp_path)
        unload = pipe.unload_lora_weights
    cached, whole = stock_latents(), stock_latents(use_kv_cache=False)
    fewer = stock_latents(count - 1) if count else None
    pixels = stock_draw(pipe, x[:1], prompts[0], cfg, count, "pt") if precision == "float32" else None
    unload()
    found = draw(model, x, prompts, cfg, count)
    assert relative(found, cached) < near and relative(found, whole) < near
    if cfg != 1:
        assert relative(draw(model, x, prompts, cfg + 3, count), cached) > other, "guidance matters"
    if count and precision == "float32":
        assert relative(fewer, cached) > other, "the last source matters"
    with model.adapter(None):
        assert relative(draw(model, x, prompts, cfg, count), cached) > other, "the adapter matters"
        assert relative(draw(model, x, prompts, cfg, count), stock_latents()) < near
    if pixels is not None:
        over_white = pixels[:, 3:] * pixels[:, :3] + 1 - pixels[:, 3:]
        torch.testing.assert_close(model.decode(found[:1]), over_white, atol=1e-4, rtol=0)
        assert pixels[:, 3].min() > 0.05 and pixels[:, 3].max() < 0.95, "not opaque"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_time_of_40_steps_is_the_stock_pipelines_to_the_last_bit(folder, stock, precision):
    model, pipe, told = load(folder, precision=precision), stock(precision), []
    for transformer in (pipe.transformer, model.transformer):
        transformer.time_text_embed.register_forward_pre_hook(lambda module, args: told.append(args[0].tolist()))
    x = noise(model, 1)
    stock_draw(pipe, x, PROMPTS[0], 1.0, num_inference_steps=40)
    draw(model, x, PROMPTS[:1], 1.0, steps=40)
    pipe.transformer.time_text_embed._forward_pre_hooks.clear()
    assert told[:40] == told[40:] and len(told) == 80 and len({time for time, _ in told}) > 30
    assert {zero for _, zero in told} == {0.0}


@pytest.mark.parametrize("side", [64, 512])
def test_the_grid_is_shifted_by_the_pictures_size_and_the_authors_own_times_are_taken(folder, stock, side):
    model, pipe = load(folder, size=(side, side)), stock()
    pixels = {"latents": torch.zeros(1, (side // 16) ** 2, 6), "height": side, "width": side, "output_type": "latent"}
    for own in (None, [1.0, 0.7, 0.4]):
        pipe.register_to_config(sample_sigmas=own)
        pipe("x", num_inference_steps=3, **pixels)
        model.sigmas = own
        found = model.time_grid(3)
        assert torch.equal(found, pipe.scheduler.sigmas) and found[0] == 1 and found[-1] == 0
    assert "3" in refusal(model.time_grid, 4)
    pipe.register_to_config(sample_sigmas=None)


# ------------------------------------------------------------------------------------------------------ rows and prefix
@torch.no_grad()
@pytest.mark.parametrize("count", [0, 2])
def test_a_row_is_the_same_beside_any_other(folder, count):
    """Padded, a picture would stand at another place behind its text, so it would be another picture."""
    model = load(folder)
    cond, _ = conditions(model, PROMPTS, count)
    x, t = noise(model, 3), torch.tensor([0.9, 0.5, 0.2])
    together = model.velocity(x, t, cond)
    assert cond.mask is not None and not cond.mask.all(1)[0]
    for row in range(3):
        alone = model.velocity(x[row : row + 1], t[row : row + 1], conditions(model, PROMPTS[row : row + 1], count)[0])
        assert gap(together[row : row + 1], alone) < 1e-6
    lengths = {model.tokens(prompt, shown(*SOURCES[:count])) for prompt in [*PROMPTS, "a red dog"]}
    assert len(lengths) == 3, "prompts of one length share a forward"


@torch.no_grad()
@pytest.mark.parametrize(("precision", "near"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_kept_prefix_gives_the_same_velocity_for_every_expert_and_time(folder, cfg, precision, near, monkeypatch):
    """Of the kept ones the transformer computes the target's tokens alone; at the times `whole` the student all."""
    model = trained(load(folder, precision=precision))
    model.add_adapter("t2i", *random_lora(model.transformer, rank=2, alpha=3.0, seed=2)[::-1])
    cond, uncond = conditions(model, ["a red fox", "a red dog"], 2)
    x, tokens = noise(model, 2), []
    model.transformer.proj_out.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    field, branches = Field(model, cond, uncond, cfg, whole=(0.4,)), 1 if cfg == 1 else 2
    sizes = {}
    for name in (STUDENT, "t2i", None):
        for t in (0.9, 0.4, 0.1):
            model._use(name)
            tokens.clear()
            kept, sizes[name, t] = field(x, t), [*tokens]
            expected = model.velocity(x, t, cond, uncond, cfg)
            assert relative(kept, expected) < near and sizes[name, t] != [] == tokens[2 * branches :]
            assert t < 0.9 or torch.equal(kept, expected), "the first one computes all"
    whole, target = set(sizes[STUDENT, 0.9]), 16
    assert all(size > target for size in whole)
    for (name, t), found in sizes.items():
        computes_all = t == 0.9 or (name == STUDENT and t == 0.4)
        assert (set(found) == whole) if computes_all else (set(found) == {target}), (name, t)
    field.forget()
    tokens.clear()
    field(x, 0.1)
    assert set(tokens) == whole


def test_the_student_that_trains_computes_its_prefix_with_a_gradient(folder):
    """Through the prefix the trained weights act, too: its gradient is that of a forward without anything kept."""
    found = []
    for kept in (True, False):
        model = trained(load(folder, gradient_checkpointing=kept))
        cond, uncond = conditions(model, PROMPTS[:1], 1)
        field = Field(model, cond, uncond, 2.0)
        if kept:
            with torch.no_grad():
                field(noise(model, 1), 0.9)
        field(noise(model, 1), 0.4).square().mean().backward()
        found.append({name: p.grad for name, p in model.trainable().items()})
    assert set(found[0]) == set(found[1]) and all(gap(found[0][n], found[1][n]) < 1e-6 for n in found[0])
    assert any(name.startswith("transformer_blocks.0.img_mlp.gate_layer") for name in found[0])


# ------------------------------------------------------------------------------------------------- pictures and files
def test_a_source_that_the_text_encoder_would_see_in_another_size_is_refused(folder):
    """The tiny one takes at most 96 x 96 pixels."""
    assert "--source-resolution" in refusal(load(folder, source_resolution=128).encode, ["a"], [shown(SOURCES[0])])


def test_what_the_model_cannot_do_is_refused(folder):
    refusal(load, folder, rescale=True)
    refusal(load, folder, size=(64, 48))
    refusal(load(folder).encode, ["a"], [shown(*[picture(64, 64, seed) for seed in range(11)])])
