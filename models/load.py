"""Which model is in a folder?"""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from models.flow import FlowModel
from models.hub import (
    TRANSFORMER_FILES,
    ModelError,
    fingerprint,
    locate,
    read_json,
    read_part,
    read_transformer,
    require_parts,
)  # fmt: skip
from models.qwen import PIPELINES, QwenFlow, QwenModel
from models.sd3 import SD35Model
from models.tiny import load_tiny

# What a base checkpoint consists of, in the Hub's layout; nothing else of a repository is fetched.
BASE_FILES = (
    "model_index.json", "scheduler/*.json", "tokenizer*/*", "processor/*.json", *TRANSFORMER_FILES,
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder*/config.json",
    "text_encoder*/model.safetensors", "text_encoder*/model.safetensors.index.json",
    "text_encoder*/model-0*.safetensors",
)  # fmt: skip


def load(
    where: str, device: torch.device | str = "cpu", tiny: bool = False, precision: str = "float32",
    resolution: int = 512, text_length: int = 256, source_resolution: int = 0, rescale: bool = False,
    gradient_checkpointing: bool = False, compiled: bool = False,
) -> FlowModel:  # fmt: skip
    """The base of a run, frozen, on `device`, from a folder or Hub id: a tiny model, SD3.5 or a Qwen-Image.

    The options behind `tiny` are of the published models, of which the transformer is read now and the rest when it is
    needed. ModelError, one line, for what is no such model, or cannot be.
    """
    folder = locate(where, BASE_FILES)
    if tiny:
        model: FlowModel = load_tiny(folder, device)  # it keeps its source: the folder, a run's last checkpoint
    else:
        model = _published(folder, device, precision, resolution, text_length, source_resolution)
        model.precision, model.source = precision, where  # a Hub id stays one: adapters name their base by it
        if gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
        if compiled:
            model.compile()
    for flag, given in (("--cfg-rescale", rescale), ("--source-resolution", source_resolution)):
        if given and not isinstance(model, QwenFlow):
            raise ModelError(f"{flag} is for Qwen-Image, and {where} is none: leave it out")
    if rescale:
        model.rescale = True
    return model


def _published(folder: Path, device, precision: str, side: int, text_length: int, source_side: int) -> FlowModel:
    file, known = folder / "model_index.json", (SD35Model.pipeline, *PIPELINES)
    name = (index := read_json(file)).get("_class_name")
    if name not in known:
        raise ModelError(f"{file}: a {name}; the known ones are {', '.join(known)}")
    # transformers makes up a tokenizer without a word, and a VAE is missed at the first picture, hours later.
    kinds = ("tokenizer", "text_encoder", "processor", "vae")
    require_parts(folder, [part for part in index if part.startswith(kinds)])
    scheduler = read_part(FlowMatchEulerDiscreteScheduler, folder / "scheduler")
    like = {"_class_name": ("QwenImage" if name in PIPELINES else "SD3") + "Transformer2DModel"}
    transformer = read_transformer(folder / "transformer", getattr(torch, precision), like)
    if name in PIPELINES:
        model = QwenModel(folder, name, transformer, scheduler, device, side, source_side or side, text_length)
    else:
        model = SD35Model(folder, transformer, scheduler, device, side, text_length)
    model.fingerprint = fingerprint(folder / "transformer")
    return model
