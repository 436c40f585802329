"""Trained reward models: a tiny VLM of the real classes, whose score is the softmax of its own logits, whose LoRA stock
PEFT reads, and which is a reward in the range that it claims."""

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import reward_model
from data.files import Prompt
from models import lora
from models.hub import ModelError
from scorers import vlm_trained as V
from scorers.common import check_scores
from tests.helpers.checks import refusal
from tests.helpers.qwen_hub import build_vlm
from tiny.judge import TinyJudge

PROMPTS = ["a red fox", "a much longer prompt, 12 words or so", "x"]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def any_qwen(request, tmp_path_factory):
    return build_vlm(tmp_path_factory.mktemp(request.param) / "base", request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return build_vlm(tmp_path_factory.mktemp("qwen") / "base")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three PNGs of different sizes."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i, size in enumerate(((60, 40), (30, 70), (90, 90))):
        colours = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        colours.resize(size, Image.Resampling.BICUBIC).save(root / f"{i}.png")
    return [root / f"{i}.png" for i in range(3)]


def prompts_of(*texts):
    return [Prompt(text, "quality", {}, f"p.txt:{i}") for i, text in enumerate(texts, 1)]


def with_lora(judge):
    """The judge with a LoRA that changes what it says."""
    judge.add_lora(lora.lora_config(3, 6.0, V.TARGETS))
    rng = torch.Generator().manual_seed(0)
    for p in judge.trainable().values():
        p.data = 0.3 * torch.randn(p.shape, generator=rng)
    return judge


# ------------------------------------------------------------------------------------------------------------ a VLM
@torch.no_grad()
def test_a_vlms_score_is_the_softmax_of_its_own_five_logits_at_the_answer(any_qwen, pictures):
    judge = V.VLMJudge(str(any_qwen), question="{prompt}?")
    logits = judge.network(**judge.inputs(pictures, PROMPTS)).logits[:, -1]  # the whole vocabulary
    five = [judge.vlm.tokenizer.convert_tokens_to_ids(str(mark)) for mark in range(1, 6)]
    by_hand = [sum(s * math.exp(row[i]) for s, i in enumerate(five, 1)) / sum(math.exp(row[i]) for i in five)
               for row in logits.tolist()]  # fmt: skip
    scores = judge.scores(pictures, PROMPTS)
    assert scores.tolist() == pytest.approx(by_hand, abs=1e-5) and scores.dtype == torch.float32
    alone = torch.cat([judge.scores([image], [text]) for image, text in zip(pictures, PROMPTS, strict=True)])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)
    for changed in (judge.scores([pictures[0], pictures[0], pictures[2]], PROMPTS),
                    judge.scores(pictures, [PROMPTS[0], "another", PROMPTS[2]])):  # fmt: skip
        torch.testing.assert_close(changed[[0, 2]], scores[[0, 2]], rtol=1e-4, atol=1e-4)
        assert abs(changed[1] - scores[1]) > 1e-3, "picture and prompt both matter, to their own row"


@torch.no_grad()
def test_a_tensor_and_its_file_are_the_same_picture(qwen, pictures):
    judge = V.VLMJudge(str(qwen))
    tensor = torch.from_numpy(np.asarray(Image.open(pictures[0])).copy()).permute(2, 0, 1) / 255
    assert torch.equal(judge.scores([tensor], ["p"]), judge.scores(pictures[:1], ["p"]))
    assert not torch.equal(judge.scores([1 - tensor], ["p"]), judge.scores(pictures[:1], ["p"]))


def test_only_a_lora_on_the_language_part_trains_and_it_begins_as_the_base(any_qwen, pictures):
    judge = V.VLMJudge(str(any_qwen))
    with torch.no_grad():
        before = judge.scores(pictures, PROMPTS)
    judge.add_lora(lora.lora_config(3, 6.0, V.TARGETS), seed=4)
    names = list(judge.trainable())
    assert len(names) == 2 * 4 * 2, "A and B of four projections in two layers"
    assert all("language_model.layers" in name and ".lora_" in name for name in names)
    gradients = []
    for checkpointed in (True, False):
        assert judge.network.is_gradient_checkpointing == checkpointed
        scores = judge.scores(pictures, PROMPTS)
        torch.testing.assert_close(scores.detach(), before)
        reward_model.pointwise_loss(scores, torch.tensor([1.0, 2.0, 5.0])).backward()
        gradients.append({name: p.grad for name, p in judge.network.named_parameters() if p.grad is not None})
        judge.network.zero_grad(set_to_none=True)
        judge.network.gradient_checkpointing_disable()
    assert gradients[0].keys() == {*names}
    for name, gradient in gradients[0].items():
        assert "lora_B" not in name or gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_in_bfloat16_the_scores_are_finer_than_its_logits(qwen, pictures):
    judge = with_lora(V.VLMJudge(str(qwen), dtype=torch.bfloat16))
    assert {p.dtype for p in judge.trainable().values()} == {torch.float32}
    given = judge.inputs(pictures, PROMPTS)
    hidden = judge.network.model(**given).last_hidden_state[:, -1]
    assert hidden.dtype == torch.bfloat16
    exact = hidden.double() @ judge.network.lm_head.weight[judge.token_ids].double().T
    scores = judge.scores(pictures, PROMPTS)
    torch.testing.assert_close(scores, reward_model.expected_score(exact, range(5)))
    coarse = reward_model.expected_score(judge.network(**given).logits[:, -1], judge.token_ids)
    assert (scores - coarse).abs().max() > 1e-4


