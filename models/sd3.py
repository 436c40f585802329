"""Stable Diffusion 3.5: two CLIPs and a T5 read the text, and time is shifted by 3."""

import math

import diffusers
import transformers
from torch import Tensor

from models.flow import Cond
from models.hub import read_part, reading
from models.published import Published


class SD35Model(Published):
    pipeline = "StableDiffusion3Pipeline"
    train_shift = math.log(3.0)  # a logit-normal shifted as SD3's grid is (3t / (1 + 2t)) is one around log 3

    def read_encoders(self) -> diffusers.StableDiffusion3Pipeline:
        """The stock pipeline with its tokenizers and text encoders (10 GB) only."""
        clip, dtype = transformers.CLIPTextModelWithProjection, self._dtype()
        kinds = {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": transformers.T5EncoderModel}
        parts = {name: read_part(kind, self.folder / name, dtype) for name, kind in kinds.items()} | {"vae": None}
        with reading(self.folder, "a pipeline with tokenizers"):
            pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(self.folder, transformer=None, **parts)
        return pipe.to(self.device)

    def encode_row(self, encoders: diffusers.StableDiffusion3Pipeline, prompt: str, pictures: tuple) -> Cond:
        tokens, _, pooled, _ = encoders.encode_prompt(
            prompt, None, None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )  # fmt: skip
        return Cond(tokens, pooled)

    def length(self, encoders: diffusers.StableDiffusion3Pipeline, prompt: str, pictures: int) -> int:
        return len(encoders.tokenizer_3(prompt).input_ids)  # T5's; the CLIPs read 77 tokens of any prompt

    def pixels(self, latents: Tensor) -> Tensor:
        config = self.vae().config
        return self.vae().decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]

    def time_grid(self, num_steps: int) -> Tensor:
        """The scheduler's own grid (N+1,): shifted, and with SD3's last step from sigma 0.009 at ten steps."""
        self.scheduler.set_timesteps(num_steps)
        return self.scheduler.sigmas.clone()
