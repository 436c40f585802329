"""Where do the tests get a Qwen-Image, a Qwen-Image-Edit and a Qwen-VL without a download?

`build_qwen` makes one of the real pipelines, in the Hub's own layout, with random weights and tiny widths. What makes
Qwen-Image special is all there: a Qwen2.5-VL as the text encoder, templates whose first 34 or 64 tokens are dropped
(the tokenizer here has the templates' words, so that these are the same 34 and 64 tokens as in the real one), a
scheduler whose shift depends on the picture's size and that ends early, a video VAE with a mean and a standard
deviation for each of 16 channels. `build_vlm` is the VLM alone, which judges and reward models are made of.
Nothing heavy is imported at the top.
"""

import json
import re
import shutil
from pathlib import Path

from tests.helpers.sd3 import _randomise

WIDTH = 32  # of the text encoder
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
PIPELINES = {"": "QwenImagePipeline", "edit": "QwenImageEditPipeline", "plus": "QwenImageEditPlusPipeline"}
# The published scheduler_config.json, as far as it says anything.
SCHEDULER = dict(
    num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9,
    base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential",
)  # fmt: skip


def build_qwen(folder: Path, edit: str = "", seed: int = 0, **transformer_changes) -> Path:
    """Write a tiny random Qwen-Image pipeline to `folder`, a function of `seed` -> the folder. `edit`: see PIPELINES.

    It draws 64 x 64 pictures unless told otherwise. `transformer_changes` replace entries of the transformer's
    configuration, e.g. zero_cond_t=True. The global generator is left as it was.
    """
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    folder = Path(folder)
    shape = {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6), **transformer_changes,
    }  # fmt: skip

    def parts():
        vae = AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
        return {"transformer": QwenImageTransformer2DModel(**shape), "vae": vae}

    kinds = {"text_encoder": "Qwen2_5_VLForConditionalGeneration", "tokenizer": "Qwen2Tokenizer"}
    _write(folder, seed, parts, SCHEDULER, PIPELINES[edit], kinds | ({"processor": "Qwen2VLProcessor"} if edit else {}))
    build_vlm(folder / "text_encoder", seed=seed, words=_words(), apart=(folder / "tokenizer", folder / "processor"))
    if edit:
        tokenizer(_words()).save_pretrained(folder / "processor")
    else:
        shutil.rmtree(folder / "processor")
    return folder


def build_qwen21(folder: Path, seed: int = 0, **transformer_changes) -> Path:
    """Write a tiny random Qwen-Image-2.1 to `folder`, a function of `seed` -> the folder. As `build_qwen`.

    What makes it special is there: a Qwen3-VL whose processor has its tokenizer, unpatched latents at a 16th of the
    size, a VAE of four channels, one shared modulation, text and sources modulated by t = 0.
    """
    from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel

    folder, channels = Path(folder), 6
    shape = {
        "in_channels": channels, "out_channels": channels, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "context_in_dim": WIDTH, "axes_dims_rope": (4, 6, 6), **transformer_changes,
    }  # fmt: skip

    def parts():
        vae = AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 2, 2], num_res_blocks=1,
            latents_mean=[0.1 * i for i in range(channels)], latents_std=[1 + 0.3 * i for i in range(channels)],
        )  # fmt: skip
        return {"transformer": QwenImage21Transformer2DModel(**shape), "vae": vae}

    kinds = {"text_encoder": "Qwen3VLForConditionalGeneration", "processor": "Qwen3VLProcessor"}
    _write(folder, seed, parts, {**SCHEDULER, "shift_terminal": None}, "QwenImage21Pipeline", kinds, sample_sigmas=None)
    build_vlm(folder / "text_encoder", "qwen3_vl", seed, apart=(folder / "processor", folder / "processor"))
    # Of the real one's chat template, what a system text becomes.
    turn = "<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n"
    (folder / "processor" / "chat_template.jinja").write_text(f"{{% for m in messages %}}{turn}{{% endfor %}}")
    return folder


