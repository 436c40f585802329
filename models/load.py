"""Which model is in a folder?"""

from pathlib import Path

import torch

from models import qwen
from models.flow import FlowModel
from models.hub import TRANSFORMER_FILES, ModelError, locate, read_json
from models.sd3 import SD35Model, load_sd35
from models.tiny import TinyModel, TinyQwenModel, load_tiny, new_tiny  # noqa: F401  for callers that have not moved

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
    gradient_checkpointing: bool = False,
) -> FlowModel:  # fmt: skip
    """The base of a run, frozen, on `device`, from a folder or Hub id: a tiny model, SD3.5 or a Qwen-Image.

    The options behind `tiny` are of the published models. ModelError, one line, for what is no such model.
    """
    folder = locate(where, BASE_FILES)
    name = "" if tiny else pipeline_name(folder)
    if tiny:
        model: FlowModel = load_tiny(folder, device)  # it keeps its source: the folder, a run's last checkpoint
    elif name in qwen.PIPELINES:
        model = qwen.load_qwen(folder, name, device, precision, resolution, text_length, source_resolution)
    else:
        model = load_sd35(folder, device, precision, resolution, text_length)
    if rescale and not isinstance(model, qwen.QwenFlow):
        raise ModelError(f"--cfg-rescale is Qwen-Image's guidance, and {where} is none: leave it out")
    if rescale:
        model.rescale = True
    if not tiny:
        model.source = where  # a Hub id stays one: adapters name their base by it
        if gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
    return model


def pipeline_name(folder: Path) -> str:
    """The class of a diffusers pipeline, one that is known here; ModelError, one line, for anything else."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"{index}: missing; --model must be a pipeline in diffusers' layout, or with --preset tiny or tiny-qwen "
            "a base of that world"
        )
    name, known = read_json(index).get("_class_name"), (SD35Model.pipeline, *qwen.PIPELINES)
    if name not in known:
        raise ModelError(f"{index}: a {name}; the known ones are {', '.join(known)}")
    return name