@torch.no_grad()
def test_a_saved_judge_scores_as_it_did_and_stock_peft_reads_it_too(qwen, pictures, tmp_path):
    import transformers
    from peft import PeftModel

    judge = with_lora(V.VLMJudge(str(qwen), question="Rate {prompt}!"))
    V.save(judge, tmp_path, "pointwise")
    expected = judge.scores(pictures, PROMPTS)
    assert torch.equal(V.load(tmp_path).scores(pictures, PROMPTS), expected)
    base = V.VLMJudge(str(qwen), question="Rate {prompt}!").scores(pictures, PROMPTS)
    assert (base - expected).abs().max() > 0.01, "the LoRA does something"
    stock = transformers.AutoModelForImageTextToText.from_pretrained(qwen)
    stock = PeftModel.from_pretrained(stock, tmp_path).eval()
    logits = stock(**judge.inputs(pictures, PROMPTS)).logits[:, -1]
    found = reward_model.expected_score(logits, judge.token_ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    images = torch.rand(3, 3, 50, 60)
    eight_bits = judge.scores((images * 255).round() / 255, PROMPTS)
    torch.testing.assert_close(5 * V.scorer(tmp_path, batch=2).score(images, prompts_of(*PROMPTS)), eight_bits)


def test_a_judge_is_refused_on_other_weights_without_its_base_and_if_it_is_none(qwen, tmp_path):
    saved = tmp_path / "saved"
    V.save(with_lora(V.VLMJudge(str(qwen))), saved, "pointwise")
    about = json.loads((saved / V.ABOUT).read_text())
    for model in (build_vlm(tmp_path / "other", seed=1), tmp_path / "gone"):
        (saved / V.ABOUT).write_text(json.dumps(about | {"model": str(model)}))
        refusal(V.scorer, saved)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere", tiny(tmp_path / "cut")):
        if (folder / "model.safetensors").exists():
            (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:50])
        assert str(folder) in refusal(V.scorer, folder, error=ModelError)


# ------------------------------------------------------------------------------------------------------ as a reward
def tiny(folder, **changes):
    """A tiny judge's checkpoint, some of its weights replaced -> its folder."""
    folder.mkdir()
    V.save(TinyJudge(16, 2, seed=2), folder, "pointwise")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({**weights, **changes}, folder / "model.safetensors")
    return folder


def test_a_judge_is_a_reward_named_as_its_folder(tmp_path):
    scorer, images = V.scorer(tiny(tmp_path / "mine"), batch=2), torch.rand(5, 3, 24, 24)
    prompts = prompts_of(*["a photo of two circles", 'a sign that says "CAT"'] * 2, "a photo of a red cross")
    scores = scorer.score(images, prompts, None)
    assert (scorer.name, scorer.low, scorer.high) == ("mine", 0.2, 1.0)
    assert scores.dtype == torch.float32 and scores.shape == (5,) and not scores.requires_grad
    expected = TinyJudge(16, 2, seed=2).scores(images, [p.text for p in prompts]).detach() / 5
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    half = V.scorer(tmp_path / "mine", dtype=torch.bfloat16).score(images, prompts)
    assert half.dtype == torch.float32 and 0 < (half - scores).abs().max() < 0.02


@pytest.mark.parametrize(("mark", "reward"), [(0, 0.2), (4, 1.0)])
def test_a_certain_judge_stays_inside_the_range_that_it_claims(tmp_path, monkeypatch, mark, reward):
    bias = torch.full((5,), -30.0)
    bias[mark] = 30.0
    scorer, texts = V.scorer(tiny(tmp_path / "sure", **{"head.bias": bias})), ["a photo of two circles"] * 3
    beyond = (mark + 1) * (1 + np.array([-1, 0, 1]) * 2e-7)  # probabilities that add up to one but for the last bit
    for score_all in (V.score_all, lambda *_: beyond):
        monkeypatch.setattr(V, "score_all", score_all)
        scores = scorer.score(torch.rand(3, 3, 24, 24), prompts_of(*texts))
        assert check_scores("sure", scores, texts, scorer.low, scorer.high).tolist() == pytest.approx([reward] * 3)
