"""Oracles for the tiny worlds' models: encoding and pixels by hand, files that come back bitwise."""

import re

import pytest
import torch

from models import lora
from models.experts import STUDENT
from models.tiny import load_tiny, new_tiny
from tests.helpers.checks import gap, refusal, shown
from tests.helpers.runs import same
from tiny import drawings as tiny
from tiny import edits as tiny_edit

WIDTH = 32
PROMPTS = ["a photo of a red circle", 'a sign that says "CAT"', "a photo of two crosses"]


def new_base(seed=0, width=WIDTH, qwen=False):
    return new_tiny(seed, width=width, layers=2, qwen=qwen)


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


def test_a_picture_for_a_model_that_draws_only_is_refused():
    model = new_base()
    refusal(model.encode, PROMPTS[:1], [shown(torch.rand(3, 24, 24))])
    assert model.encode(PROMPTS[:2], [None, None]).source is None, "no picture is no edit"


@pytest.mark.parametrize("qwen", [False, True])
def test_prompts_are_encoded_without_gradient_and_tokens_with(qwen):
    model = new_base(qwen=qwen)
    assert not model.encode(PROMPTS[:1]).tokens.requires_grad
    model.encode_tokens(torch.tensor([model.tokenize(PROMPTS[0])])).tokens.sum().backward()
    assert model.text_encoder.word.weight.grad.abs().sum() > 0, "pretraining learns the words"


# --------------------------------------------------------------------------------------- the tiny model: its files
def test_a_new_model_is_a_function_of_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = new_base(0), new_base(0), new_base(1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(velocity(first), velocity(again)) and gap(velocity(first), velocity(other)) > 1e-2


def test_before_there_is_a_student_all_of_the_tiny_model_trains_the_text_encoder_included(base):
    model = new_base()
    names = {f"{part}.{n}" for part in ("transformer", "text_encoder")
             for n, _ in getattr(model, part).named_parameters()}  # fmt: skip
    assert set(model.trainable()) == names and {"text_encoder.word.weight", "text_encoder.place.weight"} < names
    assert model.trainable()["text_encoder.word.weight"] is model.text_encoder.word.weight
    for start in (lambda m: m.add_adapter(STUDENT, lora.lora_config(4, 8.0)), lambda m: m.train_fully()):
        model = load_tiny(base)
        start(model)
        found = {id(p) for p in model.trainable().values()}
        assert found == {id(p) for p in model.transformer.parameters() if p.requires_grad} and found
        assert not any(p.requires_grad for p in model.text_encoder.parameters()), "it is trained in pretraining only"


def test_a_base_checkpoint_comes_back_bitwise_frozen_and_with_a_fingerprint(base, tmp_path):
    model = load_tiny(base)
    assert torch.equal(velocity(model), velocity(new_base()))
    assert not any(p.requires_grad for p in (*model.transformer.parameters(), *model.text_encoder.parameters()))
    assert model.source == str(base) and re.fullmatch("[0-9a-f]{16}", model.fingerprint)
    averaged = {key: 2 * value for key, value in model.transformer.state_dict().items()}
    model.save_full(tmp_path, averaged)  # the state that is given
    again = load_tiny(tmp_path)
    assert same(dict(again.transformer.state_dict()), averaged) and again.fingerprint != model.fingerprint
    assert same(dict(again.text_encoder.state_dict()), dict(model.text_encoder.state_dict()))


# ------------------------------------------------------------------------------------------ the tiny-qwen world's model
@pytest.fixture(scope="module")
def qwen_base(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("models") / "qwen-base", new_base(qwen=True)
    model.save_full(folder, model.transformer.state_dict())
    return folder


def tiny_pictures(rows):
    return [shown(one) for one in torch.rand(rows, 3, 24, 24, generator=torch.Generator().manual_seed(3))]


def known_prompts(rows):
    """Prompts of the world's own, of different lengths."""
    found = {len(text.split()): text for text in (p.text for p in tiny_edit.make_prompts("edit", "train", 60))}
    assert len(found) >= rows
    return [found[length] for length in sorted(found)][:rows]


def test_the_tiny_qwen_models_text_has_a_mask_and_its_sources_are_pixels(qwen_base):
    model, prompts, images = load_tiny(qwen_base), known_prompts(3), tiny_pictures(3)
    cond = model.encode(prompts, images)
    ids = torch.tensor([tiny_edit.tokenize(p) for p in prompts])
    assert torch.equal(cond.mask, ids > 0) and len(set(cond.mask.sum(1).tolist())) == 3
    expected = model.text_encoder.word.weight[ids] + model.text_encoder.place.weight
    assert torch.equal(cond.tokens, expected) and cond.pooled is None
    assert torch.equal(cond.source, torch.stack([image.pixels() for image in images]) * 2 - 1)
    assert model.encode(prompts).source is None and model.encode(prompts, [None] * 3).source is None


@torch.no_grad()
def test_the_tiny_qwen_model_comes_back_and_draws_from_the_source(qwen_base):
    model, prompts, images = load_tiny(qwen_base), known_prompts(3), tiny_pictures(3)
    x, again, cond = torch.randn(3, 3, 24, 24), new_base(qwen=True), model.encode(prompts, images)
    found = model.velocity(x, 0.5, cond)
    assert torch.equal(again.velocity(x, 0.5, again.encode(prompts, images)), found), "made again, or saved and read"
    assert gap(model.velocity(x, 0.5, cond._replace(source=None)), found) > 1e-3

