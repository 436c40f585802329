"""How large is a transformer of either architecture, and what does a forward of it keep?

    parameters     exact, from the config: of diffusers' `SD3Transformer2DModel` (Stable Diffusion 3.5) and
                   `QwenImageTransformer2DModel` (Qwen-Image, Qwen-Image-Edit), and of a LoRA on either
    activations    bytes that autograd keeps, by tokens and channels; the constants are measured
    pictures       bytes that a VAE needs for a pixel, measured

No model is loaded and nothing is imported: `cost.py` adds these up for a run. A config is the dictionary of a
checkpoint's transformer/config.json; `_class_name` in it names the architecture, SD3's where there is none.
"""

from collections.abc import Sequence

SD3, QWEN = "SD3Transformer2DModel", "QwenImageTransformer2DModel"
# The transformer of Stable Diffusion 3.5 Medium as published; assumed where the model is a Hub id.
SD35_MEDIUM = {
    "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "pos_embed_max_size": 384, "sample_size": 128,
}  # fmt: skip
SD35_ENCODERS = 120_000_000 + 690_000_000 + 4_760_000_000  # CLIP-L, CLIP-G and the encoder of T5-XXL
SD35_VAE = 84_000_000
# Qwen-Image's, and that of its editing models; assumed of a Hub id with "Qwen-Image" in it.
QWEN_IMAGE = {
    "_class_name": QWEN, "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
    "guidance_embeds": False,
}  # fmt: skip
QWEN_VL_7B = 8_290_000_000  # Qwen2.5-VL-7B: Qwen-Image's text encoder, and the judges' default
QWEN_VAE = 127_000_000
CLIP_TOKENS = 77  # SD3: stand before T5's in the text sequence
# Qwen-Image-Edit reads the source into its text too: resized to 384 x 384, then to multiples of 28, one token for each
# 28 x 28 pixels.
PICTURE_TOKENS = (392 // 28) ** 2
IMAGE_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # projections of an attention, by the stream that they serve
TEXT_LAYERS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# Importing these of `adapters` would cost seconds; a test holds the copies to the originals.
TARGETS = tuple(f"attn.{name}" for name in (*IMAGE_LAYERS, *TEXT_LAYERS))
# Bytes that autograd keeps in one block for every token and channel, by what trains and by the bytes b of a number;
# measured. SD3: first a block with one attention, then what qk_norm adds to each attention, then what a second
# attention on the image tokens adds. A frozen weight needs no input kept, hence LoRA's smaller numbers; under autocast
# norms stay float32.
KEPT = {("lora", 4): (48, 8, 16), ("lora", 2): (28, 12, 8), ("full", 4): (84, 16, 24), ("full", 2): (42, 20, 12)}
# Qwen-Image: first a block (it always has its norms, and turns queries and keys in float32), then what an image token
# adds where the source's tokens have a modulation of their own (`zero_cond_t`, Qwen-Image-Edit-2511).
KEPT_QWEN = {("lora", 4): (57, 16), ("lora", 2): (41, 8), ("full", 4): (101, 16), ("full", 2): (62, 8)}
# Bytes a pixel that a VAE needs to decode, and to encode. SD3's last blocks work on 256 float32 maps of full
# resolution, of which about four are alive at once (measured: 0.97 GiB at 512 px); Qwen-Image's is one of videos, whose
# convolutions look at three frames. Pictures are decoded one by one.
VAE_PIXEL = {SD3: 4 * 256 * 4, QWEN: 7 * 1024}
VAE_READS = {SD3: 4 * 256 * 4, QWEN: 4 * 1024}


# -------------------------------------------------------------------------------------------------- parameters
def architecture(config: dict) -> str:
    """`SD3` or `QWEN`. ValueError for any other."""
    name = config.get("_class_name", SD3)
    if name not in (SD3, QWEN):
        raise ValueError(f"_class_name {name!r}")
    return name


def is_qwen(config: dict) -> bool:
    """Is this Qwen-Image's architecture?"""
    return architecture(config) == QWEN


def latent_channels(config: dict) -> int:
    """C of a latent (C, H, W): Qwen-Image's config counts the channels of a packed patch."""
    return config["in_channels"] // (config["patch_size"] ** 2 if is_qwen(config) else 1)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def width(config: dict) -> int:
    """W: channels of a token."""
    return config["num_attention_heads"] * config["attention_head_dim"]


def _dual(config: dict, layer: int) -> bool:
    return layer in (config.get("dual_attention_layers") or ())


def _mlp(w: int) -> int:
    return _linear(w, 4 * w) + _linear(4 * w, w)


def block_parameters(config: dict, layer: int) -> int:
    """One joint block of an image and a text stream; SD3's last text stream ends at the attention."""
    w, dual = width(config), _dual(config, layer)
    last = layer == config["num_layers"] - 1 and not is_qwen(config)
    normed = is_qwen(config) or config.get("qk_norm")
    norm = config["attention_head_dim"] if normed else 0  # one scale for q, one for k, of each stream
    total = _linear(w, (9 if dual else 6) * w) + _linear(w, (2 if last else 6) * w)  # adaptive norms: image, text
    total += (7 if last else 8) * _linear(w, w) + 4 * norm  # q, k, v, out of both streams
    total += dual * (4 * _linear(w, w) + 2 * norm)  # attn2: the image stream with itself
    return total + (1 if last else 2) * _mlp(w)  # feed-forward of each stream


def transformer_parameters(config: dict) -> int:
    """Exact number of parameters of diffusers' transformer with this config.json.

    SD3's position embeddings are a buffer, no parameters; Qwen-Image's are computed. KeyError for a missing entry,
    ValueError for another architecture and for a `qk_norm` that SD3 does not have.
    """
    w, area = width(config), config["patch_size"] ** 2
    total = _linear(256, w) + _linear(w, w) + sum(block_parameters(config, n) for n in range(config["num_layers"]))
    outputs = config.get("out_channels") or config["in_channels"]
    total += _linear(w, 2 * w) + _linear(w, area * outputs)  # last norm, patches out
    if is_qwen(config):
        total += 2 * w if config.get("use_additional_t_cond") else 0
        text = config["joint_attention_dim"]
        return total + _linear(config["in_channels"], w) + _linear(text, w) + text  # patches in, text in and its norm
    if config.get("qk_norm") not in (None, "rms_norm"):
        raise ValueError(f"qk_norm {config['qk_norm']!r}")
    total += _linear(config["in_channels"] * area, w)  # patches in
    total += _linear(config["pooled_projection_dim"], w) + _linear(w, w)  # pooled text
    return total + _linear(config["joint_attention_dim"], config["caption_projection_dim"])


def unread_parameters(config: dict) -> int:
    """Parameters that no velocity depends on, and that are not trained (`qwen.QwenFlow.trainable`).

    Qwen-Image's last block goes on with its text after the attention, and nobody reads it; SD3's last block is made
    without these.
    """
    return _linear(width(config), width(config)) + _mlp(width(config)) if is_qwen(config) else 0


def lora_parameters(config: dict, rank: int, targets: Sequence[str] = TARGETS) -> int:
    """Exact number of parameters of a LoRA of this rank on `targets`, as PEFT injects it.

    Every projection is W -> W, with factors (rank, W) and (W, rank). PEFT matches whole dotted endings: "attn.to_q"
    leaves attn2 alone, the second attention of SD3.5's first blocks; a bare "to_q" adapts it too. SD3's last block has
    no to_add_out; Qwen-Image's has one, which nobody reads (`unread_parameters`).
    """
    modules, last = 0, -1 if is_qwen(config) else config["num_layers"] - 1
    for layer in range(config["num_layers"]):
        names = [f"attn.{name}" for name in (*IMAGE_LAYERS, *TEXT_LAYERS[: 3 if layer == last else 4])]
        names += [f"attn2.{name}" for name in IMAGE_LAYERS if _dual(config, layer)]
        modules += sum(any(f".{name}".endswith(f".{target}") for target in targets) for name in names)
    return modules * 2 * rank * width(config)


def unread_names(config: dict) -> tuple[str, ...]:
    """The modules of `unread_parameters`, as parts of tensors' names."""
    last = f"transformer_blocks.{config['num_layers'] - 1}."
    return (f"{last}attn.to_add_out.", f"{last}txt_mlp.") if is_qwen(config) else ()


# ------------------------------------------------------------------------------------------------- activations
def activations(
    config: dict, image: int, text: int, rows: int, trained: str, b: int, checkpointing: bool = False,
    gradient: bool = True,
) -> int:  # fmt: skip
    """Bytes that autograd keeps of one forward of `rows`; without gradient, those of one block at work (a bound).

    Of `image` and `text` tokens a row; a source picture's count among the image's. A block: rows x W x what KEPT or
    KEPT_QWEN says of each token. Checkpointing keeps the inputs of every block, rows x W x tokens numbers of b bytes,
    and one block's own, which backward recomputes block by block. trained: "lora" or "full".
    """
    channels, tokens = rows * width(config), image + text
    blocks = [channels * _kept(config, n, image, tokens, (trained, b)) for n in range(config["num_layers"])]
    if not gradient:
        return max(blocks)
    return len(blocks) * channels * tokens * b + max(blocks) if checkpointing else sum(blocks)


def _kept(config: dict, layer: int, image: int, tokens: int, kind: tuple[str, int]) -> int:
    if is_qwen(config):
        block, own = KEPT_QWEN[kind]
        return tokens * block + image * own * bool(config.get("zero_cond_t"))
    block, norm, second = KEPT[kind]
    norm = norm if config.get("qk_norm") else 0
    return tokens * (block + norm) + image * (second + norm) * _dual(config, layer)
