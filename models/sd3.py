"""Stable Diffusion 3.5: three text encoders that are used once, a VAE that is loaded when a picture is wanted."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from tqdm import tqdm

from data.common import first_line
from models.flow import Cond, FlowModel, joined
from models.hub import ModelError, fingerprint, read_part, read_transformer, require_parts


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


def _read_text_encoders(folder: Path, dtype: torch.dtype) -> "diffusers.StableDiffusion3Pipeline":
    """The stock pipeline with its tokenizers and text encoders only."""
    kinds = {"text_encoder": transformers.CLIPTextModelWithProjection, "text_encoder_3": transformers.T5EncoderModel}
    kinds["text_encoder_2"] = kinds["text_encoder"]
    encoders = {name: read_part(kind, folder / name, dtype) for name, kind in kinds.items()}
    try:
        return diffusers.StableDiffusion3Pipeline.from_pretrained(folder, transformer=None, vae=None, **encoders)
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
