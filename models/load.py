"""What differs between the models, behind one small interface?

The stages ask a model seven things and nothing else; `flow.FlowModel` has the two that are the same for all:

    prepare(prompts, images)           encode these once and for all; the text encoders may leave afterwards
    encode(prompts, images) -> Cond    text, and an edit's source picture, -> conditioning, no gradient
    velocity(x, t, cond, uncond, cfg)  v_theta(x_t, t, c), guidance included        (flow.py)
    adapter(name)                      run as one of the experts, or as the base    (flow.py)
    decode(x) -> images in [0, 1]      latents -> pixels
    time_grid(num_steps)               the model's own scheduler grid, t = 1 (noise) ... 0 (data)
    latent_shape                       (C, H, W) of x

A picture is float (3, H, W) in [0, 1] on the CPU; a batch has one for every prompt or for none.

The tiny models are real diffusers transformers (SD3's, Qwen-Image's) over 24 x 24 pixels with a text embedding of their
own; SD3.5 is the published pipeline, read folder by folder through diffusers and transformers. Qwen-Image: qwen.py.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import sde
from data.common import first_line
from models import flow
from models import lora as adapters
from models.flow import Cond, FlowModel, fingerprint, joined, read_part, read_transformer, require_parts
from models.lora import ModelError
from models.qwen import PIPELINES, QwenFlow, load_qwen
from settings import Settings, SettingsError, is_tiny
from tiny import drawings as tiny
from tiny import edits as tiny_edit

transformers.logging.set_verbosity_error()  # the stock pipeline imports image processors that nobody uses here
from diffusers import (  # noqa: E402
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    logging,
)

logging.disable_progress_bar()
transformers.logging.disable_progress_bar()
logging.set_verbosity_error()  # CLIP reads 77 tokens of a long prompt, T5 the rest: no news for each of them

# What a base checkpoint consists of, in the Hub's layout; nothing else of a repository is fetched.
BASE_FILES = (
    "model_index.json", "scheduler/*.json", "tokenizer*/*", "processor/*.json", *adapters.TRANSFORMER_FILES,
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder*/config.json",
    "text_encoder*/model.safetensors", "text_encoder*/model.safetensors.index.json",
    "text_encoder*/model-0*.safetensors",
)  # fmt: skip


def load(s: Settings, device: torch.device | str = "cpu") -> FlowModel:
    """The base of a run, frozen, on `device`: a tiny model, SD3.5 or a Qwen-Image, as preset and folder say."""
    folder = adapters.locate(s.model, BASE_FILES)
    if is_tiny(s):
        model = load_tiny(folder, device)
        _check_rescale(s, isinstance(model, QwenFlow))
        model.rescale = s.cfg_rescale
        return model
    name = pipeline_name(folder)
    _check_rescale(s, name in PIPELINES)
    more = (device, s.precision, s.resolution, s.text_length)
    if name in PIPELINES:
        model = load_qwen(folder, name, *more, s.source_resolution, s.cfg_rescale)
    else:
        model = load_sd35(folder, *more)
    model.source = s.model  # a Hub id stays one: adapters name their base by it
    if s.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
    return model


def _check_rescale(s: Settings, qwen: bool) -> None:
    if s.cfg_rescale and not qwen:
        raise SettingsError(f"--cfg-rescale is Qwen-Image's guidance, and {s.model} is none: leave it out")


def pipeline_name(folder: Path) -> str:
    """The class of a diffusers pipeline, one that is known here; ModelError, one line, for anything else."""
    index = folder / "model_index.json"
    try:
        name = json.loads(index.read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as fault:
        reason = "missing" if isinstance(fault, FileNotFoundError) else f"not readable ({first_line(fault)})"
        small = (folder / "text_encoder").is_dir() and not (folder / "vae").is_dir()
        hint = "; a base of the tiny world needs --preset tiny or tiny-qwen" if small else ""
        raise ModelError(f"{index}: {reason}; --model must be a pipeline in diffusers' layout{hint}") from fault
    if name not in (SD35Model.pipeline, *PIPELINES):
        raise ModelError(f"{index}: a {name}; the known ones are {', '.join((SD35Model.pipeline, *PIPELINES))}")
    return name


# -------------------------------------------------------------------------------------------------- the tiny model
class TinyTextEncoder(nn.Module):
    """Word and position embeddings; SD3's joint attention does the rest. Trained in `--stage pretrain` only."""

    def __init__(self, dim: int, words: int):
        super().__init__()
        self.word = nn.Embedding(words, dim)
        self.place = nn.Embedding(tiny.MAX_TOKENS, dim)

    def forward(self, tokens: Tensor) -> Cond:
        embedded = self.word(tokens) + self.place.weight  # (B, S, C)
        return Cond(embedded, embedded.mean(1))


