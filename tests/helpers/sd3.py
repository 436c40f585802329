"""Where do the tests get a Stable Diffusion 3.5 without a download?

`build_sd35` makes one of the real classes, in the Hub's own layout, with random weights and tiny widths. What makes
SD3.5 Medium special is all there: three text encoders of different widths, normalised queries and keys, a first
block with a second attention (`attn2`), 16 latent channels at an eighth of the resolution, and a time shift of 3.
Nothing heavy is imported at the top.
"""

import json
import string
from pathlib import Path

CLIP_WIDTHS, CLIP_POOLED, T5_WIDTH = (16, 24), (12, 20), 48  # 16 + 24 < 48: the padding of SD3's conditioning is real
# Widths of the two CLIPs, of their pooled outputs, and of T5; the VAE's channels, layers a block, groups of a norm.
SIZES = (CLIP_WIDTHS, CLIP_POOLED, T5_WIDTH, (8, 8, 12, 12), 1, 4)
REAL_SIZES = ((768, 1280), (768, 1280), 4096, (128, 256, 512, 512), 2, 32)
START, END = "<|startoftext|>", "<|endoftext|>"


def build_sd35(folder: Path, seed: int = 0, real: bool = False, **transformer_changes) -> Path:
    """Write a tiny random StableDiffusion3Pipeline to `folder`, a function of `seed` -> the folder.

    It draws 64 x 64 pictures unless told otherwise, up to 192 x 192. real: SD3.5-M's own transformer and VAE in
    bfloat16, 4.5 GB, with text encoders of its widths and two layers. `transformer_changes` replace entries of the
    transformer's configuration, e.g. num_layers=2. The global generator is left as it was.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    from harness.plan import SD35_MEDIUM

    folder = Path(folder)
    sizes = REAL_SIZES if real else SIZES
    shape = {key: value for key, value in SD35_MEDIUM.items() if key != "_class_name"} if real else {
        "sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 3,
        "attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32, "pos_embed_max_size": 12,
        "joint_attention_dim": T5_WIDTH, "pooled_projection_dim": sum(CLIP_POOLED),
        "qk_norm": "rms_norm", "dual_attention_layers": (0,),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"transformer": SD3Transformer2DModel(**{**shape, **transformer_changes}), **_encoders(*sizes[:3])}
        parts["vae"] = _vae(*sizes[3:])
        for part in parts.values():
            _randomise(part.to(torch.bfloat16 if real else torch.float32))
        # Random pictures would leave [-1, 1] and be clipped, and clipping hides differences.
        parts["vae"].decoder.conv_out.weight.data *= 0.3
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    StableDiffusion3Pipeline(**parts, **_tokenizers(folder), scheduler=scheduler).save_pretrained(folder)
    return folder


def random_lora(transformer, rank: int, alpha: float, seed: int):
    """Non-zero random factors for every LoRA target of a transformer: ({module.lora_A.weight: ...}, LoraConfig).

    All of them change the velocity but the last block's `add_q_proj`: SD3 drops the text's side of its attention.
    """
    import torch

    from models import lora as adapters

    rng, state = torch.Generator().manual_seed(seed), {}
    for name, layer in transformer.named_modules():
        if any(name.endswith(f".{target}") for target in adapters.TARGETS):
            state[f"{name}.lora_A.weight"] = 0.2 * torch.randn(rank, layer.in_features, generator=rng)
            state[f"{name}.lora_B.weight"] = 0.2 * torch.randn(layer.out_features, rank, generator=rng)
    return state, adapters.lora_config(rank, alpha)


def _vae(channels, layers, groups):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels, layers_per_block=layers, norm_num_groups=groups, latent_channels=16,
        sample_size=64, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def _encoders(widths, pools, t5_width) -> dict:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    size, encoders = len(_clip_vocabulary()), {}
    for name, width, pooled in zip(("text_encoder", "text_encoder_2"), widths, pools, strict=True):
        config = CLIPTextConfig(
            vocab_size=size, hidden_size=width, intermediate_size=2 * width, projection_dim=pooled,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77, hidden_act="gelu",
            bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
        )  # fmt: skip
        encoders[name] = CLIPTextModelWithProjection(config)
    config = T5Config(
        vocab_size=len(_t5_vocabulary()), d_model=t5_width, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    encoders["text_encoder_3"] = T5EncoderModel(config)
    return encoders


def _randomise(module) -> None:
    """Random values everywhere, norms and biases included, that keep activations near one: each weight matters."""
    import torch

    for name, p in module.named_parameters():
        if p.ndim > 1 and "gamma" not in name:
            fan_in = 1 if "embedding" in name or "shared" in name else p[0].numel()  # a lookup has no sum to tame
            p.data.copy_(torch.randn(p.shape) / fan_in**0.5)
        else:
            p.data.copy_(0.2 * torch.randn(p.shape) + (0.0 if name.endswith("bias") else 1.0))
    module.eval()


# ------------------------------------------------------------------------------------------------- tokenizers
def _tokenizers(folder: Path) -> dict:
    """Two CLIP tokenizers from vocab.json and merges.txt as on the Hub, and a T5 one over single characters."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    made = {}
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):  # SD3's second one pads with exclamation marks
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "vocab.json").write_text(json.dumps(_clip_vocabulary(), ensure_ascii=False), encoding="utf-8")
        (folder / name / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        made[name] = CLIPTokenizer.from_pretrained(folder / name, pad_token=pad, model_max_length=77)
    scores = [(token, 0.0 if number < 3 else -2.0) for number, token in enumerate(_t5_vocabulary())]
    made["tokenizer_3"] = T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=512)
    return made


def _clip_vocabulary() -> dict[str, int]:
    """All 256 bytes in CLIP's printable spelling, each inside a word and at its end: any text can be encoded."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), START, END]
    return {token: number for number, token in enumerate(tokens)}


def _t5_vocabulary() -> list[str]:
    """T5's special tokens, its space, and characters; what is not among them becomes <unk>, as in the real one."""
    latin = [chr(code) for code in range(161, 256)]
    return ["<pad>", "</s>", "<unk>", "▁", *string.printable.split(" ")[0], *latin, *"‘’“”–—…₂⅓"]
