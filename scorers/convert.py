"""How do weights that are published as pickles become safetensors?

Three scorers of clip.py have no other checkpoint: HPS-v2.1 (open_clip's names), ImageReward (BLIP's names and a
head) and the aesthetic predictor's head. Nothing of the project unpickles on its own; this does, once, when called:

    python -c "from scorers.convert import convert; convert('hps', 'HPS_v2.1_compressed.pt', 'hps')"

Then {"kind": "hps", "model": "hps"} in a file for --rewards.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import torch
from torch import Tensor

from models import hub
from rewards import RewardError
from scorers.clip import BERT, CLIP_H, HEAD_FILE, head_of
from scorers.common import PICKLED, PROCESSOR_FILES, load_part

OPEN_CLIP_NAMES = (  # open_clip's -> transformers', in this order
    (r"^visual\.", "vision_model."), (r"^(?=transformer|token_|positional_|ln_)", "text_model."),
    (r"transformer\.resblocks", "encoder.layers"), (r"\.attn\.", ".self_attn."), (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."), (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.class_embedding", ".embeddings.class_embedding"), (r"\.token_embedding", ".embeddings.token_embedding"),
    (r"\.positional_embedding", ".embeddings.position_embedding.weight"), (r"\.ln_pre\.", ".pre_layrnorm."),
    (r"\.ln_post\.", ".post_layernorm."), (r"\.ln_final\.", ".final_layer_norm."),
    (r"^vision_model\.proj", "visual_projection.weight"), (r"^text_projection", "text_projection.weight"),
)  # fmt: skip
BLIP_NAMES = (  # BLIP's -> transformers'; the text half has the same names in both
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."), (r"^pos_embed", "embeddings.position_embedding"),
    (r"^cls_token", "embeddings.class_embedding"), (r"^norm\.", "post_layernorm."), (r"^blocks", "encoder.layers"),
    (r"\.norm([12])\.", r".layer_norm\1."), (r"\.attn\.", ".self_attn."), (r"\.proj\.", ".projection."),
)  # fmt: skip


def convert(kind: str, file: str | Path, out: str | Path, like: str = "") -> Path:
    """Turn a published pickle into a folder of safetensors, for "hps", "imagereward" or "aesthetic" -> the folder.

    It is read with torch.load(weights_only=True), which makes tensors and runs no code of the file's author. `like` is
    where the rest comes from: for hps the configuration, tokenizer and preprocessing (default: LAION's CLIP H/14, of
    which HPS is a fine-tuning), for imagereward the tokenizer (default: BERT's). RewardError, one line, for a file of
    something else, a weight too many or too few, or a folder that exists.
    """
    out, writers = Path(out), {"aesthetic": _aesthetic, "hps": _hps, "imagereward": _imagereward}
    if kind not in writers or out.exists():
        raise RewardError(f"convert({kind!r}, ..., {str(out)!r}): give one of {', '.join(writers)} and a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        with TemporaryDirectory(dir=out.parent, prefix=".") as hidden:
            folder = Path(hidden) / out.name
            folder.mkdir()
            writers[kind](state.get("state_dict", state), folder, like)
            folder.rename(out)
    except (hub.ModelError, RewardError):  # of `like`
        raise
    except Exception as fault:  # no file of weights, or a name or a shape that the model lacks
        cause = " ".join(str(fault).split())
        raise RewardError(f"{file}: not the weights of {kind}, {PICKLED[kind]} ({cause[:200]})") from fault
    return out


def _aesthetic(state: Mapping[str, Tensor], out: Path, like: str) -> None:
    _save_head(_part(state, "layers."), out)


def _hps(state: Mapping[str, Tensor], out: Path, like: str) -> None:
    """open_clip keeps queries, keys and values in one matrix and its two projections transposed."""
    import transformers

    folder, renamed = hub.locate(like or CLIP_H, ("config.json", *PROCESSOR_FILES)), {}
    for key, value in state.items():
        new = _renamed(key, OPEN_CLIP_NAMES)
        if ".in_proj_" in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[new.replace("in_proj_", f"{part}_proj.")] = third
        else:
            renamed[new] = value.T if key in ("visual.proj", "text_projection") else value
    clip = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(folder))
    clip.load_state_dict(renamed)
    clip.save_pretrained(out)
    for part in ("CLIPImageProcessorPil", "CLIPTokenizer"):
        load_part("hps", part, folder).save_pretrained(out)


def _imagereward(state: Mapping[str, Tensor], out: Path, like: str) -> None:
    """The sizes of both halves are read off their weights; every head is 64 wide."""
    import transformers

    seen, read = _part(state, "blip.visual_encoder."), _part(state, "blip.text_encoder.")
    read.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: no weight
    width, _, patch, _ = seen["patch_embed.proj.weight"].shape
    size = patch * math.isqrt(seen["pos_embed"].shape[1] - 1)
    vision = transformers.BlipVisionConfig(
        hidden_size=width, intermediate_size=len(seen["blocks.0.mlp.fc1.bias"]), num_attention_heads=width // 64,
        num_hidden_layers=_layers(seen), image_size=size, patch_size=patch, hidden_act="gelu", layer_norm_eps=1e-6,
    )  # fmt: skip
    words, places = (read[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
    text = transformers.BlipTextConfig(
        vocab_size=len(words), max_position_embeddings=len(places), hidden_size=words.shape[1],
        intermediate_size=len(read["encoder.layer.0.intermediate.dense.bias"]), num_hidden_layers=_layers(read),
        num_attention_heads=words.shape[1] // 64, encoder_hidden_size=width, hidden_act="gelu", is_decoder=True,
    )  # fmt: skip
    seen = {_renamed(key, BLIP_NAMES): value for key, value in seen.items()}
    eye, reader = transformers.BlipVisionModel(vision), transformers.BlipTextModel(text, False)
    for name, model, weights in (("vision", eye, seen), ("text", reader, read)):
        model.load_state_dict(weights)
        model.save_pretrained(out / name)
    _save_head(_part(state, "mlp.layers."), out)
    sides = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    transformers.CLIPImageProcessorPil(**sides).save_pretrained(out)
    load_part("imagereward", "BertTokenizer", hub.locate(like or BERT, PROCESSOR_FILES)).save_pretrained(out)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    for old, new in names:
        key = re.sub(old, new, key)
    return key


def _layers(state: Mapping[str, Tensor]) -> int:
    return 1 + max(int(found[1]) for key in state if (found := re.search(r"(?:blocks|layer)\.(\d+)\.", key)))


def _save_head(state: Mapping[str, Tensor], out: Path) -> None:
    head = head_of(state["0.weight"].shape[1])
    head.load_state_dict(state)
    safetensors.torch.save_file(head.float().state_dict(), out / HEAD_FILE)
