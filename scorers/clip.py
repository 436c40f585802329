"""CLIP and its kin: how well does a picture fit its text, and how much would people like it?

    kind          model                                  number                                        range
    pickscore     CLIP H/14, fine-tuned                  exp(logit_scale) cos / 26                     +- 100 / 26
    clipscore     CLIP L/14                              100 cos / 30                                  +- 100 / 30
    hps           CLIP H/14, fine-tuned (HPS-v2.1)       cos, about 0.3                                [-1, 1]
    aesthetic     CLIP L/14, linear head                 head(image features), about 1 to 10           any
    imagereward   BLIP, linear head                      (head(text on image) - mean) / std            any

cos is the cosine of CLIP's image and text features. Higher is better everywhere. F §6.1 and App. A name the rewards.

The weights of hps, imagereward and aesthetic's head are published as pickles only, see convert.py.
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.common import first_line
from models import hub
from rewards import PICKSCORE_SCALE, RewardError, Scorer
from scorers.common import MODEL_FILES, PROCESSOR_FILES, batched, folder_of, load_part

CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"
BERT = "google-bert/bert-base-uncased"  # the tokenizer of BLIP's text half
HEAD_FILE = "head.safetensors"
IMAGEREWARD_MEAN, IMAGEREWARD_STD, IMAGEREWARD_TOKENS = 0.16717362830052426, 1.0333394966054072, 35
CLIPSCORE_SCALE = 100 / 30  # cosines of CLIP L/14 are about 0.3 at best; this brings them near 1


def clip_features(
    name: str, model: str, processor: str, device: str, dtype: torch.dtype
) -> tuple[Callable, Callable, float]:
    """(images, texts, scale): unit features (B, D) float32 of B pictures and of B texts, and exp(logit_scale).

    `processor`: the place of the tokenizer and the preprocessing; "" if they lie beside the model.
    """
    folder = folder_of(name, model, MODEL_FILES)
    clip = load_part(name, "CLIPModel", folder, dtype=dtype).to(device)
    beside = hub.locate(processor, PROCESSOR_FILES) if processor else folder
    prepare = load_part(name, "CLIPImageProcessorPil", beside)
    tokenizer = load_part(name, "CLIPTokenizer", beside)
    length = clip.config.text_config.max_position_embeddings

    def images(pixels: Sequence[np.ndarray]) -> Tensor:
        values = prepare(list(pixels), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        return F.normalize(clip.get_image_features(values.to(device, dtype)).pooler_output.float(), dim=-1)

    def texts(lines: Sequence[str]) -> Tensor:
        unique = list(dict.fromkeys(lines))  # a group shares its prompt
        # Always padded to the full length: a text's features must not depend on its neighbours in the batch.
        tokens = tokenizer(unique, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        inputs = {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}
        features = F.normalize(clip.get_text_features(**inputs).pooler_output.float(), dim=-1)
        return features[[unique.index(line) for line in lines]]

    return images, texts, clip.logit_scale.double().exp().item()


def _similarity(name: str, clip: tuple, factor: float, batch: int, shaped: Callable = np.asarray) -> Scorer:
    """A Scorer that says factor * cos of each `shaped` picture and its text, within +- factor in spite of rounding."""
    images, texts, _ = clip

    def rate(pixels, prompts):
        seen, read = images([shaped(picture) for picture in pixels]), texts([p.text for p in prompts])
        return factor * (seen.double() * read.double()).sum(-1).clamp(-1, 1).cpu()

    return batched(name, rate, -factor, factor, batch)


def pickscore(
    device: str = "cpu", dtype: torch.dtype = torch.float32, model: str = PICKSCORE, processor: str = CLIP_H,
    batch: int = 16,
) -> Scorer:  # fmt: skip
    """PickScore: exp(logit_scale) cos / 26, about 0.8; F Table 2 prints it times 26. F §6.1."""
    clip = clip_features("pickscore", model, processor, device, dtype)
    return _similarity("pickscore", clip, clip[2] / PICKSCORE_SCALE, batch)


def clipscore(device: str = "cpu", dtype: torch.dtype = torch.float32, model: str = CLIP_L, batch: int = 16) -> Scorer:
    """CLIPScore: 100 cos / 30, about 1."""
    return _similarity("clipscore", clip_features("clipscore", model, "", device, dtype), CLIPSCORE_SCALE, batch)


def hps(device: str = "cpu", dtype: torch.dtype = torch.float32, model: str = "", batch: int = 16) -> Scorer:
    """HPS-v2.1: cos, about 0.3. `model` is a folder from `convert`. Pictures are padded to a square, not cropped."""
    return _similarity("hps", clip_features("hps", model, "", device, dtype), 1.0, batch, _padded)


def _padded(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) in the middle of a black square."""
    side = max(picture.shape[:2])
    above, left = ((side - length) // 2 for length in picture.shape[:2])
    square = np.zeros((side, side, 3), np.uint8)
    square[above : above + picture.shape[0], left : left + picture.shape[1]] = picture
    return square


def aesthetic(
    device: str = "cpu", dtype: torch.dtype = torch.float32, model: str = CLIP_L, head: str = "", batch: int = 16
) -> Scorer:
    """Aesthetic: a linear head on CLIP L/14's unit image features, about 1 to 10. `head` is a folder from `convert`."""
    folder = folder_of("aesthetic", head, (HEAD_FILE,))  # before the larger download
    images, _, _ = clip_features("aesthetic", model, "", device, dtype)
    width = images([np.zeros((8, 8, 3), np.uint8)]).shape[-1]
    rate = _load_head("aesthetic", folder, width, device)
    return batched("aesthetic", lambda pixels, _: rate(images(pixels))[:, 0].cpu(), -math.inf, math.inf, batch)


# -------------------------------------------------------------------------------------------- BLIP and linear heads
def imagereward(device: str = "cpu", dtype: torch.dtype = torch.float32, model: str = "", batch: int = 16) -> Scorer:
    """ImageReward, about -2 to 2: BLIP reads the prompt with the picture in its cross-attention, a head rates it.

    `model` is a folder that `convert` wrote: vision/ and text/ (transformers), head.safetensors, tokenizer.
    """
    folder = folder_of("imagereward", model, (*(f"{half}/{f}" for half in ("vision", "text") for f in MODEL_FILES),
                                            *PROCESSOR_FILES, HEAD_FILE))  # fmt: skip
    vision = load_part("imagereward", "BlipVisionModel", folder / "vision", dtype=dtype).to(device)
    text = load_part("imagereward", "BlipTextModel", folder / "text", dtype=dtype, add_pooling_layer=False).to(device)
    head = _load_head("imagereward", folder, text.config.hidden_size, device)
    prepare = load_part("imagereward", "CLIPImageProcessorPil", folder)
    tokenizer = load_part("imagereward", "BertTokenizer", folder)

    def rate(pixels, prompts):
        values = prepare(pixels, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        seen = vision(values.to(device, dtype)).last_hidden_state
        tokens = tokenizer([p.text for p in prompts], padding="max_length", truncation=True,
                           max_length=IMAGEREWARD_TOKENS, return_tensors="pt").to(device)  # fmt: skip
        read = text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
        rating = head(read.last_hidden_state[:, 0].float())[:, 0]  # the first token's, [CLS]
        return ((rating - IMAGEREWARD_MEAN) / IMAGEREWARD_STD).cpu()

    return batched("imagereward", rate, -math.inf, math.inf, batch)


def head_of(width: int) -> nn.Sequential:
    """The head that Aesthetic and ImageReward share: width-1024-128-64-16-1, linear all through.

    Its layers are numbered as in the public files, which count the dropouts between them.
    """
    sizes = itertools.pairwise((width, 1024, 128, 64, 16, 1))
    return nn.Sequential(OrderedDict((place, nn.Linear(*size)) for place, size in zip("02467", sizes, strict=True)))


def _load_head(name: str, folder: Path, width: int, device: str) -> nn.Sequential:
    """The head in float32, whatever the backbone's dtype: it costs nothing."""
    head = head_of(width)
    try:
        head.load_state_dict(safetensors.torch.load_file(folder / HEAD_FILE))
    except Exception as fault:
        told = f"{folder / HEAD_FILE}: no head for {width} features ({first_line(fault)})"
        raise RewardError(f"scorer {name!r}: {told}") from fault
    return head.to(device).eval().requires_grad_(False)
