"""Oracles for questions about pictures: BLIP's and a Qwen-VL's own first answers, by another route, and by hand."""

import math

import pytest
import torch

from data.pictures import to_picture
from rewards import RewardError
from scorers import vqa
from tests.helpers.clip import pictures, prompt
from tests.helpers.qwen_hub import build_vlm
from tests.helpers.vqa import save_blip_vqa

ASKED = [("a red cat", "two dogs"), ("a bench",), ("a cab", "the sea", "a sign")]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return save_blip_vqa(tmp_path_factory.mktemp("blip"))


def first_answer(folder, image, phrase):
    """p(yes) / (p(yes) + p(no)) of the stock model's own generation."""
    from transformers import BertTokenizer, BlipForQuestionAnswering, BlipImageProcessorPil

    model, words = BlipForQuestionAnswering.from_pretrained(folder).eval(), BertTokenizer.from_pretrained(folder)
    pixels = BlipImageProcessorPil.from_pretrained(folder)(to_picture(image), return_tensors="pt")["pixel_values"]
    ids = words(f"{phrase}?", return_tensors="pt").input_ids
    ids[0, 0] = len(words) - 1
    told = model.generate(ids, pixels, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    yes, no = (told.logits[0][0, words.convert_tokens_to_ids(word)].exp().item() for word in ("yes", "no"))
    return yes / (yes + no)


def test_blip_vqa_is_the_product_of_what_blip_says_to_each_phrase(blip):
    images, prompts = pictures(3), [prompt("x", phrases=list(own)) for own in ASKED]
    scores = vqa.blipvqa(model=str(blip), batch=2).score(images, prompts, None)
    by_hand = [math.prod(first_answer(blip, image, p) for p in own) for image, own in zip(images, ASKED, strict=True)]
    assert scores.tolist() == pytest.approx(by_hand, abs=1e-5) and scores.std() > 0.01
    many = [prompt("x", phrases=["a red cat"] * 9)]
    assert vqa.blipvqa(model=str(blip)).score(images[:1], many, None).item() == pytest.approx(
        first_answer(blip, images[0], "a red cat") ** 8, rel=1e-4
    ), "as officially, of the first eight"


def test_a_prompt_without_phrases_needs_spacy_and_says_so(blip, monkeypatch):
    monkeypatch.setattr("scorers.common.find_spec", lambda name: None)
    vqa._reader.cache_clear()
    with pytest.raises(RewardError, match="compbench"):
        vqa.blipvqa(model=str(blip)).score(pictures(1), [prompt("a cat")], None)


# ------------------------------------------------------------------------------------------------------- GenEval 2
ATOMS = [[["Is there a cat?", "Yes"], ["How many dogs are there?", "two"]], [["Is there a cat?", "Yes"]]]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return build_vlm(tmp_path_factory.mktemp("vlm"), "qwen3_vl", words=("yes", "Yes", "two", "Two"))


def chance(folder, image, question, tokens):
    """The probability of some first tokens by the stock model, asked through its own chat format."""
    from models import qwen_vl

    judge = qwen_vl.load(str(folder))
    ask = qwen_vl.Question(
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n",
        [f"{question} Answer in one word."], [to_picture(image)],
    )  # fmt: skip
    with torch.no_grad():
        p = judge.network(**judge.inputs([ask])).logits[0, -1].softmax(-1)
    return sum(p[judge.token(text)].item() for text in tokens)


def test_soft_tifa_is_a_mean_of_the_right_answers_probabilities_and_asks_each_question_once(qwen3, spy):
    images = pictures(2, 60, 60)
    prompts = [prompt(f"p{i}", vqa_list=atoms) for i, atoms in enumerate(ATOMS)]
    asked = spy(vqa, "_ask")
    options = {"model": str(qwen3), "dtype": torch.float32, "batch": 2}
    am, gm = (vqa.softtifa(mean, **options).score(images, prompts) for mean in ("arithmetic", "geometric"))
    assert sum(len(call.args[1]) for call in asked) == 3, "the second mean asks nothing"
    yes, two = ["yes", "Yes"], ["two", "Two", "2"]
    by_hand = [chance(qwen3, images[0], ATOMS[0][0][0], yes), chance(qwen3, images[0], ATOMS[0][1][0], two)]
    alone = chance(qwen3, images[1], ATOMS[1][0][0], yes)
    assert am.tolist() == pytest.approx([sum(by_hand) / 2, alone], rel=1e-4)
    assert gm.tolist() == pytest.approx([math.prod(by_hand) ** 0.5, alone], rel=1e-4) and am[0] > gm[0] > 0
    with pytest.raises(RewardError, match="vqa_list"):
        vqa.softtifa(**options).score(images[:1], [prompt("a cat")])