def _write(folder: Path, seed: int, make, scheduler: dict, pipeline: str, kinds: dict, **about) -> None:
    """Write the parts that are diffusers', of random weights, and the list of all parts; `kinds` are transformers'."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = make()
        for part in parts.values():
            _randomise(part)
    # Random pictures would leave [-1, 1] and be clipped, and clipping hides differences.
    parts["vae"].decoder.conv_out.weight.data *= 0.1
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(**scheduler)
    index = {"_class_name": pipeline, "_diffusers_version": "0.42.0", **about}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = ["diffusers", type(part).__name__]
    index |= {name: ["transformers", kind] for name, kind in kinds.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def build_vlm(folder: Path, family: str = "qwen2_5_vl", seed: int = 0, words=(), apart=()) -> Path:
    """Write a tiny random Qwen VLM: the real network, tokenizer and image processor -> the folder.

    `apart`: folders of their own for tokenizer and image processor. `words`: see `tokenizer`.
    """
    import torch
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    read = tokenizer(words)
    beside, pictures = apart or (folder, folder)
    read.save_pretrained(beside)
    patch = 16 if family == "qwen3_vl" else 14
    edge = 2 * patch
    Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": edge**2, "longest_edge": 9 * edge**2}
    ).save_pretrained(pictures)
    text = dict(vocab_size=len(read) + 3, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, bos_token_id=None,
                eos_token_id=read.convert_tokens_to_ids("<|im_end|>"),
                rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4})  # fmt: skip
    vision = dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=WIDTH)
    if family == "qwen3_vl":
        text |= dict(head_dim=8)
        vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
        kind = transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration
    elif family == "qwen2_vl":
        vision = dict(depth=2, embed_dim=16, mlp_ratio=2, num_heads=2, hidden_size=WIDTH)
        kind = transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration
    else:
        vision |= dict(fullatt_block_indexes=[1], window_size=56)
        kind = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    marks = dict(zip(names, (read.convert_tokens_to_ids(SPECIAL[i]) for i in (5, 6, 3, 4)), strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind[1](kind[0](text_config=text, vision_config=vision, **marks))
        for name, p in network.named_parameters():  # the stock initialisation hardly depends on its input
            scale = 1.0 if "embed" in name else p[0].numel() ** -0.5 if p.ndim > 1 else 0.2
            p.data = scale * torch.randn(p.shape) + (1.0 if p.ndim == 1 and name.endswith("weight") else 0.0)
    network.save_pretrained(folder)
    return folder


def tokenizer(words=()):
    """Qwen's own tokenizer over single bytes, with Qwen's control tokens and one token for each of `words`.

    A blank before a word is written as in the vocabulary's own files, a G with a dot.
    """
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    tokens, merges = sorted(ByteLevel.alphabet()), []
    for word in sorted(words, key=lambda word: word[0] != "\u0120"):  # blanks first: a word alone must not split them
        for end in range(1, len(word)):
            if word[: end + 1] not in tokens:
                tokens.append(word[: end + 1])
                merges.append((word[:end], word[end]))
    vocabulary = {token: number for number, token in enumerate([*tokens, *SPECIAL])}
    return transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges, additional_special_tokens=list(SPECIAL[1:]))


def _words() -> list[str]:
    """The words of the stock pipelines' templates, as the tokenizer spells them."""
    from models import qwen

    text = " ".join(qwen._template(name)[0] for name in PIPELINES.values()) + "\nPicture 1:"
    for mark in (*SPECIAL, "{}"):
        text = text.replace(mark, "\n")
    return sorted({word.replace(" ", "\u0120") for word in re.findall(r" ?[A-Za-z]+|'s| \(|\),", text)})


# ------------------------------------------------------------------------------------ what the tests draw them with
def trained(model, seed=1):
    """Put a student that differs from the base on a model; alpha is not its rank."""
    from models.experts import STUDENT
    from tests.helpers.sd3 import random_lora

    state, config = random_lora(model.transformer, rank=4, alpha=12.0, seed=seed)
    model.add_adapter(STUDENT, config, state)
    return model


def picture(height, width, seed=0):
    """(3, H, W) in [0, 1], blocks of four pixels, in steps of 1/255."""
    import numpy as np
    import torch

    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    return torch.from_numpy(blocks).permute(2, 0, 1) / 255


def pil(image):
    from PIL import Image

    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def noise(model, rows, seed=7):
    import torch

    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(seed))
