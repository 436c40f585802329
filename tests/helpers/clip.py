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


def save_detector(folder, sure_of=None, seed=0, labels=None):
    """A random Mask2Former of COCO's 80 classes; with `sure_of` every query says this class with certainty."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil
    from transformers import SwinConfig as Swin

    from data.written import CLASSES
    from scorers import geneval as G

    backwards = {new: old for old, new in G.GENEVAL_NAMES.items() if old not in ("mouse", "remote", "keyboard")}
    labels = labels or [backwards.get(name, name) for name in CLASSES]
    swin = Swin(image_size=32, embed_dim=12, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6,
        id2label=dict(enumerate(labels)), label2id={name: k for k, name in enumerate(labels)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mask2FormerForUniversalSegmentation(config).eval()
        if sure_of is not None:
            model.class_predictor.bias.data[labels.index(sure_of)] = 30.0
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder
