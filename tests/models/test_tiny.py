"""Oracles for the tiny worlds' models: encoding and pixels by hand, files that come back bitwise."""

import re

import pytest
import torch

from models import lora
from models.experts import STUDENT
from models.tiny import load_tiny, new_tiny
from tests.helpers.checks import gap, refusal, shown
from tests.helpers.runs import same

WIDTH = 32


def new_base(seed=0, qwen=False):
    return new_tiny(seed, width=WIDTH, layers=2, qwen=qwen)


@pytest.fixture(params=[False, True], ids=["tiny", "tiny-qwen"])
def qwen(request):
    return request.param


@pytest.fixture
def folder(qwen, tmp_path):
    model = new_base(qwen=qwen)
    model.save_full(tmp_path / "base", model.transformer.state_dict())
    return tmp_path / "base"


PICTURES = [shown(one) for one in torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(3))]
PROMPTS = ["a photo of a red circle", "a photo of two green crosses", 'a sign that says "CAT"']


@torch.no_grad()
def velocity(model, prompts=PROMPTS):
    """v of three fixed samples; an editor's of its sources."""
    x = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = model.encode(prompts, PICTURES if hasattr(model, "rescale") else None)
    return model.velocity(x, torch.tensor([0.9, 0.5, 0.1]), cond)


def test_text_is_one_embedding_a_token_with_its_mean_or_its_mask_and_a_source_is_its_pixels(qwen):
    model = new_base(qwen=qwen)
    cond, ids = model.encode(PROMPTS), torch.tensor([model.tokenize(p) for p in PROMPTS])
    assert torch.equal(cond.tokens, model.text_encoder.word.weight[ids] + model.text_encoder.place.weight)
    assert cond.sources == model.encode(PROMPTS, [()] * 3).sources == ()
    if qwen:
        assert cond.pooled is None and torch.equal(cond.mask, ids > 0) and len(set(cond.mask.sum(1).tolist())) > 1
        pixels = torch.stack([picture.pixels() for (picture,) in PICTURES])
        assert torch.equal(model.encode(PROMPTS, PICTURES).sources[0], pixels * 2 - 1)
    else:
        torch.testing.assert_close(cond.pooled, cond.tokens.mean(1))
        refusal(model.encode, PROMPTS, PICTURES)
    with pytest.raises(ValueError, match="no word 'dragon'"):
        model.encode(["a photo of a dragon"])
    assert not cond.tokens.requires_grad
    model.encode_tokens(ids).tokens.sum().backward()
    assert model.text_encoder.word.weight.grad.abs().sum() > 0, "pretraining learns the words"


def test_pixels_are_latents_in_minus_1_to_1_and_back_clamped():
    model, images = new_base(), torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.decode(model.latents(images)), images)
    drawn = model.decode(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0]).bfloat16())
    assert drawn.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0] and drawn.dtype == torch.float32


def test_a_new_model_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(qwen):
    state = torch.get_rng_state()
    first, again, other = (new_base(seed, qwen) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(velocity(first), velocity(again)) and gap(velocity(first), velocity(other)) > 1e-2


def test_before_there_is_a_student_all_that_is_read_trains_the_text_encoder_included(folder, qwen):
    model = new_base(qwen=qwen)
    names = {f"{part}.{n}" for part in ("transformer", "text_encoder")
             for n, _ in getattr(model, part).named_parameters()}  # fmt: skip
    unread = {n for n in names if qwen and re.search(r"blocks\.1\.(attn\.to_add_out|txt_mlp)\.", n)}
    assert set(model.trainable()) == names - unread and bool(unread) == qwen
    for start in (lambda m: m.add_adapter(STUDENT, lora.lora_config(4, 8.0)), lambda m: m.train_fully()):
        model = load_tiny(folder)
        start(model)
        found = {id(p) for p in model.trainable().values()}
        assert found and found <= {id(p) for p in model.transformer.parameters() if p.requires_grad}
        assert not any(p.requires_grad for p in model.text_encoder.parameters()), "it is trained in pretraining only"


def test_a_base_checkpoint_comes_back_bitwise_frozen_and_with_a_fingerprint(folder, qwen, tmp_path):
    model = load_tiny(folder)
    assert torch.equal(velocity(model), velocity(new_base(qwen=qwen)))
    assert not any(p.requires_grad for p in (*model.transformer.parameters(), *model.text_encoder.parameters()))
    assert model.source == str(folder) and re.fullmatch("[0-9a-f]{16}", model.fingerprint)
    averaged = {key: 2 * value for key, value in model.transformer.state_dict().items()}
    model.save_full(tmp_path, averaged)  # the state that is given
    again = load_tiny(tmp_path)
    assert same(dict(again.transformer.state_dict()), averaged) and again.fingerprint != model.fingerprint
    assert same(dict(again.text_encoder.state_dict()), dict(model.text_encoder.state_dict()))
