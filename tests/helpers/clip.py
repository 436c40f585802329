"""A tiny random CLIP in the layout of the public ones, and prompts and pictures for those who look at them."""

import json
import math

import torch

from data.files import Prompt
from tests.helpers.sd3 import _clip_vocabulary, _randomise

SIDE, HEADS = 24, 2  # of the tiny CLIPs' pictures, and of their attention
TEXTS = ["a cat", "two dogs and a cat", "", "a cat"]


def prompt(text, **metadata):
    return Prompt(text, "quality", metadata, "p.txt:1")


def pictures(count, height=40, width=40, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


PROMPTS = [prompt(text) for text in TEXTS]


def save_clip(folder, scale=37.0, seed=0):
    """A random CLIPModel with its processor and tokenizer, two files wide, vision and text of different widths."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    vocabulary = _clip_vocabulary()
    size = len(vocabulary)
    config = CLIPConfig(
        text_config={"vocab_size": size, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2,
                     "num_attention_heads": HEADS, "max_position_embeddings": 30, "hidden_act": "gelu",
                     "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1},
        vision_config={"hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 3, "image_size": SIDE,
                       "num_attention_heads": HEADS, "patch_size": 8, "hidden_act": "gelu"},
        projection_dim=12,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
        _randomise(model)
        model.logit_scale.data.fill_(math.log(scale))
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size=SIDE, crop_size=SIDE).save_pretrained(folder)  # plain numbers, as OpenAI's files have
    letters = folder / "letters"
    letters.mkdir()
    (letters / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (letters / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(letters, model_max_length=77).save_pretrained(folder)
    return folder