class TinyModel(FlowModel):
    """The tiny world's model: pixels instead of latents, words instead of text encoders."""

    train_shift = 0.4  # in so small an image content is decided early: train more at high noise than SD3 does
    latent_shape = (3, tiny.SIZE, tiny.SIZE)
    tokenize = staticmethod(tiny.tokenize)

    def __init__(self, transformer: flow.Transformer, text_encoder: nn.Module, device: torch.device | str = "cpu"):
        super().__init__(transformer, device)
        self.text_encoder = text_encoder.to(self.device)

    def encode(self, prompts: Sequence[str], images: Sequence[Tensor | None] | None = None) -> Cond:
        """Prompts -> Cond, without gradient; ValueError where a prompt lies outside the vocabulary."""
        with torch.no_grad():
            return self.encode_tokens(torch.tensor([self.tokenize(p) for p in prompts]), images)

    def encode_tokens(self, tokens: Tensor, images: Sequence[Tensor | None] | None = None) -> Cond:
        """Token ids (B, S) -> Cond with gradient: pretraining learns the embeddings through it."""
        if images is not None and any(image is not None for image in images):
            raise ModelError(f"{self.source}: this model draws and does not edit; give one of the tiny-qwen world")
        return self.text_encoder(tokens.to(self.device))

    def decode(self, x: Tensor) -> Tensor:
        """Latents -> images (B, 3, H, W) in [0, 1] on the CPU. The model works on pixels in [-1, 1]: no VAE."""
        return (x.float() / 2 + 0.5).clamp(0, 1).cpu()

    def latents(self, images: Tensor) -> Tensor:
        """The inverse of `decode` for images in [0, 1]: what pretraining (F Eq. 1, Q Eq. 2) works on."""
        return (images * 2 - 1).to(self.device)

    def time_grid(self, num_steps: int) -> Tensor:
        return sde.time_grid(num_steps)

    def trainable(self) -> dict[str, nn.Parameter]:
        """As any model's; before there is a student, everything, the text encoder included (pretraining)."""
        if self.trains:
            return super().trainable()
        whole = [("transformer", self.transformer), ("text_encoder", self.text_encoder)]
        return {f"{part}.{name}": p for part, module in whole for name, p in module.named_parameters()}

    def save_full(self, folder: Path, state: dict[str, Tensor]) -> None:
        super().save_full(folder, state)
        (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
        words = {key: value.detach().cpu().contiguous() for key, value in self.text_encoder.state_dict().items()}
        safetensors.torch.save_file(words, folder / "text_encoder" / "model.safetensors")


class TinyQwenModel(QwenFlow, TinyModel):
    """The tiny-qwen world's: Qwen-Image's transformer in place of SD3's, and a second task, editing."""

    tokenize = staticmethod(tiny_edit.tokenize)

    def encode_tokens(self, tokens: Tensor, images: Sequence[Tensor | None] | None = None) -> Cond:
        """Token ids (B, S), and the source pictures of edits, -> Cond with gradient."""
        cond, source = self.text_encoder(tokens.to(self.device)), None
        if images is not None and any(image is not None for image in images):
            if any(image is None or image.shape != self.latent_shape for image in images):
                raise ModelError(f"this world's source pictures are {tiny.SIZE} x {tiny.SIZE} pixels, one an edit")
            source = self.latents(torch.stack(list(images)))
        return Cond(cond.tokens, None, (tokens > 0).to(self.device), source)


def new_tiny(
    seed: int, width: int = 96, layers: int = 3, device: torch.device | str = "cpu", qwen: bool = False
) -> TinyModel:
    """A freshly initialised tiny model: 0.98 M parameters at the default size; Qwen-Image's architecture: 1.04 M."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if qwen:
            transformer = QwenImageTransformer2DModel(
                patch_size=4, in_channels=48, out_channels=3, num_layers=layers, attention_head_dim=32,
                num_attention_heads=width // 32, joint_attention_dim=width, axes_dims_rope=(8, 12, 12),
            )  # fmt: skip
            return TinyQwenModel(transformer, TinyTextEncoder(width, len(tiny_edit.VOCABULARY)), device)
        transformer = SD3Transformer2DModel(
            sample_size=tiny.SIZE, patch_size=4, in_channels=3, out_channels=3, num_layers=layers,
            attention_head_dim=32, num_attention_heads=width // 32, joint_attention_dim=width,
            caption_projection_dim=width, pooled_projection_dim=width, pos_embed_max_size=tiny.SIZE // 4,
        )  # fmt: skip
        return TinyModel(transformer, TinyTextEncoder(width, len(tiny.VOCABULARY)), device)


def load_tiny(folder: Path, device: torch.device | str = "cpu") -> TinyModel:
    """Read a base checkpoint of `--stage pretrain`, frozen; ModelError names what is missing or unreadable."""
    words = folder / "text_encoder" / "model.safetensors"
    if (folder / "model_index.json").is_file():
        raise ModelError(f"{folder}: a diffusers pipeline, not a base of the tiny world: leave --preset tiny out")
    if not words.is_file():
        raise ModelError(f"{words}: missing; is {folder} a base checkpoint? `--stage pretrain` writes one")
    transformer = read_transformer(folder, torch.float32)
    qwen = isinstance(transformer, QwenImageTransformer2DModel)
    vocabulary = tiny_edit.VOCABULARY if qwen else tiny.VOCABULARY
    try:
        text_encoder = TinyTextEncoder(transformer.config.joint_attention_dim, len(vocabulary))
        text_encoder.load_state_dict(safetensors.torch.load_file(words))
    except Exception as fault:
        raise ModelError(f"{words}: not readable ({first_line(fault)})") from fault
    model = (TinyQwenModel if qwen else TinyModel)(transformer, text_encoder.requires_grad_(False), device)
    model.source, model.fingerprint = str(folder), fingerprint(folder / "transformer")
    return model


# --------------------------------------------------------------------------------------- Stable Diffusion 3.5
class SD35Model(FlowModel):
    """Stable Diffusion 3.5: three text encoders that are used once, a VAE that is loaded when a picture is wanted."""

    pipeline = "StableDiffusion3Pipeline"
    train_shift = math.log(3.0)  # a logit-normal shifted as SD3's grid is (3t / (1 + 2t)) is one around log 3

    def __init__(self, folder: Path, transformer, scheduler, device, resolution: int, text_length: int):
        super().__init__(transformer, device)
        self.folder, self.scheduler, self.text_length = folder, scheduler, text_length
        self.latent_shape = (transformer.config.in_channels, resolution // 8, resolution // 8)
        self.known: dict[str, Cond] = {}  # prompt -> its Cond of one row, in host memory
        self._vae: AutoencoderKL | None = None

    @torch.no_grad()
    def prepare(self, prompts: Iterable[str], images: Iterable[Tensor | None] | None = None) -> None:
        """Encode each distinct prompt that is not known yet, then let the text encoders (10 GB) go.

        One prompt at a time: a row computed in another batch differs in its last bits, and a resumed run, which
        has fewer prompts left to encode, would not be the same run.
        """
        if images is not None and any(image is not None for image in images):
            raise ModelError(f"{self.source}: SD3.5 draws and does not edit; give a Qwen-Image-Edit as --model")
        fresh = [p for p in dict.fromkeys(prompts) if p not in self.known]
        if not fresh:
            return
        encoders = _read_text_encoders(self.folder, self._dtype()).to(self.device)
        for prompt in tqdm(fresh, desc="encoding prompts", leave=False, disable=len(fresh) < 32):
            tokens, _, pooled, _ = encoders.encode_prompt(
                prompt, None, None, device=self.device, do_classifier_free_guidance=False,
                max_sequence_length=self.text_length,
            )  # fmt: skip
            self.known[prompt] = Cond(tokens.cpu(), pooled.cpu())
        del encoders
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, prompts: Sequence[str], images: Sequence[Tensor | None] | None = None) -> Cond:
        """Prompts -> Cond on the device, from what `prepare` left; unknown ones are encoded now."""
        self.prepare(prompts, images)
        return joined([self.known[p] for p in prompts]).to(self.device)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents -> images (B, 3, H, W) in [0, 1] on the CPU, through the VAE in float32 (bfloat16 shows bands)."""
        if self._vae is None:
            self._vae = read_part(AutoencoderKL, self.folder / "vae", torch.float32).to(self.device)
        config, images = self._vae.config, []
        for row in x.float().split(1):  # one at a time: its memory, not its speed, is what matters here
            decoded = self._vae.decode(row / config.scaling_factor + config.shift_factor, return_dict=False)[0]
            images.append((decoded / 2 + 0.5).clamp(0, 1).cpu())
        return torch.cat(images)

    def time_grid(self, num_steps: int) -> Tensor:
        """The scheduler's own grid (N+1,): shifted, and with SD3's last step from sigma 0.009 at ten steps."""
        self.scheduler.set_timesteps(num_steps)
        return self.scheduler.sigmas.clone()


def _read_text_encoders(folder: Path, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """The stock pipeline with its tokenizers and text encoders only."""
    kinds = {"text_encoder": transformers.CLIPTextModelWithProjection, "text_encoder_3": transformers.T5EncoderModel}
    kinds["text_encoder_2"] = kinds["text_encoder"]
    encoders = {name: read_part(kind, folder / name, dtype) for name, kind in kinds.items()}
    try:
        return StableDiffusion3Pipeline.from_pretrained(folder, transformer=None, vae=None, **encoders)
    except Exception as fault:
        raise ModelError(f"{folder}: its tokenizers are not readable ({first_line(fault)})") from fault


def load_sd35(folder: Path, device="cpu", precision="float32", resolution: int = 512, text_length=256) -> SD35Model:
    """Read Stable Diffusion 3.5 from a folder in the Hub's layout: now the transformer, the rest when it is needed."""
    require_parts(folder, ("tokenizer", "tokenizer_2", "tokenizer_3", "vae"))
    scheduler = read_part(FlowMatchEulerDiscreteScheduler, folder / "scheduler")
    transformer = read_transformer(folder / "transformer", getattr(torch, precision))
    side, largest = resolution // 8, transformer.config.pos_embed_max_size * transformer.config.patch_size
    if side > largest:
        raise ModelError(f"{folder}: --resolution {resolution} is more than the model's largest, {largest * 8}")
    model = SD35Model(folder, transformer, scheduler, device, resolution, text_length)
    model.precision, model.source, model.fingerprint = precision, str(folder), fingerprint(folder / "transformer")
    return model
