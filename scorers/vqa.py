"""Questions about a picture whose right answers are known: does a model that answers them agree?

    kind        who answers             what is asked                        score
    blipvqa     BLIP (VQA)              "NOUN PHRASE?" for each of a prompt  product of p(yes) / (p(yes) + p(no))
    softtifa    Qwen3-VL, any Qwen-VL   GenEval 2's questions                mean of the right answers' probabilities

F Table 3's Color, Shape and Texture are BLIP-VQA's. GenEval 2's Soft-TIFA is a check of GenEval's teachers that they
were not trained on.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from data.batches import batches
from data.files import Prompt
from data.pictures import to_picture
from models import qwen_vl
from models.qwen_vl import PICTURE
from rewards import RewardError, Scorer
from scorers import rubrics
from scorers.common import MODEL_FILES, batched, folder_of, load_part, require
from scorers.vlm import _ask, _load, single_tokens

BLIP_VQA, PHRASES = "Salesforce/blip-vqa-capfilt-large", 8  # T2I-CompBench asks about the first eight noun phrases
QUESTION_TOKENS = 35


def blipvqa(device: str = "cpu", dtype: torch.dtype = torch.float32, model: str = BLIP_VQA, batch: int = 16) -> Scorer:
    """BLIP-VQA of T2I-CompBench, in [0, 1]: does BLIP say yes to each noun phrase of the prompt? F Table 3.

    A prompt's phrases are those of its metadata field "phrases", else what spaCy finds (extra `compbench`).
    """
    folder = folder_of("blipvqa", model, MODEL_FILES)
    network = load_part("blipvqa", "BlipForQuestionAnswering", folder, dtype=dtype).to(device)
    prepare = load_part("blipvqa", "BlipImageProcessorPil", folder)
    tokenizer = load_part("blipvqa", "BertTokenizer", folder)
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))

    def rate(pixels: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[float]:
        values = prepare(list(pixels), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        seen = network.vision_model(values.to(device, dtype)).last_hidden_state
        scores, alike = [1.0] * len(prompts), {}
        for b, p in enumerate(prompts):
            for phrase in phrases_of(p)[:PHRASES]:
                ids = tokenizer(f"{phrase}?", truncation=True, max_length=QUESTION_TOKENS).input_ids
                alike.setdefault(len(ids), []).append((b, ids))
        # TRAP: transformers' decoder of BLIP does not mask the padding of questions. Those of one length need none.
        for some in (part for own in alike.values() for part in batches(own, batch)):
            words = torch.tensor([ids for _, ids in some], device=device)
            words[:, 0] = network.config.text_config.vocab_size - 1  # [ENC], with which BLIP was trained
            states = network.text_encoder(words, encoder_hidden_states=seen[[b for b, _ in some]]).last_hidden_state
            start = torch.full((len(some), 1), network.decoder_start_token_id, device=device)
            told = network.text_decoder(start, encoder_hidden_states=states).logits[:, 0].float()
            for (b, _), chance in zip(some, told[:, [yes, no]].softmax(-1)[:, 0].tolist(), strict=True):
                scores[b] *= chance
        return scores

    return batched("blipvqa", rate, 0.0, 1.0, batch)


def phrases_of(prompt: Prompt) -> list[str]:
    """The noun phrases of a prompt, as they are given or as spaCy reads them."""
    return prompt.metadata.get("phrases") or [chunk.text for chunk in _reader()(prompt.text).noun_chunks]


@cache
def _reader() -> Callable:
    require("compbench", "spacy")
    import spacy

    try:
        return spacy.load("en_core_web_sm")
    except OSError as fault:
        raise RewardError("spaCy's English is missing: python -m spacy download en_core_web_sm") from fault


# ------------------------------------------------------------------------------------------------------- GenEval 2
def softtifa(
    mean: str = "geometric", model: str = "Qwen/Qwen3-VL-8B-Instruct", device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16, batch: int = 8,
) -> Scorer:  # fmt: skip
    """GenEval 2's Soft-TIFA, in [0, 1]: the mean over a prompt's questions ("vqa_list") of the right answer's chance.

    mean: "arithmetic" (how many are right) or "geometric" (is all of it right?). Scorers of both means ask once.
    RewardError for a prompt without questions.
    """
    if mean not in ("arithmetic", "geometric"):
        raise RewardError(f"scorer 'softtifa': mean is {mean!r}; choose arithmetic or geometric")
    chances = _asker(model, device, dtype, batch)

    def score(images: Tensor, prompts: Sequence[Prompt], sources: object = None) -> Tensor:
        for p in prompts:
            if not p.metadata.get("vqa_list"):
                raise RewardError(f"scorer 'softtifa': {p.source}: no 'vqa_list' with questions and answers")
        found = [rubrics.soft_tifa(own)[mean == "geometric"] for own in chances(images, prompts)]
        return torch.tensor(found, dtype=torch.float64)

    return Scorer("softtifa", score, 0.0, 1.0)


@cache
def _asker(model: str, device: torch.device | str, dtype: torch.dtype, batch: int) -> Callable:
    """chances(images, prompts) -> the probability of each right answer, a list a picture; remembers what it asked."""
    judge, known = _load(model, device, dtype), {}

    def chances(images: Tensor, prompts: Sequence[Prompt]) -> list[list[float]]:
        keys = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
        asked = {
            (key, *atom): image
            for key, image, p in zip(keys, images, prompts, strict=True) for atom in p.metadata["vqa_list"]
        }  # fmt: skip
        left = [key for key in asked if key not in known]
        for some in batches(left, batch):
            questions = [_question(text, asked[key, text, right]) for key, text, right in some]
            asked_for = dict.fromkeys(right.strip().lower() for *_, right in some)
            words = single_tokens(judge, {right: _spellings(right) for right in asked_for}, "softtifa")
            for key, (_, _, logprobs) in zip(some, _ask(judge, questions, words, 1), strict=True):
                known[key] = rubrics.answer_probability(logprobs, key[2])
        return [[known[key, *atom] for atom in p.metadata["vqa_list"]] for key, p in zip(keys, prompts, strict=True)]

    return chances


def _question(text: str, image: Tensor) -> qwen_vl.Question:
    template = f"<|im_start|>user\n<|vision_start|>{PICTURE}<|vision_end|>{{}}<|im_end|>\n<|im_start|>assistant\n"
    return qwen_vl.Question(template, [f"{text} Answer in one word."], [to_picture(image)])


def _spellings(right: str) -> list[str]:
    """How an answer may be written: with or without a blank, a capital, or as a digit."""
    said = [right, right.title(), *(str(n) for n, word in enumerate(rubrics.NUMBER_WORDS) if word == right)]
    return [*said, *(f" {word}" for word in said)]
