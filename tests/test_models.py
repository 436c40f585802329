"""Oracles for the model interface: guidance by hand, bitwise files, adapters that never leak."""

import json
import re
import shutil

import peft
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import models
import tiny
from models import STUDENT, Cond, ModelError

WIDTH, RANK, ALPHA = 32, 4, 12.0  # alpha / rank = 3: an adapter that loses its alpha is seen
PROMPTS = ["a photo of a red circle", 'a sign that says "CAT"', "a photo of two crosses"]


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
    folder = tmp_path_factory.mktemp("models") / "base"
    models.save_tiny(new_base(), folder)
    return folder


def random_state(model, seed, name=STUDENT):
    """Factors of adapter `name` with a B that is not zero."""
    rng = torch.Generator().manual_seed(seed)
    return {k: 0.3 * torch.randn(v.shape, generator=rng) for k, v in model.adapter_state(name).items()}


@pytest.fixture
def model(base):
    """The base with a student as it begins and a teacher that differs from it."""
    model = models.load_tiny(base)
    model.add_adapter(STUDENT, models.lora_config(RANK, ALPHA))
    model.add_adapter("teacher:text", models.lora_config(RANK, ALPHA), random_state(model, 1))
    return model


def inputs(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 24, 24, generator=rng), torch.tensor([0.9, 0.5, 0.1])


def velocity(model, adapter="unchanged"):
    """v of three fixed samples, without gradient; `adapter` selects one first."""
    x, t = inputs()
    with torch.no_grad():
        if adapter == "unchanged":
            return model.velocity(x, t, model.encode(PROMPTS))
        with model.adapter(adapter):
            return model.velocity(x, t, model.encode(PROMPTS))


# -------------------------------------------------------------------------------------------------- velocity
@torch.no_grad()
def test_guidance_is_the_two_branch_formula():
    model = new_base()
    x, t = inputs()
    cond, uncond = model.encode(PROMPTS), model.encode([""] * 3)
    v_cond, v_uncond = model.velocity(x, t, cond), model.velocity(x, t, uncond)
    assert (v_cond - v_uncond).abs().max() > 1e-3, "the prompt matters"
    for cfg in (4.5, 0.5, 0.0):
        guided = model.velocity(x, t, cond, uncond, cfg)
        torch.testing.assert_close(guided, v_uncond + cfg * (v_cond - v_uncond), atol=2e-5, rtol=1e-4)
    swapped = v_cond + 4.5 * (v_uncond - v_cond)  # planted: the branches in the other order
    assert not torch.allclose(model.velocity(x, t, cond, uncond, 4.5), swapped, atol=1e-3)


@torch.no_grad()
def test_without_guidance_the_empty_prompt_plays_no_part():
    model = new_base()
    x, t = inputs()
    cond = model.encode(PROMPTS)
    poison = Cond(cond.tokens * float("nan"), cond.pooled * float("nan"))
    assert torch.equal(model.velocity(x, t, cond, poison, 1.0), model.velocity(x, t, cond))


def test_guidance_without_an_empty_prompt_is_refused():
    model = new_base()
    x, t = inputs()
    with pytest.raises(ValueError, match=r"guidance scale 2\.5 needs the conditioning of the empty prompt"):
        model.velocity(x, t, model.encode(PROMPTS), cfg=2.5)


@torch.no_grad()
def test_time_is_one_for_all_or_one_a_sample_and_reaches_the_transformer_in_thousandths():
    model = new_base()
    x, t = inputs()
    cond = model.encode(PROMPTS)
    times = torch.tensor([900.0, 500.0, 100.0])
    given = {"encoder_hidden_states": cond.tokens, "pooled_projections": cond.pooled, "timestep": times}
    raw = model.transformer(hidden_states=x, **given).sample
    torch.testing.assert_close(model.velocity(x, t, cond), raw)
    assert torch.equal(model.velocity(x, 0.5, cond), model.velocity(x, torch.full((3,), 0.5), cond))
    assert (model.velocity(x, 0.5, cond) - raw).abs()[0].max() > 1e-4, "time matters"
    assert model.velocity(x, t, cond).shape == (3, *model.latent_shape) == (3, 3, 24, 24)


