"""Oracles for the concrete models: the tiny ones by hand, SD3.5 against the stock pipeline, in parts and whole.

Qwen-Image's are in test_qwen.py.
"""

import fnmatch
import re
import shutil

import pytest
import safetensors.torch
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

import sde
import settings
from models import load as models
from models import lora as adapters
from models.flow import STUDENT
from models.lora import ModelError
from tests.conftest import same
from tests.helpers import sd3
from tiny import drawings as tiny
from tiny import edits as tiny_edit

WIDTH = 32
PROMPTS = ["a photo of a red circle", 'a sign that says "CAT"', "a photo of two crosses"]
# Findings, 2: ten steps with shift 3, on the grid of a thousand training times.
TEN_STEPS = [1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.009, 0]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def new_base(seed=0, width=WIDTH):
    return models.new_tiny(seed, width=width, layers=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("models") / "base", new_base()
    model.save_full(folder, model.transformer.state_dict())
    return folder


@torch.no_grad()
def velocity(model):
    """v of three fixed samples and prompts."""
    x = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return model.velocity(x, torch.tensor([0.9, 0.5, 0.1]), model.encode(PROMPTS))


def gap(a, b):
    return (a - b).abs().max().item()


def refusal(call, *arguments, **more):
    """The message of the ModelError that a call gives; it is one line."""
    with pytest.raises(ModelError) as error:
        call(*arguments, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def cut(file):
    """Leave half of a file, as a full disk or a broken download does."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# ------------------------------------------------------------------------------------- the tiny model: text, pixels
def test_encoding_has_one_embedding_a_token_and_their_mean():
    model = new_base()
    cond = model.encode(PROMPTS)
    assert cond.tokens.shape == (3, tiny.MAX_TOKENS, WIDTH) and cond.pooled.shape == (3, WIDTH)
    ids = torch.tensor(tiny.tokenize(PROMPTS[1]))
    expected = model.text_encoder.word.weight[ids] + model.text_encoder.place.weight
    torch.testing.assert_close(cond.tokens[1], expected.detach())
    torch.testing.assert_close(cond.pooled, cond.tokens.sum(1) / tiny.MAX_TOKENS)
    with pytest.raises(ValueError, match="no word 'dragon'"):
        model.encode(["a photo of a dragon"])


@pytest.mark.parametrize("world", ["tiny", "sd35"])
def test_a_picture_for_a_model_that_draws_only_is_refused(folder, world):
    model = new_base() if world == "tiny" else load(folder)
    assert "draws and does not edit; give " in refusal(model.encode, PROMPTS[:1], [torch.rand(3, 24, 24)])
    assert model.encode(PROMPTS[:2], [None, None]).source is None, "no picture is no edit"


def test_prompts_are_encoded_without_gradient_and_tokens_with():
    model = new_base()
    assert not model.encode(PROMPTS).tokens.requires_grad
    model.encode_tokens(torch.tensor([tiny.tokenize(PROMPTS[0])])).pooled.sum().backward()
    assert model.text_encoder.word.weight.grad.abs().sum() > 0


def test_decoding_and_latents_are_inverse_and_decoding_is_clamped():
    model, images = new_base(), torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    latents = model.latents(images)
    assert latents.min() < -0.9 and latents.max() > 0.9, "pixels in [-1, 1]"
    torch.testing.assert_close(model.decode(latents), images)
    shown = model.decode(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0]).bfloat16())
    assert shown.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0] and shown.dtype == torch.float32


def test_the_tiny_models_grid_has_no_shift():
    assert new_base().time_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


# --------------------------------------------------------------------------------------- the tiny model: its files
def test_a_new_model_is_a_function_of_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = new_base(0), new_base(0), new_base(1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(velocity(first), velocity(again)) and gap(velocity(first), velocity(other)) > 1e-2


def test_the_default_model_has_the_documented_size():
    model = models.new_tiny(0)
    count = sum(p.numel() for p in model.trainable().values())
    assert f"{count / 1e6:.2f} M parameters" in models.new_tiny.__doc__
    assert model.latent_shape == (3, 24, 24)


def test_before_there_is_a_student_all_of_the_tiny_model_trains_the_text_encoder_included(base):
    model = new_base()
    names = {f"{part}.{n}" for part in ("transformer", "text_encoder")
             for n, _ in getattr(model, part).named_parameters()}  # fmt: skip
    assert set(model.trainable()) == names and {"text_encoder.word.weight", "text_encoder.place.weight"} < names
    assert model.trainable()["text_encoder.word.weight"] is model.text_encoder.word.weight
    for start in (lambda m: m.add_adapter(STUDENT, adapters.lora_config(4, 8.0)), lambda m: m.train_fully()):
        model = models.load_tiny(base)
        start(model)
        found = {id(p) for p in model.trainable().values()}
        assert found == {id(p) for p in model.transformer.parameters() if p.requires_grad} and found
        assert not any(p.requires_grad for p in model.text_encoder.parameters()), "it is trained in pretraining only"


def test_a_base_checkpoint_comes_back_bitwise_frozen_and_with_a_fingerprint(base, tmp_path):
    model = models.load_tiny(base)
    assert torch.equal(velocity(model), velocity(new_base()))
    assert not any(p.requires_grad for p in (*model.transformer.parameters(), *model.text_encoder.parameters()))
    assert model.source == str(base) and re.fullmatch("[0-9a-f]{16}", model.fingerprint)
    assert models.load_tiny(base).fingerprint == model.fingerprint
    other = new_base(1)
    other.save_full(tmp_path, other.transformer.state_dict())
    assert models.load_tiny(tmp_path).fingerprint != model.fingerprint


def test_what_is_saved_is_the_state_that_is_given(base, tmp_path):
    model = models.load_tiny(base)
    averaged = {key: 2 * value for key, value in model.transformer.state_dict().items()}
    model.save_full(tmp_path, averaged)
    again = models.load_tiny(tmp_path)
    assert same(dict(again.transformer.state_dict()), averaged)
    assert same(dict(again.text_encoder.state_dict()), dict(model.text_encoder.state_dict()))


TINY_FILES = {
    "transformer/config.json": ("{folder}/transformer: not a readable transformer (", "transformer: not a readable"),
    "transformer/diffusion_pytorch_model.safetensors": ("{folder}/transformer: not a readable transformer (",) * 2,
    "text_encoder/model.safetensors": ("{folder}/text_encoder/model.safetensors: not readable (", "--stage pretrain"),
}


@pytest.mark.parametrize("name", TINY_FILES)
def test_a_tiny_base_with_a_missing_or_truncated_file_is_refused_by_name(base, tmp_path, name):
    folder, (broken, missing) = shutil.copytree(base, tmp_path / "copy"), TINY_FILES[name]
    cut(folder / name)
    assert refusal(models.load_tiny, folder).startswith(broken.format(folder=folder))
    (folder / name).unlink()
    message = refusal(models.load_tiny, folder)
    assert str((folder / name).parent) in message and missing.format(folder=folder) in message


def test_a_text_encoder_of_another_width_is_refused(base, tmp_path):
    folder, wide = shutil.copytree(base, tmp_path / "copy"), new_base(width=64)
    wide.save_full(tmp_path / "wide", wide.transformer.state_dict())
    shutil.copytree(tmp_path / "wide" / "text_encoder", folder / "text_encoder", dirs_exist_ok=True)
    assert refusal(models.load_tiny, folder).startswith(f"{folder}/text_encoder/model.safetensors: not readable (")


# ------------------------------------------------------------------------------------ SD3.5 against the stock pipeline
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sd3.build_sd35(tmp_path_factory.mktemp("sd35"))


def load(folder, **more):
    return models.load_sd35(folder, **{"resolution": 64, **more})


@pytest.fixture(scope="module")
def stock(folder):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the text encoders: "load", then the prompts."""
    seen, read = [], models._read_text_encoders

    def watched(*arguments):
        pipe = read(*arguments)
        seen.append("load")
        plain = pipe.encode_prompt
        pipe.encode_prompt = lambda prompt, *rest, **more: (seen.append(prompt), plain(prompt, *rest, **more))[1]
        return pipe

    monkeypatch.setattr(models, "_read_text_encoders", watched)
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
    assert gap(found, expected) < 1e-5 * max(1, expected.abs().max().item())
    assert gap(draw(model, x, prompts, 5, 4.4), expected) > 1e-2, "guidance matters"
    with model.adapter(None):
        assert (gap(draw(model, x, prompts, 5, 4.5), expected) > 1e-2) == trained, "so does the adapter"
    shown = pipe(prompts, latents=x.clone(), **{**options, "output_type": "pt"}).images
    torch.testing.assert_close(model.decode(found), shown, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------ loading
def given(folder, line=""):
    return settings.parse(["--model", str(folder), "--resolution", "64", *line.split()])[0]


def test_a_run_loads_the_model_that_its_settings_describe(folder, base):
    s = given(folder, "--precision float32 --text-length 16 --no-gradient-checkpointing")
    model = models.load(s)
    assert isinstance(model, models.SD35Model) and model.latent_shape == (16, 8, 8)
    assert (model.precision, model.text_length, model.source) == ("float32", 16, str(folder))
    assert not model.transformer.is_gradient_checkpointing
    assert {p.dtype for p in model.transformer.parameters()} == {torch.float32}
    model = models.load(given(folder, "--resolution 96"))  # the defaults of F App. A
    assert (model.precision, model.latent_shape, model.text_length) == ("bfloat16", (16, 12, 12), 256)
    assert {p.dtype for p in model.transformer.parameters()} == {torch.bfloat16}
    assert model.transformer.is_gradient_checkpointing and not any(
        p.requires_grad for p in model.transformer.parameters()
    )
    assert re.fullmatch("[0-9a-f]{16}", model.fingerprint) and model.fingerprint == load(folder).fingerprint
    model = models.load(given(base, "--preset tiny"))
    assert isinstance(model, models.TinyModel) and torch.equal(velocity(model), velocity(new_base()))


def test_a_folder_of_the_other_world_is_refused_with_the_way_out(folder, base):
    message = f"{folder}: a diffusers pipeline, not a base of the tiny world: leave --preset tiny out"
    assert refusal(models.load, given(folder, "--preset tiny")) == message
    message = refusal(models.load, given(base))
    assert message.startswith(f"{base}/model_index.json: missing; --model must be a pipeline")
    assert message.endswith("; a base of the tiny world needs --preset tiny or tiny-qwen")


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "tokenizer_2", "tokenizer_3", "vae"])
def test_a_base_that_lacks_a_part_is_refused_before_anything_is_trained(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / part)
    assert refusal(load, copy) == f"{copy / part}: missing; the base must be a pipeline in diffusers' layout"


def edit_index(folder, text):
    (folder / "model_index.json").write_text(text)


BROKEN = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json: missing; --model must be a pipeline"),
    "half an index": (lambda f: cut(f / "model_index.json"), r"model_index.json: not readable \(.+\); --model must be"),
    "a list": (lambda f: edit_index(f, "[]"), r"model_index.json: not readable \(.+\); --model must be"),
    "another pipeline": (
        lambda f: edit_index(f, '{"_class_name": "FluxPipeline"}'),
        "model_index.json: a FluxPipeline; the known ones are StableDiffusion3Pipeline, QwenImagePipeline, Qwen.*$",
    ),
    "no class": (lambda f: edit_index(f, "{}"), "model_index.json: a None; the known ones are"),
    "no transformer": (lambda f: shutil.rmtree(f / "transformer"), "transformer: not a readable transformer"),
    "a broken scheduler": (
        lambda f: cut(f / "scheduler/scheduler_config.json"),
        r"scheduler: not readable as FlowMatchEulerDiscreteScheduler \(",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_base_that_cannot_be_read_is_refused_in_one_line(folder, tmp_path, fault):
    copy, (spoil, reason) = shutil.copytree(folder, tmp_path / "copy"), BROKEN[fault]
    spoil(copy)
    message = refusal(models.load, given(copy))
    assert re.match(f"{copy}/{reason}", message) and "--preset tiny" not in message


def pickled(file, name):
    torch.save(safetensors.torch.load_file(file), file.with_name(name))
    file.unlink()


def drop(file):
    """Take the last tensor out of a file."""
    tensors = safetensors.torch.load_file(file)
    tensors.popitem()
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


LATE = {
    "half a VAE": lambda f: cut(f / "vae/diffusion_pytorch_model.safetensors"),
    "a pickled VAE": lambda f: pickled(f / "vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "no text encoder": lambda f: shutil.rmtree(f / "text_encoder_2"),
    "half a text encoder": lambda f: cut(f / "text_encoder_3/model.safetensors"),
    "a text encoder that lacks a tensor": lambda f: drop(f / "text_encoder_3/model.safetensors"),
    "a VAE that lacks a tensor": lambda f: drop(f / "vae/diffusion_pytorch_model.safetensors"),
    "a pickled text encoder": lambda f: pickled(f / "text_encoder/model.safetensors", "pytorch_model.bin"),
    "half a tokenizer": lambda f: cut(f / "tokenizer/tokenizer.json"),
}


@pytest.mark.parametrize("fault", LATE)
def test_parts_that_are_read_when_they_are_needed_are_refused_in_one_line_then(folder, tmp_path, fault):
    copy = shutil.copytree(folder, tmp_path / "copy")
    LATE[fault](copy)
    model = load(copy)
    if "VAE" in fault:
        message = refusal(model.decode, torch.zeros(1, 16, 8, 8))
        assert message.startswith(f"{copy}/vae: not readable as AutoencoderKL (")
    else:
        message = refusal(model.encode, PROMPTS)
        assert re.match(f"{copy}(/text_encoder[_23]*)?: (missing|not readable|its tokenizers are not)", message)
        assert model.known == {}


def test_the_largest_resolution_is_the_position_embeddings_and_more_is_refused(folder):
    # 12 patches of 2 latents of 8 pixels
    model = load(folder, resolution=192)
    assert model.latent_shape == (16, 24, 24) and velocity(model).shape == (3, 16, 24, 24)
    message = refusal(load, folder, resolution=208)
    assert message == f"{folder}: --resolution 208 is more than the model's largest, 192"


def test_rescaled_guidance_is_for_qwen_image_alone(folder, base, qwen_base, monkeypatch):
    for preset, where in (("flow-opd", folder), ("tiny", base)):
        monkeypatch.setattr(models, "load_sd35", lambda *_: pytest.fail("it was read before it was refused"))
        with pytest.raises(settings.SettingsError) as error:
            models.load(given(where, f"--preset {preset} --cfg-rescale"))
        assert str(error.value) == f"--cfg-rescale is Qwen-Image's guidance, and {where} is none: leave it out"
    for flag, expected in (("--cfg-rescale", True), ("--no-cfg-rescale", False)):
        model = models.load(given(qwen_base, f"--preset tiny-qwen --resolution 24 {flag}"))
        assert isinstance(model, models.TinyQwenModel) and model.rescale is expected


# ------------------------------------------------------------------------------------------ the tiny-qwen world's model
ASKED = ["a red circle", "make the circle blue", "add a cross"]


@pytest.fixture(scope="module")
def qwen_base(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("models") / "qwen-base", new_qwen()
    model.save_full(folder, model.transformer.state_dict())
    return folder


def new_qwen(seed=0):
    return models.new_tiny(seed, width=WIDTH, layers=2, qwen=True)


def tiny_pictures(rows):
    return list(torch.rand(rows, 3, 24, 24, generator=torch.Generator().manual_seed(3)))


def known_prompts(rows):
    """Prompts of the world's own, of different lengths."""
    found = {len(text.split()): text for text in (p.text for p in tiny_edit.make_prompts("edit", "train", 60))}
    assert len(found) >= rows
    return [found[length] for length in sorted(found)][:rows]


def test_the_tiny_qwen_models_text_has_a_mask_and_its_sources_are_pixels(qwen_base):
    model, prompts, images = models.load_tiny(qwen_base), known_prompts(3), tiny_pictures(3)
    cond = model.encode(prompts, images)
    ids = torch.tensor([tiny_edit.tokenize(p) for p in prompts])
    assert torch.equal(cond.mask, ids > 0) and len(set(cond.mask.sum(1).tolist())) == 3
    expected = model.text_encoder.word.weight[ids] + model.text_encoder.place.weight
    assert torch.equal(cond.tokens, expected) and cond.pooled is None
    assert torch.equal(cond.source, torch.stack(images) * 2 - 1)
    assert model.encode(prompts).source is None and model.encode(prompts, [None] * 3).source is None
    for wrong in ([images[0], None, images[2]], [image[:, :20] for image in images]):
        assert "source pictures are 24 x 24 pixels, one an edit" in refusal(model.encode, prompts, wrong)
    fresh = new_qwen()
    fresh.encode_tokens(ids, images).tokens.sum().backward()
    assert fresh.text_encoder.word.weight.grad.abs().sum() > 0, "pretraining learns the words"


@torch.no_grad()
def test_the_tiny_qwen_model_reads_the_source_the_text_and_no_padding(qwen_base):
    model, prompts, images = models.load_tiny(qwen_base), known_prompts(3), tiny_pictures(3)
    x, t = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.5, 0.1])
    cond = model.encode(prompts, images)
    found = model.velocity(x, t, cond)
    assert gap(model.velocity(x, t, model.encode(prompts)), found) > 1e-3, "with and without a source"
    assert gap(model.velocity(x, t, cond._replace(source=cond.source.flip(0))), found) > 1e-3
    assert gap(model.velocity(x, t, model.encode(prompts[::-1], images)), found) > 1e-3
    loud = cond._replace(tokens=cond.tokens + 50.0 * ~cond.mask[..., None])
    assert gap(model.velocity(x, t, loud), found) < 1e-5
    again = new_qwen()
    assert torch.equal(again.velocity(x, t, again.encode(prompts, images)), found), "made again, or saved and read"
    alone = model.velocity(x[1:2], 0.5, cond.rows(slice(1, 2)))
    assert gap(alone, found[1:2]) < 1e-5


def test_the_tiny_qwen_models_unread_parameters_do_not_train(qwen_base):
    model = models.load_tiny(qwen_base)
    model.train_fully()
    model.velocity(torch.randn(2, 3, 24, 24), 0.5, model.encode(known_prompts(2), tiny_pictures(2))).sum().backward()
    got = {name for name, p in model.transformer.named_parameters() if p.grad is not None}
    assert set(model.trainable()) == got and len(got) < len(dict(model.transformer.named_parameters()))
    fresh = new_qwen()
    assert not [n for n in fresh.trainable() if "transformer_blocks.1.txt_mlp" in n], "nor in pretraining"
    assert {"text_encoder.word.weight", "text_encoder.place.weight"} < set(fresh.trainable())


# What SD3.5 Medium's repository holds, and whether a run needs it.
HUB_FILES = {
    "model_index.json": True, "README.md": False, "LICENSE.md": False, "sd3.5_medium.safetensors": False,
    "scheduler/scheduler_config.json": True, "tokenizer/merges.txt": True, "tokenizer_2/vocab.json": True,
    "tokenizer_3/spiece.model": True, "text_encoder/config.json": True, "text_encoder/model.safetensors": True,
    "text_encoder/model.fp16.safetensors": False, "text_encoder_2/model.safetensors": True,
    "text_encoder_3/model-00001-of-00002.safetensors": True, "text_encoder_3/model.safetensors.index.json": True,
    "text_encoder_3/model.fp16-00001-of-00002.safetensors": False, "text_encoders/clip_g.safetensors": False,
    "text_encoders/t5xxl_fp16.safetensors": False, "transformer/config.json": True,
    "transformer/diffusion_pytorch_model.safetensors": True,
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": True,
    "transformer/diffusion_pytorch_model.safetensors.index.json": True,
    "transformer/diffusion_pytorch_model.fp16.safetensors": False, "vae/config.json": True,
    "vae/diffusion_pytorch_model.safetensors": True, "vae/diffusion_pytorch_model.fp16.safetensors": False,
    # and what a Qwen-Image-Edit's has besides
    "tokenizer/vocab.json": True, "tokenizer/added_tokens.json": True, "processor/preprocessor_config.json": True,
    "text_encoder/model-00001-of-00004.safetensors": True, "processor/video_preprocessor_config.json": True,
    "transformer/diffusion_pytorch_model-00009-of-00009.safetensors": True, "assets/showcase.png": False,
}  # fmt: skip


def wanted(name):
    return any(fnmatch.fnmatch(name, pattern) for pattern in models.BASE_FILES)  # as the Hub's client filters


def test_what_is_fetched_of_a_repository_is_what_a_run_needs_and_no_more(folder, tmp_path):
    assert {name: wanted(name) for name in HUB_FILES} == HUB_FILES
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        if file.is_file() and wanted(str(name)):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, tmp_path / name)
    part, whole = load(tmp_path), load(folder)
    assert torch.equal(velocity(part), velocity(whole))
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(part.decode(x), whole.decode(x))
