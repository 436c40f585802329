"""What the scorers that run here share: looking at a batch in parts, and reading a published model's files.

Pictures are rounded to 8 bits first, as a saved PNG would be, and prepared by transformers' image processors in their
PIL form, which need no torchvision. A batch is looked at in parts of `batch` pictures, so that memory stays bounded.
"""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.common import first_line
from data.files import Prompt
from data.pictures import to_picture
from models import hub
from rewards import RewardError, Scorer

PICKLED = {  # kind -> the published file, which only `convert` opens
    "hps": "HPS_v2.1_compressed.pt of xswu/HPSv2",
    "imagereward": "ImageReward.pt of THUDM/ImageReward",
    "aesthetic": "sac+logos+ava1-l14-linearMSE.pth of the improved aesthetic predictor",
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-0*.safetensors")
PROCESSOR_FILES = ("preprocessor_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json")
MODEL_FILES = ("config.json", *WEIGHTS, *PROCESSOR_FILES)


def check_scores(
    name: str, scores: Sequence[float], prompts: Sequence[str], low: float | None = None, high: float | None = None,
    silent: bool = False,
) -> np.ndarray:  # fmt: skip
    """A scorer's answer for a batch as float64 (B,), or a RewardError naming scorer and prompt. F §6.1.

    There must be one score for each of the B `prompts`, in shape (B,) exactly: a (B, 1) would later broadcast
    against (B,) to (B, B). Every score must be finite and, if given, low <= score <= high; nan passes if `silent`.
    """
    scores_B = np.asarray(scores, dtype=np.float64)
    if scores_B.shape != (len(prompts),):
        raise RewardError(f"scorer {name!r}: {len(prompts)} prompts but scores of shape {scores_B.shape}")
    for score, prompt in zip(scores_B, prompts, strict=True):
        if silent and math.isnan(score):
            continue
        if not math.isfinite(score):
            raise RewardError(f"scorer {name!r}: {score} is not finite, for the prompt {prompt!r}")
        if (low is not None and score < low) or (high is not None and score > high):
            raise RewardError(f"scorer {name!r}: {score} is outside [{low}, {high}], for the prompt {prompt!r}")
    return scores_B


def diversity(pictures_ND: np.ndarray) -> float:
    """Mean root mean square distance of the pairs of a prompt's pictures; 0 if the mode has collapsed. F 6.3.3.

    pictures_ND: N vectors. In the tiny worlds they are pixels in [0, 1]: a drawing of 24 x 24 *is* its pixels, and no
    network knows it. Of published models they are CLIP's image features: the pixels of two photographs of one
    composition differ by a shift as much as those of two compositions do. Raises ValueError for fewer than two.
    """
    x = np.asarray(pictures_ND, np.float64).reshape(len(pictures_ND), -1)
    if len(x) < 2:
        raise ValueError("diversity needs two pictures of a prompt at least")
    gaps = [np.sqrt(np.square(x[i] - x[j]).mean()) for i in range(len(x)) for j in range(i)]
    return float(np.mean(gaps))


def batched(name: str, rate: Callable, low: float, high: float, batch: int) -> Scorer:
    """A Scorer from rate(pixels, prompts) -> scores, which gets at most `batch` arrays (H, W, 3) of uint8 at a time.

    Whatever `rate` raises becomes a RewardError of one line that names the scorer, the prompt and the cause.
    """

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[Prompt], sources: object = None) -> Tensor:
        if len(images) != len(prompts):
            raise RewardError(f"scorer {name!r}: {len(images)} images for {len(prompts)} prompts")
        scores: list[float] = []
        for first in range(0, len(prompts), batch):
            some = prompts[first : first + batch]
            try:
                answer = rate(pixels_of(images[first : first + batch]), some)
            except Exception as fault:  # whatever the model's library raises, the run has to hear which scorer it was
                others = f" or one of the {len(some) - 1} after it" if len(some) > 1 else ""
                cause = f"scorer {name!r}: {first_line(fault)}, for the prompt {some[0].text!r}{others}"
                raise RewardError(cause) from fault
            scores.extend(check_scores(name, answer, [p.text for p in some], low, high))
        return torch.tensor(scores, dtype=torch.float32)

    return Scorer(name, score, low, high)


def pixels_of(images: Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [0, 1] -> B arrays (H, W, 3) of uint8; ValueError for anything else, nan included."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    low, high = images.min().item(), images.max().item()
    if not -1e-3 <= low <= high <= 1 + 1e-3:  # false for nan, too
        raise ValueError(f"images must be in [0, 1], they are in [{low:.4g}, {high:.4g}]")
    return [np.asarray(to_picture(image)) for image in images]


def require(extra: str, *modules: str) -> None:
    """RewardError that names the extra of pyproject.toml if one of its modules is not installed."""
    if any(find_spec(module) is None for module in modules):
        raise RewardError(f"this scorer needs the extra {extra!r}: pip install -e '.[{extra}]'")


def folder_of(name: str, where: str, patterns: Sequence[str]) -> Path:
    """The folder of a scorer's files, by `hub.locate`; RewardError if it has no safetensors of a published pickle."""
    folder = hub.locate(where, patterns) if where or name not in PICKLED else None
    if name in PICKLED and (folder is None or not any(folder.rglob("*.safetensors"))):
        option, call = "head" if name == "aesthetic" else "model", f"scorers.convert.convert({name!r}, FILE, FOLDER)"
        raise RewardError(f"scorer {name!r}: give {option}=FOLDER, which {call} makes of {PICKLED[name]}")
    return folder


def load_part(name: str, kind: str, folder: Path, **options):
    """`transformers.KIND.from_pretrained(folder)`, from this folder alone, frozen if it is a model.

    RewardError, one line, if it cannot be read or weights are missing: transformers would draw those at random,
    and every score would be noise that looks like a score.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    is_model = "dtype" in options
    if is_model:
        options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        loaded = getattr(transformers, kind).from_pretrained(folder, local_files_only=True, **options)
    except Exception as fault:
        raise RewardError(f"scorer {name!r}: {folder}: no readable {kind} ({first_line(fault)})") from fault
    if not is_model:
        return loaded
    model, told = loaded
    if wrong := sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]])):
        raise RewardError(f"scorer {name!r}: {folder} has no {wrong[0]}, one of {len(wrong)} weights that {kind} needs")
    return model.eval().requires_grad_(False)