@torch.no_grad()
def test_every_sample_has_its_own_velocity():
    model = new_base()
    x, t = inputs()
    cond, uncond = model.encode(PROMPTS), model.encode([""] * 3)
    other_x, other_t = x.clone(), t.clone()
    other_x[1], other_t[1] = -x[1], 0.3
    other_cond = model.encode([PROMPTS[0], PROMPTS[2], PROMPTS[2]])
    before = model.velocity(x, t, cond, uncond, 3.0)
    after = model.velocity(other_x, other_t, other_cond, uncond, 3.0)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]])
    assert (before[1] - after[1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------- text and pixels
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


def test_prompts_are_encoded_without_gradient_and_tokens_with():
    model = new_base()
    assert not model.encode(PROMPTS).tokens.requires_grad
    model.encode_tokens(torch.tensor([tiny.tokenize(PROMPTS[0])])).pooled.sum().backward()
    assert model.text_encoder.word.weight.grad.abs().sum() > 0


def test_rows_of_a_conditioning_keep_tokens_and_pooled_together():
    cond = new_base().encode(PROMPTS)
    for index in (torch.tensor([2, 0]), slice(1, 3)):
        some = cond.rows(index)
        assert isinstance(some, Cond)
        assert torch.equal(some.tokens, cond.tokens[index]) and torch.equal(some.pooled, cond.pooled[index])


def test_decoding_and_latents_are_inverse_and_decoding_is_clamped():
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    latents = models.FlowModel.latents(images)
    assert latents.min() < -0.9 and latents.max() > 0.9, "pixels in [-1, 1]"
    torch.testing.assert_close(new_base().decode(latents), images)
    shown = new_base().decode(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0]).bfloat16())
    assert shown.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0] and shown.dtype == torch.float32


def test_the_time_grid_is_the_models_own():
    model = new_base()
    assert model.time_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0], "the tiny model has no shift"
    shifted = models.FlowModel(model.transformer, model.text_encoder, shift=3.0)
    assert shifted.time_grid(2).tolist() == [1.0, 0.75, 0.0]  # 3 * 0.5 / (1 + 2 * 0.5)


