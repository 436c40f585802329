"""How do weights that are published as pickles become safetensors?

Three scorers of clip.py have no other checkpoint: HPS-v2.1 (open_clip's names), ImageReward (BLIP's names and a
head) and the aesthetic predictor's head. Nothing of the project unpickles on its own; this does, once, when called:

    python -c "from scorers.convert import convert; convert('hps', 'HPS_v2.1_compressed.pt', 'hps')"

Then {"kind": "hps", "model": "hps"} in a file for --rewards.
"""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from data.common import first_line
from models import hub
from rewards import RewardError
from scorers.clip import BERT, CLIP_H, HEAD_FILE, head_of
from scorers.common import PICKLED, PROCESSOR_FILES, load_part


def convert(kind: str, file: str | Path, out: str | Path, like: str = "") -> Path:
    """Turn a published pickle into a folder of safetensors, for "hps", "imagereward" or "aesthetic" -> the folder.

    It is read with torch.load(weights_only=True), which makes tensors and runs no code of the file's author. `like` is
    where the rest comes from: for hps the configuration, tokenizer and preprocessing (default: LAION's CLIP H/14, of
    which HPS is a fine-tuning), for imagereward the tokenizer (default: BERT's). RewardError, one line, for a file of
    something else, a weight too many or too few, or a folder that exists.
    """
    if kind not in CONVERTERS:
        raise RewardError(f"nothing to convert for {kind!r}; choose from {', '.join(CONVERTERS)}")
    out = Path(out)
    if out.exists():
        raise RewardError(f"{out}: exists already; give a new folder")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as fault:
        raise RewardError(f"{file}: not a readable file of weights ({first_line(fault)})") from fault
    hidden = out.with_name("." + out.name)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        CONVERTERS[kind](state.get("state_dict", state), hidden, like)
        hidden.rename(out)
    except (hub.ModelError, RewardError):  # of `like`
        raise
    except (AttributeError, KeyError, RuntimeError, ValueError) as fault:  # a name or a shape that the model lacks
        cause = " ".join(str(fault).split())
        raise RewardError(f"{file}: not the weights of {kind}, {PICKLED[kind]} ({cause[:200]})") from fault
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return out


def _convert_aesthetic(state: Mapping[str, Tensor], out: Path, like: str) -> None:
    _save_head(state, "layers.", out)


def _save_head(state: Mapping[str, Tensor], prefix: str, out: Path) -> None:
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    head = head_of(state["0.weight"].shape[1])
    head.load_state_dict(state)
    safetensors.torch.save_file(head.float().state_dict(), out / HEAD_FILE)


def _renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    for old, new in names:
        key = re.sub(old, new, key)
    return key


OPEN_CLIP_NAMES = (  # open_clip's -> transformers', in this order
    (r"^visual\.", "vision_model."), (r"^(?=transformer|token_|positional_|ln_)", "text_model."),
    (r"transformer\.resblocks", "encoder.layers"), (r"\.attn\.", ".self_attn."), (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."), (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.class_embedding", ".embeddings.class_embedding"), (r"\.token_embedding", ".embeddings.token_embedding"),
    (r"\.positional_embedding", ".embeddings.position_embedding.weight"), (r"\.ln_pre\.", ".pre_layrnorm."),
    (r"\.ln_post\.", ".post_layernorm."), (r"\.ln_final\.", ".final_layer_norm."),
)  # fmt: skip


def _convert_hps(state: Mapping[str, Tensor], out: Path, like: str) -> None:
    """open_clip keeps queries, keys and values in one matrix and its two projections transposed."""
    import transformers

    folder, renamed = hub.locate(like or CLIP_H, ("config.json", *PROCESSOR_FILES)), {}
    state = dict(state)
    for key, new in (("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight")):
        renamed[new] = state.pop(key).T
    for key, value in state.items():
        new = _renamed(key, OPEN_CLIP_NAMES)
        if ".in_proj_" in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[new.replace("in_proj_", f"{part}_proj.")] = third
        else:
            renamed[new] = value
    clip = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(folder))
    clip.load_state_dict(renamed)
    clip.save_pretrained(out)
    for part in ("CLIPImageProcessorPil", "CLIPTokenizer"):
        load_part("hps", part, folder).save_pretrained(out)


BLIP_NAMES = (  # BLIP's -> transformers'; the text half has the same names in both
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."), (r"^pos_embed", "embeddings.position_embedding"),
    (r"^cls_token", "embeddings.class_embedding"), (r"^norm\.", "post_layernorm."), (r"^blocks", "encoder.layers"),
    (r"\.norm([12])\.", r".layer_norm\1."), (r"\.attn\.", ".self_attn."), (r"\.proj\.", ".projection."),
)  # fmt: skip


def _convert_imagereward(state: Mapping[str, Tensor], out: Path, like: str) -> None:
    import transformers

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    seen, read = part("blip.visual_encoder."), part("blip.text_encoder.")
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
    halves = {"vision": transformers.BlipVisionModel(vision), "text": transformers.BlipTextModel(text, False)}
    halves["vision"].load_state_dict({_renamed(key, BLIP_NAMES): value for key, value in seen.items()})
    halves["text"].load_state_dict(read)
    for name, model in halves.items():
        model.save_pretrained(out / name)
    _save_head(state, "mlp.layers.", out)
    sides = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    transformers.CLIPImageProcessorPil(**sides).save_pretrained(out)
    words_folder = hub.locate(like or BERT, PROCESSOR_FILES)
    load_part("imagereward", "BertTokenizer", words_folder).save_pretrained(out)


def _layers(state: Mapping[str, Tensor]) -> int:
    return 1 + max(int(found[1]) for key in state if (found := re.search(r"(?:blocks|layer)\.(\d+)\.", key)))


CONVERTERS = {"aesthetic": _convert_aesthetic, "hps": _convert_hps, "imagereward": _convert_imagereward}
