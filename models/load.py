"""Which model is in a folder?"""

import math
import os
from pathlib import Path

import huggingface_hub
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from models.flow import FlowModel
from models.hub import (
    TRANSFORMER_FILES,
    ModelError,
    base_and_revision,
    fingerprint,
    hub_id,
    locate,
    read_json,
    read_part,
    read_transformer,
    require_parts,
)  # fmt: skip
from models.qwen import DRAWS, EDITS, PIPELINES, QwenFlow, QwenModel, QwenPublished
from models.qwen21 import PIPELINE as QWEN21
from models.qwen21 import Qwen21Flow, Qwen21Model
from models.sd3 import SD35Model
from models.tiny import load_tiny

# How each transformer is asked for its velocity.
FLOWS = {
    "SD3Transformer2DModel": FlowModel, "QwenImageTransformer2DModel": QwenFlow,
    "QwenImage21Transformer2DModel": Qwen21Flow,
}  # fmt: skip
# What a base checkpoint consists of, in the Hub's layout; nothing else of a repository is fetched.
BASE_FILES = (
    "model_index.json", "scheduler/*.json", "tokenizer*/*", "processor/*", *TRANSFORMER_FILES,
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder*/config.json",
    "text_encoder*/model.safetensors", "text_encoder*/model.safetensors.index.json",
    "text_encoder*/model-0*.safetensors",
)  # fmt: skip


def load(
    where: str, device: torch.device | str = "cpu", tiny: bool = False, precision: str = "float32",
    size: tuple[int, int] = (512, 512), text_length: int = 256, source_resolution: int = 0, rescale: bool = False,
    gradient_checkpointing: bool = False, compiled: bool = False,
) -> FlowModel:  # fmt: skip
    """The base of a run, frozen, on `device`, from a folder or Hub id: a tiny model, SD3.5 or a Qwen-Image.

    The options behind `tiny` are of the published models, of which the transformer is read now and the rest when it is
    needed. size: (width, height) of pictures, in pixels. ModelError, one line, for what is no such model, or cannot be.
    """
    folder = locate(where, BASE_FILES)
    if tiny:
        model: FlowModel = load_tiny(folder, device)  # it keeps its source: the folder, a run's last checkpoint
    else:
        model = _published(folder, device, precision, size, text_length, source_resolution)
        model.precision, model.source = precision, where  # a Hub id stays one: adapters name their base by it
        if gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
        if compiled:
            model.compile()
    for flag, given, kind in (
        ("--cfg-rescale", rescale, QwenFlow), ("--source-resolution", source_resolution, (QwenFlow, QwenPublished))
    ):  # fmt: skip
        if given and not isinstance(model, kind):
            raise ModelError(f"{flag} is for Qwen-Image, and {where} is none: leave it out")
    if rescale:
        model.rescale = True
    return model


def most_sources(where: str) -> float:
    """How many source pictures an edit of a published model may have, by its index alone; inf if nobody can say yet."""
    file = Path(where).expanduser() / "model_index.json"
    if repo := hub_id(where):
        revision = base_and_revision(where)[1] or None
        file = Path(str(huggingface_hub.try_to_load_from_cache(repo, "model_index.json", revision=revision)))
    name = read_json(file).get("_class_name") if os.path.isfile(file) else None
    known = {name: editor.most for name, editor in EDITS.items()} | {QWEN21: Qwen21Model.most_sources}
    return known.get(name, 0 if name in (DRAWS, SD35Model.pipeline) else math.inf)


def _published(folder: Path, device, precision: str, size, text_length: int, source_side: int) -> FlowModel:
    file, known = folder / "model_index.json", {SD35Model.pipeline: "SD3", **dict.fromkeys(PIPELINES, "QwenImage"),
                                                QWEN21: "QwenImage21"}  # fmt: skip
    name = (index := read_json(file)).get("_class_name")
    if name not in known:
        raise ModelError(f"{file}: a {name}; the known ones are {', '.join(known)}")
    # transformers makes up a tokenizer without a word, and a VAE is missed at the first picture, hours later.
    kinds = ("tokenizer", "text_encoder", "processor", "vae")
    require_parts(folder, [part for part in index if part.startswith(kinds)])
    scheduler = read_part(FlowMatchEulerDiscreteScheduler, folder / "scheduler")
    like = {"_class_name": f"{known[name]}Transformer2DModel"}
    transformer = read_transformer(folder / "transformer", getattr(torch, precision), like)
    parts = (folder, transformer, scheduler, device, size)
    if name == SD35Model.pipeline:
        model = SD35Model(*parts, text_length)
        if max(size) > (most := 8 * transformer.config.patch_size * transformer.config.pos_embed_max_size):
            raise ModelError(f"{folder}: a side of {max(size)} pixels; this model has places for {most}")
    elif name == QWEN21:
        model = Qwen21Model(*parts, source_side, text_length)
        model.sigmas = index.get("sample_sigmas")
    else:
        model = QwenModel(name, *parts, source_side, text_length)
    model.fingerprint = fingerprint(folder / "transformer")
    return model