# ------------------------------------------------------------------------------------------------ base files
def test_a_new_model_is_a_function_of_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = new_base(0), new_base(0), new_base(1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(velocity(first), velocity(again)) and not torch.allclose(
        velocity(first), velocity(other)
    )


def test_the_default_model_has_the_documented_size():
    model = models.new_tiny(0)
    count = sum(p.numel() for p in model.trainable())
    assert f"{count / 1e6:.2f} M parameters" in models.new_tiny.__doc__
    assert model.latent_shape == (3, 24, 24)


def test_a_base_checkpoint_comes_back_bitwise_frozen_and_with_a_fingerprint(base, tmp_path):
    model = models.load_tiny(str(base))
    assert torch.equal(velocity(model), velocity(new_base()))
    assert not any(
        p.requires_grad for p in (*model.transformer.parameters(), *model.text_encoder.parameters())
    )
    assert model.source == str(base) and re.fullmatch("[0-9a-f]{16}", model.fingerprint)
    assert models.load_tiny(base).fingerprint == model.fingerprint
    models.save_tiny(new_base(1), tmp_path)
    assert models.load_tiny(tmp_path).fingerprint != model.fingerprint


def refusal(load, *arguments):
    """The message of the ModelError that a call gives; it is one line."""
    with pytest.raises(ModelError) as error:
        load(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def cut(file):
    """Leave half of a file, as a full disk or a broken download does."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BASE_FILES = [
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
]


@pytest.mark.parametrize("name", BASE_FILES)
def test_a_base_with_a_missing_or_truncated_file_is_refused_by_name(base, tmp_path, name):
    folder = shutil.copytree(base, tmp_path / "copy")
    cut(folder / name)
    message = refusal(models.load_tiny, folder)
    assert message.startswith(f"{folder}: not a readable base checkpoint ({name}: ")
    (folder / name).unlink()
    message = refusal(models.load_tiny, folder)
    assert message.startswith(f"{folder / name}: missing; ") and "--stage pretrain" in message


def test_a_base_of_another_width_or_with_foreign_json_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "copy")
    config = json.loads((folder / BASE_FILES[0]).read_text())
    for changed, file in (({**config, "num_layers": 1}, BASE_FILES[1]), ([1], BASE_FILES[0])):
        (folder / BASE_FILES[0]).write_text(json.dumps(changed))
        assert refusal(models.load_tiny, folder).startswith(
            f"{folder}: not a readable base checkpoint ({file}: "
        )


# -------------------------------------------------------------------------------------------------- adapters
def test_a_new_adapter_is_the_base_exactly_and_adapter_none_is_always_the_base(base, model):
    plain = velocity(models.load_tiny(base))
    assert torch.equal(velocity(model), plain), "B = 0"
    assert torch.equal(velocity(model, None), plain)
    assert (velocity(model, "teacher:text") - plain).abs().max() > 1e-3
    with torch.no_grad():
        for p in model.trainable():
            p.add_(0.3)
    assert (velocity(model) - plain).abs().max() > 1e-3, "the student has moved"
    assert torch.equal(velocity(model, None), plain), "the base has not"


def test_an_adapter_adds_alpha_over_rank_times_b_a_to_every_target(base, model):
    merged = models.load_tiny(base)
    modules = dict(merged.transformer.named_modules())
    state = model.adapter_state("teacher:text")
    touched = {key.rpartition(".lora_")[0] for key in state}
    with torch.no_grad():
        for name in touched:
            a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
            modules[name].weight += 3.0 * b @ a  # 12 / 4
    torch.testing.assert_close(velocity(merged), velocity(model, "teacher:text"), atol=1e-5, rtol=1e-4)
    targets = {name for name in modules if re.search(rf"attn\.({'|'.join(models.TARGETS)})$", name)}
    assert (
        touched == targets and len({name.split("attn.")[1] for name in touched}) == len(models.TARGETS) == 8
    )


def trained(model):
    return {name for name, p in model.transformer.named_parameters() if p.requires_grad}


def test_leaving_an_adapter_restores_the_student_whatever_happened(model):
    before, student = velocity(model), trained(model)
    assert student and all(".student." in name for name in student)
    with model.adapter("teacher:text"):
        pass
    assert torch.equal(velocity(model), before) and trained(model) == student
    with pytest.raises(ZeroDivisionError), model.adapter("teacher:text"):
        assert not torch.equal(velocity(model), before)
        raise ZeroDivisionError
    assert torch.equal(velocity(model), before) and trained(model) == student and torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), model.adapter(None):
        raise ZeroDivisionError
    assert torch.equal(velocity(model), before) and trained(model) == student


def test_an_unknown_adapter_is_refused_and_changes_nothing(model):
    before = velocity(model)
    with pytest.raises(
        KeyError, match=r"no adapter 'teacher:words'; there are \['student', 'teacher:text'\]"
    ):
        velocity(model, "teacher:words")
    assert torch.equal(velocity(model), before)


def test_without_a_student_the_base_is_restored(base):
    model = models.load_tiny(base)
    plain = velocity(model)
    assert torch.equal(velocity(model, None), plain), "no adapter at all"
    config = models.lora_config(RANK, ALPHA)
    model.add_adapter("a", config)
    model.add_adapter("a2", config, random_state(model, 2, "a"))
    assert not torch.equal(velocity(model, "a2"), plain) and torch.equal(velocity(model), plain)


def student_loss(model, seed=3):
    x, t = inputs(seed)
    return model.velocity(x, t, model.encode(PROMPTS)).square().sum()


def test_a_teacher_between_forward_and_backward_costs_the_student_no_gradient(model):
    student_loss(model).backward()
    expected = [p.grad.clone() for p in model.trainable()]
    assert sum(g.abs().sum() for g in expected) > 0
    for p in model.trainable():
        p.grad = None
    loss = student_loss(model)
    with model.adapter("teacher:text"):
        x, t = inputs()
        assert not model.velocity(x, t, model.encode(PROMPTS)).requires_grad
    with model.adapter(None):
        pass
    loss.backward()
    for p, wanted in zip(model.trainable(), expected, strict=True):
        assert p.grad is not None and torch.equal(p.grad, wanted)
    others = [p for name, p in model.transformer.named_parameters() if ".student." not in name]
    assert all(p.grad is None for p in (*others, *model.text_encoder.parameters())), "nobody else learns"


def test_planted_a_teacher_that_stays_selected_takes_the_gradient_away(model):
    """The trap itself: PEFT's own `set_adapter`, as one would write it without the context."""
    student, loss = model.trainable(), student_loss(model)
    model.transformer.set_adapter("teacher:text")
    loss.backward()
    assert all(p.grad is None for p in student)


def test_the_student_trains_alone_and_without_one_everything_does(base, model):
    assert {id(p) for p in model.trainable()} == {
        id(p) for name, p in model.transformer.named_parameters() if ".student.weight" in name
    }
    assert len(model.trainable()) == len(model.adapter_state())
    fresh = new_base()
    assert len(fresh.trainable()) == len([*fresh.transformer.parameters(), *fresh.text_encoder.parameters()])


def test_an_adapters_state_is_a_copy_without_gradient(model):
    state = model.adapter_state()
    assert state and not any(value.requires_grad for value in state.values())
    with torch.no_grad():
        for p in model.trainable():
            p.add_(1.0)
    assert all(torch.equal(model.adapter_state()[key], value + 1.0) for key, value in state.items())


def test_a_state_that_does_not_fill_the_adapter_is_refused(model):
    config, state = models.lora_config(RANK, ALPHA), random_state(model, 4)
    first = next(iter(state))
    lacking = {key: value for key, value in state.items() if key != first}
    assert re.match(
        r"adapter more: there is no value for .*lora_", refusal(model.add_adapter, "more", config, lacking)
    )
    foreign = state | {first.replace("to_", "go_"): state[first]}
    message = refusal(model.add_adapter, "most", config, foreign)
    assert re.match(r"adapter most: the model has no place for .*go_", message)


# ------------------------------------------------------------------------------------------- adapters on disk
@pytest.fixture
def saved(model, tmp_path):
    """A folder with the teacher's adapter."""
    config = models.lora_config(RANK, ALPHA)
    models.save_adapter(tmp_path / "adapter", model.adapter_state("teacher:text"), config, model)
    return tmp_path / "adapter"


def test_an_adapter_comes_back_bitwise_on_a_fresh_base(base, model, saved):
    fresh = models.load_tiny(base)
    state, config = models.load_adapter(str(saved), fresh)
    wanted = model.adapter_state("teacher:text")
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert (config.r, config.lora_alpha) == (RANK, ALPHA)
    fresh.add_adapter(STUDENT, config, state)
    assert torch.equal(velocity(fresh), velocity(model, "teacher:text"))
    again, _ = models.load_adapter(saved, fresh)  # also where the model already carries adapters
    assert all(torch.equal(again[key], wanted[key]) for key in wanted)


def test_the_files_are_pefts_own(base, model, saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, ALPHA, "LORA")
    assert config["base_model_name_or_path"] == "base", "a name, not somebody's folder"
    assert set(config["target_modules"]) == set(models.TARGETS)
    with safe_open(saved / "adapter_model.safetensors", "pt") as file:
        assert all(re.fullmatch(r"base_model\.model\..*\.lora_[AB]\.weight", key) for key in file.keys())  # noqa: SIM118
        assert file.metadata() == {"format": "pt", "base": model.fingerprint}
    # PEFT reads it onto the same transformer and computes the same
    wrapped = peft.PeftModel.from_pretrained(models.load_tiny(base).transformer, str(saved))
    x, t = inputs()
    cond = model.encode(PROMPTS)
    with torch.no_grad():
        v = wrapped(hidden_states=x, encoder_hidden_states=cond.tokens, pooled_projections=cond.pooled,
                    timestep=t * 1000, return_dict=False)[0]  # fmt: skip
    torch.testing.assert_close(v, velocity(model, "teacher:text"))


def rewrite(folder, change, metadata=None):
    """Pass the tensors of an adapter file through `change`; without `metadata` the file forgets its base."""
    file = folder / "adapter_model.safetensors"
    tensors = change(safetensors.torch.load_file(file))
    safetensors.torch.save_file(tensors, file, metadata=metadata)


def test_a_missing_or_broken_adapter_file_is_refused_by_name(base, saved):
    model = models.load_tiny(base)
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    whole = weights.read_bytes()
    cut(weights)
    assert refusal(models.load_adapter, saved, model).startswith(f"{weights}: not a readable adapter (")
    weights.unlink()
    assert refusal(models.load_adapter, saved, model).startswith(
        f"{weights}: missing; an adapter is a folder"
    )
    weights.write_bytes(whole)
    cut(config)
    assert refusal(models.load_adapter, saved, model).startswith(f"{weights}: not a readable adapter (")
    config.unlink()
    assert refusal(models.load_adapter, saved, model).startswith(f"{config}: missing; an adapter is a folder")


def test_an_adapter_of_another_base_is_refused_by_its_fingerprint(model, saved, tmp_path):
    models.save_tiny(new_base(1), tmp_path / "stranger")
    stranger = models.load_tiny(tmp_path / "stranger")
    message = refusal(models.load_adapter, saved, stranger)
    assert message == (
        f"{saved / 'adapter_model.safetensors'}: trained on another base ({model.fingerprint}) "
        f"than {tmp_path / 'stranger'} ({stranger.fingerprint})"
    )
    rewrite(saved, dict)  # an adapter from elsewhere names no base: shapes are all there is to check
    assert len(models.load_adapter(saved, stranger)[0]) == len(model.adapter_state())


def test_an_adapter_of_another_rank_width_or_architecture_is_refused_by_tensor(base, model, saved, tmp_path):
    file = re.escape(str(saved / "adapter_model.safetensors"))
    models.save_tiny(new_base(0, width=64), tmp_path / "wide")
    rewrite(saved, dict)
    message = refusal(models.load_adapter, saved, models.load_tiny(tmp_path / "wide"))
    assert re.match(rf"{file}: .*lora_A\.weight is \(4, 32\), and .*wide needs \(4, 64\)$", message)

    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    message = refusal(models.load_adapter, saved, models.load_tiny(base))
    assert re.match(rf"{file}: .*lora_A\.weight is \(4, 32\), and .*base needs \(8, 32\)$", message)
    (saved / "adapter_config.json").write_text(json.dumps(config))

    def transposed(tensors):
        key = next(k for k in tensors if "lora_B" in k)
        return tensors | {key: tensors[key].T.contiguous()}

    whole = (saved / "adapter_model.safetensors").read_bytes()
    rewrite(saved, transposed)
    message = refusal(models.load_adapter, saved, models.load_tiny(base))
    assert re.match(rf"{file}: .*lora_B\.weight is \(4, 32\), and .*base needs \(32, 4\)$", message)
    for name in (
        "transformer_blocks.9.attn.to_q",
        "norm_out",
    ):  # one that is not there, one that is no linear map
        (saved / "adapter_model.safetensors").write_bytes(whole)
        rewrite(
            saved,
            lambda tensors, n=name: tensors | {f"base_model.model.{n}.lora_A.weight": torch.ones(4, 32)},
        )
        message = refusal(models.load_adapter, saved, models.load_tiny(base))
        assert re.match(rf"{file}: adapts {re.escape(name)}, which .*base does not have$", message)


def test_saving_does_not_write_where_the_base_lies(model, saved):
    text = "".join(f.read_text() for f in saved.glob("*.json"))
    assert str(model.source) not in text


def test_the_lora_of_a_new_adapter_is_gaussian_in_a_and_zero_in_b(base):
    torch.manual_seed(0)
    model = models.load_tiny(base)
    model.add_adapter(STUDENT, models.lora_config(16, 32.0))
    state = model.adapter_state()
    a = torch.cat([value.flatten() for key, value in state.items() if "lora_A" in key])
    assert all((value == 0).all() for key, value in state.items() if "lora_B" in key)
    # PEFT draws A from N(0, (1/r)^2); the sample sd of n draws has standard error sd / sqrt(2n)
    assert abs(a.std().item() - 1 / 16) < 4 / 16 / (2 * a.numel()) ** 0.5
    assert models.lora_config(2, 4.0, ["to_q"]).target_modules == {"to_q"}
