"""The model card of a checkpoint: README.md with the Hub's front matter, how to load it, how it was made."""

import json
import re
from collections.abc import Mapping

from huggingface_hub import ModelCardData

from models.hub import LORA_FILE, base_and_revision, hub_id


def model_card(settings: Mapping, metrics: Mapping, scores: Mapping, step: int, pipeline: str = "") -> str:
    """README.md of a checkpoint's folder, an adapter's or a whole transformer's.

    `settings` are the run's resolved settings, `metrics` the last line of metrics.jsonl, `scores` {name: number} of the
    last evaluation; `pipeline` is the diffusers class that loads the adapter, "" if there is none. A base that is a
    local path is left out of the front matter, which the Hub would refuse. Whatever a user may have written stands as
    JSON or as a Python string in a block of code, where nothing is taken for Markdown.
    """
    whole = settings.get("parameters") == "full" or settings.get("stage") == "pretrain"
    does = ["image-to-image", "text-to-image"] if "Edit" in pipeline else ["text-to-image"]  # an editor draws too
    front = ModelCardData(
        base_model=hub_id(str(settings.get("model", ""))) or None,
        library_name="diffusers",
        pipeline_tag=does[0],
        tags=[*([] if whole else ["lora", "peft"]), *does, "flow-matching", "reinforcement-learning"],
    )
    record = {
        "step": step, "scores": scores, "last training metrics": metrics,
        "settings": {key: value for key, value in settings.items() if value not in ("", None, {}, [])},
    }  # fmt: skip
    name = re.sub(r"[^\w.-]+", " ", str(settings.get("name", "")))
    parts = [
        "---", front.to_yaml(), "---", "", f"# {name}", "",
        "A whole transformer." if whole else "A LoRA adapter; its update is `alpha / r * B @ A`.", "",
        "## How to load it", "", "```python", _code(settings, pipeline, whole), "```", "",
        "## How it was trained", "", "```json", json.dumps(record, indent=1, default=str), "```", "",
    ]  # fmt: skip
    return "\n".join(parts)


def _code(settings: Mapping, pipeline: str, whole: bool) -> str:
    """Python that loads the checkpoint and draws as the run drew its student's pictures."""
    base, revision = base_and_revision(str(settings.get("model", "")))
    base = repr(base) + (f", revision={revision!r}" if revision else "")  # Python strings, whatever is in them
    dtype, transformer, here = "torch_dtype=torch.bfloat16", 'subfolder="transformer"', '"path/to/this/folder"'
    if not pipeline:
        lines = [f"transformer = AutoModel.from_pretrained({here if whole else base}, {transformer})"]
        if not whole:
            lines += ["from peft import PeftModel", "", f"transformer = PeftModel.from_pretrained(transformer, {here})"]
        return "\n".join(["from diffusers import AutoModel", "", *lines])
    if whole:
        load = [
            f"from diffusers import AutoModel, {pipeline}", "",
            f'transformer = AutoModel.from_pretrained({here}, {transformer}, {dtype})',
            f'pipe = {pipeline}.from_pretrained({base}, transformer=transformer, {dtype}).to("cuda")',
        ]  # fmt: skip
    else:
        load = [
            f"from diffusers import {pipeline}", "",
            f'pipe = {pipeline}.from_pretrained({base}, {dtype}).to("cuda")',
            f'pipe.load_lora_weights({here}, weight_name="{LORA_FILE}")',
            f"# or, with PEFT: pipe.transformer = peft.PeftModel.from_pretrained(pipe.transformer, {here})",
        ]  # fmt: skip
    return "\n".join(["import torch", *load, *_calls(settings, pipeline)])


def _calls(settings: Mapping, pipeline: str) -> list[str]:
    """How a picture is drawn as the run drew its student's: steps, guidance and, of Qwen-Image, size."""
    steps, size = f"num_inference_steps={settings.get('eval_steps', 40)!r}", settings.get("resolution", "1024")
    width, height = map(int, f"{size}x{size}".split("x")[:2])
    # Distilled from guided teachers (Q 4.3), a student has the guidance in its weights.
    scale = 1.0 if settings.get("guidance") in ("teacher", "neither") else settings.get("cfg", 4.5)
    if not pipeline.startswith("QwenImage"):
        return [f'image = pipe("a photo of two cats", {steps}, guidance_scale={scale!r}).images[0]']
    guided = f'negative_prompt=" ", true_cfg_scale={scale!r}' if scale != 1 else "true_cfg_scale=1.0"
    options = f"{guided}, {steps}, height={height}, width={width}"
    drawn = [f'image = pipe("a photo of two cats", {options}).images[0]']
    if pipeline == "QwenImage21Pipeline":
        own = f"{options}, output_resolution={settings.get('source_resolution') or round((width * height) ** 0.5)}"
        return [*drawn, "", "# It edits too: up to ten pictures, in the order in which the prompt counts them",
                "from diffusers.utils import load_image", "", 'source = load_image("path/to/a/picture.png")',
                f'image = pipe(image=[source], prompt="make the cat blue", {own}).images[0]']  # fmt: skip
    if "Edit" not in pipeline:
        return drawn
    return [
        "from diffusers.utils import load_image", "", 'source = load_image("path/to/a/picture.png")',
        f'image = pipe(image=source, prompt="make the cat blue", {options}).images[0]', "",
        "# It draws from a prompt alone too, through the pipeline that needs no source:",
        "from diffusers import QwenImagePipeline", "",
        'parts = {name: part for name, part in pipe.components.items() if name != "processor"}',
        "draw = QwenImagePipeline(**parts)",
        f'image = draw("a photo of two cats", {options}).images[0]',
    ]  # fmt: skip
