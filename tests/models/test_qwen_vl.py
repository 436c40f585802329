"""Oracles for what a Qwen-VL is given: transformers' own processor, and batches against rows alone."""

import pytest
import torch
from PIL import Image
from transformers import ProcessorMixin, Qwen2_5_VLProcessor

from models import qwen_vl
from tests.helpers.qwen_hub import build_vlm

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: build_vlm(tmp_path_factory.mktemp("vlm") / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def vlm(folders):
    return qwen_vl.load(str(folders["qwen2_5_vl"]))


def picture(width, height, seed=0):
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy())


QUESTIONS = [
    qwen_vl.chat("You rate.", ["Source: ", picture(56, 84), "\n\n it's new: ", picture(84, 56, 1), " which one?"]),
    qwen_vl.chat("Be brief.", [picture(28, 28, 2), "A longer question than the other, with ünïcode and 12 {braces}"]),
]  # fmt: skip


def test_inputs_are_those_of_transformers_own_processor(vlm, monkeypatch):
    """Its text half is stock; its video half, which needs torchvision, is left out of the stock class."""
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    vlm.tokenizer.padding_side = "left"
    stock = Qwen2_5_VLProcessor(vlm.processor, vlm.tokenizer, None)
    texts = []
    for question in QUESTIONS:
        text = question.template
        for words in question.texts:
            text = text.replace("{}", words, 1)
        texts.append(text)
    pictures = [list(question.pictures) for question in QUESTIONS]
    expected = stock(text=texts, images=pictures, padding=True, return_tensors="pt", return_mm_token_type_ids=True)
    found = vlm.inputs(QUESTIONS)
    mask = found["attention_mask"].bool()
    assert set(found) == set(expected) and mask.shape[0] == 2 and not mask.all()
    for name in ("attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(found[name], expected[name].to(found[name].dtype)), name
    assert torch.equal(found["input_ids"][mask], expected["input_ids"][mask]), "what pads is masked"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_answered_in_a_batch_as_alone_and_every_part_of_it_counts(folders, family):
    vlm = qwen_vl.load(str(folders[family]))

    def answer(*questions):
        return vlm.network(**vlm.inputs(questions), use_cache=False).logits[:, -1]

    alone = torch.cat([answer(question) for question in QUESTIONS])
    assert (answer(*QUESTIONS) - alone).abs().max() < 2e-5, "padding on the left is not seen"
    other = QUESTIONS[1]._replace(pictures=[picture(28, 28, 3)])
    assert (answer(other) - alone[1]).abs().max() > 1e-3
    assert (answer(QUESTIONS[1]._replace(texts=["Be brief.", "x"])) - alone[1]).abs().max() > 1e-3


@pytest.mark.parametrize("text", ["a<|im_end|>", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>b", "{}"])
def test_control_tokens_in_a_users_text_are_plain_text(vlm, text):
    """They neither end the turn nor bring a picture; the text comes back whole from its ids."""
    plain, asked = (vlm.inputs([qwen_vl.chat("s", [picture(28, 28), t])])["input_ids"][0] for t in ("", text))
    for control in qwen_vl.CONTROL:
        number = vlm.token(control)
        assert (asked == number).sum() == (plain == number).sum() > 0, control
    more = len(asked) - len(plain)
    end = int((plain == vlm.token("<|vision_end|>")).nonzero()[-1]) + 1
    assert vlm.tokenizer.decode(asked[end : end + more]) == text


def test_a_text_alone_needs_no_image_processor(vlm):
    found = vlm._replace(processor=None).inputs([qwen_vl.Question("<|im_start|>{}", ["hello"])])
    assert set(found) == {"input_ids", "attention_mask", "mm_token_type_ids"} and not found["mm_token_type_ids"].any()


@pytest.mark.parametrize(("template", "texts", "count"), [("{}", [], 0), ("a", ["b"], 0), ("{}", ["b"], 1)])
def test_a_template_has_one_place_for_each_text_and_picture(vlm, template, texts, count):
    with pytest.raises(ValueError, match="texts and"):
        vlm.inputs([qwen_vl.Question(template, texts, [picture(28, 28)] * count)])
