"""How does a vision-language model (VLM) become a reward, from the marks that people gave to pictures?

    what the model says of a picture    R = sum over s in {1..5} of s p(s | x, c)         Q Eq. 12   expected_score
    pointwise: a picture has a mark     (R - y)^2                                         Q Eq. 11   pointwise_loss
    pairwise: one picture is preferred  -log sigma(R_w - R_l)                             Q Eq. 10   pairwise_loss

The model sees the picture and a question, and the probabilities of the tokens "1" to "5" at the place of its answer
are its opinion; both losses are about the same R, so that the two differ in what they learn from and in nothing else,
as Q Fig. 2 asks. Data are JSON lines; image paths are relative to their file:

    {"image": "a.png", "prompt": "a cat", "score": 4}                pointwise: 1 (bad) to 5 (excellent)
    {"image_w": "a.png", "image_l": "b.png", "prompt": "a cat"}      pairwise: image_w was preferred

A share of the prompts, chosen by their hash, is never trained on; agreement with people is measured there.

    python reward_model.py --data scores.jsonl --objective pointwise --model Qwen/Qwen2.5-VL-7B-Instruct --out runs/rm
    python reward_model.py --tiny --objective pairwise --seed 0 --out runs/rm-tiny-pairwise-0

A run is a folder as `runtime.py` describes it: it continues where it stopped. `scorer` makes its last checkpoint, or a
copy of it, a reward like any other. The tiny world has a reward model of its own, of the same kind: a small
transformer that reads a picture and a prompt and answers with one of five tokens, trained on prints whose faults are
graded, by an annotator who errs a little.

DEVIATION: Q fine-tunes with chain-of-thought reasoning and publishes neither its texts nor their loss. Here the score
token is the first one of the answer, so that one forward pass is one score.
"""

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn

import rewards
from data import files as data
from data.common import first_line, write_atomic
from data.files import DataError
from harness import ranks, report
from harness import run as runtime
from models import flow
from models import lora as adapters
from models.lora import ModelError
from settings import SettingsError
from tiny import drawings as tiny

transformers.logging.disable_progress_bar()

OBJECTIVES = ("pointwise", "pairwise")
LOWEST, HIGHEST = rewards.LOWEST_RATING, rewards.HIGHEST_RATING
ABOUT = "reward_model.json"  # beside a model's weights; a config.json would make a PEFT folder look like a whole model
SYSTEM = "You are a helpful assistant."
QUESTION = (
    "This picture was drawn for the following prompt.\nPrompt: {prompt}\nHow good is the picture? Look at clarity, "
    "light, colour, texture, structure and artifacts. Answer with one number from 1 (bad) to 5 (excellent)."
)
# What the Hub has of a VLM: configuration, tokenizer, image processor and weights.
VLM_FILES = ("*.json", "merges.txt", "*.safetensors")
# The language part's attention. Qwen's vision part names its own differently (attn.qkv, attn.proj), and stays as it is.
VLM_TARGETS = tuple(f"self_attn.{layer}_proj" for layer in "qkvo")
LORA = "reward"  # the adapter's name inside the model


# ----------------------------------------------------------------------------------------------------- equations
def expected_score(logits_BV: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Q Eq. 12: R = sum over s of s p(s), (B,) float32 in [1, 5], differentiable, from next-token logits (B, V).

    token_ids are the V-indices of the tokens "1" to "5", in this order. ValueError unless they are five different ones.
    `rewards.expected_score` is the same rule for the log-probs that a server returns.

    DEVIATION: as printed, p is the model's whole distribution, and an answer that is no number counts as a mark of 0.
    Here p is normalised over the five tokens: a model that hesitates how to begin its answer has not judged anything.
    """
    if len(set(token_ids)) != HIGHEST or len(token_ids) != HIGHEST:
        raise ValueError(f"the tokens 1 to {HIGHEST} must be {HIGHEST} different ones, got {list(token_ids)}")
    p_B5 = logits_BV[:, list(token_ids)].float().softmax(-1)
    return p_B5 @ torch.arange(LOWEST, HIGHEST + 1, dtype=p_B5.dtype, device=p_B5.device)


def pointwise_loss(scores_B: Tensor, targets_B: Tensor) -> Tensor:
    """Q Eq. 11: the mean over the batch of (R - y)^2, a scalar. ValueError for shapes other than (B,) and (B,).

    DEVIATION: Eq. 11 sums over the data. The mean has the same minimum, and a learning rate that does not depend on
    the size of the batch; Eq. 10 is treated alike.
    ERRATUM: Eq. 11 lets y be any real number, but the R of Eq. 12 lies in [1, 5]: a mark beyond would pull all
    probability to one token for ever. `read` refuses such marks.
    """
    _same_length(scores_B, targets_B)
    return (scores_B - targets_B).square().mean()


def pairwise_loss(scores_w_B: Tensor, scores_l_B: Tensor) -> Tensor:
    """Q Eq. 10, Bradley-Terry: the mean over pairs of -log sigma(R_w - R_l), a scalar. ValueError as above.

    Only differences count: where on the scale a picture stands is free. But the R of Eq. 12 is bounded, R_w - R_l <= 4,
    and the loss stays above log(1 + exp(-4)) = 0.018: pairs that are in order go on pushing R towards 1 and 5.
    """
    _same_length(scores_w_B, scores_l_B)
    return F.softplus(scores_l_B - scores_w_B).mean()  # -log sigma(d) = log(1 + e^-d), without overflow


def _same_length(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 1:  # (B,) with (B, 1) would broadcast to (B, B)
        raise ValueError(f"one number a picture is needed, got shapes {tuple(a.shape)} and {tuple(b.shape)}")


# ----------------------------------------------------------------------------- agreement with people, Q Section 3.1
def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two (N,) arrays, in [-1, 1]; nan where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else math.nan


def ranked(values: np.ndarray) -> np.ndarray:
    """The rank of each of (N,) values, from 1; equal values share the mean of their ranks (Spearman's rule)."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[group]


def pair_accuracy(scores: np.ndarray, targets: np.ndarray, groups: Sequence) -> float:
    """Share of the pairs within a group that scores order as targets do; a tie of scores is half right.

    (N,) each. Pairs whose targets are equal do not count; nan where no pair is left. A group is a prompt: pictures of
    one prompt are what GRPO compares.
    """
    members: dict = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    right, total = 0.0, 0
    for rows in members.values():
        s, t = scores[rows], targets[rows]
        for i in range(1, len(rows)):
            order = np.sign(t[i] - t[:i])
            right += ((order * np.sign(s[i] - s[:i]) + 1) / 2)[order != 0].sum()
            total += int((order != 0).sum())
    return right / total if total else math.nan


# ---------------------------------------------------------------------------------------------------------- data
class Sample(NamedTuple):
    """A picture with a mark y in [1, 5]. Pictures are files, or tensors (3, H, W) in [0, 1]."""

    image: Path | Tensor
    prompt: str
    score: float


class Pair(NamedTuple):
    """Two pictures of one prompt, the first of which was preferred."""

    winner: Path | Tensor
    loser: Path | Tensor
    prompt: str


def read(file: str | Path, objective: str) -> list[Sample] | list[Pair]:
    """The lines of a JSONL file that an objective learns from, in order; blank ones are skipped.

    Raises DataError, `file:line: what is wrong; what to do`, for a line that is not what the objective needs and for an
    image that is missing or is none. Only the images' headers are read now.
    """
    file = Path(file)
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as fault:
        raise DataError(f"{file}:0: cannot be read ({fault.strerror}); check the path") from None
    found = [_parse(f"{file}:{n}", line, file.parent, objective) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{file}:0: the file holds no line; write one JSON object a line")
    return found


def _parse(where: str, line: bytes, folder: Path, objective: str) -> Sample | Pair:
    try:
        entry = json.loads(line)
    except ValueError as fault:  # malformed JSON, or no UTF-8
        raise DataError(f"{where}: not JSON ({first_line(fault)}); write one object a line") from None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: not a JSON object; write {{...}} with image and prompt")
    names = ("image",) if objective == "pointwise" else ("image_w", "image_l")
    for name in (*names, "prompt"):
        if not isinstance(entry.get(name), str) or not entry[name]:
            other = "pairwise" if "image_w" in entry else "pointwise" if "image" in entry else ""
            hint = f"; lines like this one are for --objective {other}" if other not in ("", objective) else ""
            raise DataError(f"{where}: the field {name!r} must be a non-empty string{hint or '; add it'}")
    images = [_image_file(where, folder / entry[name]) for name in names]
    if objective == "pairwise":
        return Pair(*images, entry["prompt"])
    score = entry.get("score")
    if type(score) not in (int, float) or not LOWEST <= score <= HIGHEST:
        raise DataError(f"{where}: the field 'score' is {score!r}; it must be a number from {LOWEST} to {HIGHEST}")
    return Sample(*images, entry["prompt"], float(score))


def _image_file(where: str, file: Path) -> Path:
    try:
        with Image.open(file):  # the header only
            return file
    except FileNotFoundError:
        raise DataError(f"{where}: no file {file}; image paths are relative to the folder of the JSONL file") from None
    except Exception as fault:  # no image, no permission, more pixels than Pillow thinks wise
        raise DataError(f"{where}: {file} is no readable image ({first_line(fault)})") from None


def split(items: Sequence, share: float) -> tuple[list, list]:
    """(train, held-out): a hash of its prompt decides where an item goes, so all pictures of a prompt go together.

    About `share` of the prompts are held out, the same ones in every run and in every file.
    """
    parts: tuple[list, list] = [], []
    for item in items:
        parts[data.seed_for("holdout", item.prompt) < share * 2**63].append(item)
    return parts


# ------------------------------------------------------------------------------------ a transformers VLM with a LoRA
class VLMJudge:
    """A VLM of the Qwen family (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) that marks pictures; its LoRA is what trains."""

    def __init__(self, model: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 question: str = QUESTION):  # fmt: skip
        """model: a Hub id or a folder. ModelError, one line, for what is missing, broken or of another family."""
        self.model, self.question, self.device = model, question, torch.device(device)
        folder = adapters.locate(model, VLM_FILES)
        self.fingerprint = flow.fingerprint(folder)
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            # The processor of the whole family wants torchvision for videos; its image half does not.
            self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
            network, info = transformers.AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            if amiss := [*info["missing_keys"], *info["unexpected_keys"]]:  # transformers only warns of these
                raise ValueError(f"its weights are not those that its config describes: {amiss[0]}")
        except Exception as fault:
            raise ModelError(f"{folder}: not a readable VLM ({first_line(fault)})") from fault
        self.network = network.requires_grad_(False).to(self.device).eval()
        self.token_ids = [self._token(str(mark)) for mark in range(LOWEST, HIGHEST + 1)]
        self.image_token = self._token("<|image_pad|>")
        for marker in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"):
            self._token(marker)
        if not hasattr(self.processor, "merge_size") or network.config.image_token_id != self.image_token:
            raise ModelError(f"{folder}: not of the Qwen-VL family, the only one whose image input is written here")

    def _token(self, text: str) -> int:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ModelError(f"{self.model}: {text!r} is not one token of its tokenizer; is it a Qwen VLM?")
        return ids[0]

    def inputs(self, images: Sequence[Path | Tensor], prompts: Sequence[str]) -> dict[str, Tensor]:
        """The network's input for B pictures: the family's chat template, image-only, so without torchvision.

        Rows are padded on the left: the place of the answer is the last one of each. What is no text of ours is read
        as plain text: a prompt that contains "<|im_end|>" or "<|image_pad|>" cannot move that place.

        TRAP: without mm_token_type_ids the network takes the image's patches for a line of text, and says nothing.
        """
        pixels = self.processor([_picture(image) for image in images], return_tensors="pt")
        counts = (pixels["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist()
        rows = []
        for count, prompt in zip(counts, prompts, strict=True):
            row = self._ids(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>")
            row += [self.image_token] * count + self._ids("<|vision_end|>")
            row += self._ids(self.question.replace("{prompt}", prompt), split_special_tokens=True)
            rows.append(row + self._ids("<|im_end|>\n<|im_start|>assistant\n"))
        longest = max(map(len, rows))
        # Which token pads does not matter, the mask hides it; but an image token would be counted.
        ids = torch.tensor([[rows[0][0]] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        found = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == self.image_token).int()}
        return {key: value.to(self.device) for key, value in {**found, **pixels}.items()}

    def _ids(self, text: str, **options) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **options).input_ids

    def scores(self, images: Sequence[Path | Tensor], prompts: Sequence[str]) -> Tensor:
        """R of Q Eq. 12 for B pictures, (B,) float32 on the device; gradient where it is enabled.

        Only the five logits are computed, and in float32: bfloat16 has steps of 1/8 there, too coarse to rank a group.
        """
        hidden = self.network.model(**self.inputs(images, prompts), use_cache=False).last_hidden_state[:, -1]
        head = self.network.get_output_embeddings().weight[self.token_ids]
        return expected_score(hidden.float() @ head.float().T, range(HIGHEST))

    def add_lora(self, config: adapters.LoraConfig, state: dict[str, Tensor] | None = None, seed: int = 0) -> None:
        """Put the LoRA on the language part: from `state`, or new (A gaussian, B zero: it begins as the base)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, self.network, adapter_name=LORA)
        self.lora = config
        for name, p in self.network.named_parameters():
            if f".{LORA}." in name:
                p.data = p.data.float()
            p.requires_grad_(f".{LORA}." in name)
        if state is not None:
            set_peft_model_state_dict(self.network, state, adapter_name=LORA)

    def train_mode(self) -> None:
        """Recompute blocks in backward, so that a 7B model with its pictures fits one accelerator."""
        self.network.gradient_checkpointing_enable({"use_reentrant": False})
        self.network.train()

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def save(self, folder: Path, objective: str) -> None:
        """The LoRA in PEFT's layout, and what it was asked; `load` reads it again."""
        state = get_peft_model_state_dict(self.network, adapter_name=LORA, save_embedding_layers=False)
        adapters.save_adapter(folder, state, self.lora, self.model, self.fingerprint)
        about = {"kind": "vlm", "objective": objective, "model": self.model, "question": self.question}
        write_atomic(folder / ABOUT, json.dumps(about, indent=1) + "\n")


def _picture(image: Path | Tensor) -> Image.Image:
    """A file, or a tensor (3, H, W) in [0, 1], as eight-bit RGB."""
    if isinstance(image, Tensor):
        return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except Exception as fault:
        raise DataError(f"{image}: no readable image ({first_line(fault)}); mend it or remove its line") from fault


# ------------------------------------------------------------------------------------------------- the tiny world's
class TinyJudge(nn.Module):
    """The tiny world's VLM: 36 patches and a prompt go through two transformer blocks to five score tokens.

    It has no dropout and never leaves training mode: in evaluation mode torch takes another path, with other last bits.
    """

    def __init__(self, width: int = 64, layers: int = 2, seed: int = 0):
        super().__init__()
        self.shape, patch = {"width": width, "layers": layers}, 4
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.eye = nn.Sequential(nn.Conv2d(3, width, patch, patch), nn.GELU(), nn.Conv2d(width, width, 1))
            self.word = nn.Embedding(len(tiny.VOCABULARY), width)
            # A place for every patch, for every word, and for the answer, which has no token before it is given.
            self.place = nn.Parameter(0.02 * torch.randn((tiny.SIZE // patch) ** 2 + tiny.MAX_TOKENS + 1, width))
            block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
            self.head = nn.Linear(width, HIGHEST)

    @property
    def device(self) -> torch.device:
        return self.place.device

    def scores(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """R of Q Eq. 12 for B pictures (3, 24, 24), (B,) float32 on the device; RewardError for what it cannot read."""
        tokens = []
        for prompt in prompts:
            try:
                tokens.append(tiny.tokenize(prompt))
            except ValueError as fault:
                raise rewards.RewardError(f"the tiny reward model cannot read {prompt!r}: {fault}") from None
        x = images if isinstance(images, Tensor) else torch.stack(list(images))
        if x.shape[1:] != (3, tiny.SIZE, tiny.SIZE):
            raise rewards.RewardError(
                f"the tiny reward model sees {tiny.SIZE} x {tiny.SIZE} pixels, not {tuple(x.shape)}"
            )
        patches = self.eye(x.to(self.place) * 2 - 1).flatten(2).mT  # (B, 36, C)
        words = self.word(torch.tensor(tokens, device=self.device))  # (B, 12, C)
        both = F.pad(torch.cat([patches, words], 1), (0, 0, 0, 1)) + self.place
        return expected_score(self.head(self.blocks(both)[:, -1]), range(HIGHEST))

    def train_mode(self) -> None:
        """It is always ready to train."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by name: everything."""
        return dict(self.named_parameters())

    def save(self, folder: Path, objective: str) -> None:
        """Weights and shape; `load` reads them again."""
        weights = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors")
        about = {"kind": "tiny", "objective": objective, **self.shape}
        write_atomic(folder / ABOUT, json.dumps(about, indent=1) + "\n")


ANNOTATOR_ERROR = 0.25  # standard deviation of what the tiny world's annotator sees, on the scale of 1 to 5
PICTURES = 2  # of each prompt
FAULTS = ((), ("grain",), ("fade",), ("blur",), ("tint",), ("grain", "fade"), ("blur", "grain"))


def print_fault(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """A drawing (3, 24, 24) with up to two printing faults of any strength: grain, a faded, blurred or tinted print.

    `tiny.spoil` knows two faults of one strength; marks from 1 to 5 need all that lies between.
    """
    for fault in rng.choice(FAULTS):
        strength = np.float32(rng.random())
        if fault == "grain":
            noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(image.shape, np.float32)
            image = image + 0.4 * strength * noise
        elif fault == "blur":
            around = F.avg_pool2d(F.pad(torch.from_numpy(image)[None], (2, 2, 2, 2), mode="replicate"), 5, 1)[0].numpy()
            image = image + strength * (around - image)
        else:
            paint = [0.62] * 3 if fault == "fade" else [rng.random() for _ in range(3)]
            image = image + 0.8 * strength * (np.array(paint, np.float32)[:, None, None] - image)
    return image.clip(0, 1)


def tiny_items(prompts: int, objective: str, seed: int, holdout: float) -> tuple[list, list[Sample]]:
    """(training items, held-out samples) of the tiny world: two pictures a prompt, of every task's train split.

    One annotator sees 1 + 4 `tiny.quality` of each picture with an error. Pointwise, the nearest whole number from 1 to
    5 is written down; pairwise, which of the two pictures looked better. So both objectives learn from the same
    pictures and the same eye. Held-out samples have the true value, whatever the objective.
    """
    rng = random.Random(f"reward model/{seed}")
    asked = [p for task in tiny.TASKS for p in tiny.make_prompts(task, "train", prompts // len(tiny.TASKS), seed)]
    drawn = [(p.text, torch.from_numpy(print_fault(_drawing(p, rng), rng))) for p in asked for _ in range(PICTURES)]
    truth = 1 + 4 * tiny.quality(torch.stack([image for _, image in drawn]))
    samples = [Sample(image, text, true) for (text, image), true in zip(drawn, truth.tolist(), strict=True)]
    training, held = split(samples, holdout)
    seen = [s._replace(score=rng.gauss(s.score, ANNOTATOR_ERROR)) for s in training]
    if objective == "pointwise":
        return [s._replace(score=float(min(max(round(s.score), LOWEST), HIGHEST))) for s in seen], held
    pairs = zip(seen[::2], seen[1::2], strict=True)  # both pictures of a prompt lie side by side
    ordered = [(a, b) if a.score > b.score else (b, a) for a, b in pairs]
    return [Pair(winner.image, loser.image, winner.prompt) for winner, loser in ordered], held


def _drawing(prompt: data.Prompt, rng: random.Random) -> np.ndarray:
    """A picture that may or may not show what its prompt says, now and then a page of one colour: quality is all."""
    if rng.random() < 0.06:
        paint = np.array(rng.choice([(1.0, 1.0, 1.0), *tiny.COLORS.values()]), np.float32)
        return np.tile(paint[:, None, None], (1, tiny.SIZE, tiny.SIZE))
    if "include" in prompt.metadata:
        return tiny.draw(tiny.scene_of(prompt.metadata, rng, 0.3))
    return tiny.draw({"word": "".join(rng.choices(tiny.LETTERS, k=tiny.WORD_LENGTH)), "color": rng.choice(tiny.INKS)})


# ----------------------------------------------------------------------------------------------------- training
def _flag(default, help: str, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Recipe:
    """Every flag of the command line, with its default for a real VLM; `TINY` has the tiny world's."""

    out: str = _flag("", "folder of the run; one that exists is continued")
    objective: str = _flag("pointwise", "what to learn from (Q's choice: pointwise)", choices=OBJECTIVES)
    data: str = _flag("", "JSONL file of marks (pointwise) or preferences (pairwise)")
    model: str = _flag("Qwen/Qwen2.5-VL-7B-Instruct", "a VLM of the Qwen family: Hub id or folder")
    tiny: bool = _flag(False, "train the tiny world's reward model, on pictures of its own")
    steps: int = _flag(1000, "optimizer steps", low=1)
    batch_size: int = _flag(16, "pictures a step; a pair is two", low=2)
    micro_batch: int = _flag(4, "pictures in one forward; fewer need less memory", low=2)
    lr: float = _flag(1e-4, "learning rate (AdamW); it falls to zero along a cosine", low=0)
    warmup: int = _flag(50, "steps over which the learning rate rises", low=0)
    rank: int = _flag(16, "LoRA rank r", low=1)
    alpha: float = _flag(32.0, "LoRA alpha; its update is alpha/r * B @ A", low=0)
    holdout: float = _flag(0.1, "share of the prompts that is never trained on", low=0)
    question: str = _flag(QUESTION, "what the VLM is asked; {prompt} stands for the prompt")
    seed: int = _flag(0, "seed of everything random", low=0)
    save_every: int = _flag(100, "steps between checkpoints, each with an evaluation", low=1)
    keep: int = _flag(2, "checkpoints kept, newest first", low=1)
    device: str = _flag("auto", "accelerator or processor", choices=("auto", "cuda", "cpu"))
    precision: str = _flag("bfloat16", "numbers inside the VLM; its LoRA and scores are float32 in any case",
                           choices=("bfloat16", "float32"))  # fmt: skip
    resume: bool = _flag(True, "continue the run; --no-resume starts it anew")
    wandb: bool = _flag(False, "log to Weights & Biases too (extra wandb)")
    name: str = ""  # of the run's folder, from --out; `out` is the folder around it, as `runtime.Run` wants both

    # What else `runtime.Run` asks. The exported weights are the trained ones: the falling rate averages well enough.
    stage: ClassVar[str] = "reward_model"
    task: ClassVar[str] = ""
    decay: ClassVar[bool] = True
    weight_decay: ClassVar[float] = 0.01
    grad_norm: ClassVar[float] = 1.0
    ema_every: ClassVar[int] = 1
    ema_decay: ClassVar[float] = 0.0


TINY = dict(steps=600, batch_size=64, micro_batch=64, lr=2e-3, warmup=30, save_every=150)
TINY_PROMPTS = 3000
NOT_TINY = ("data", "model", "rank", "alpha", "question", "precision")  # what the tiny reward model has no use for


class RewardRun(runtime.Run):
    """A run whose checkpoints hold a reward model."""

    def export(self, folder: Path) -> None:
        with self.exported():
            self.model.save(folder, self.s.objective)
        write_atomic(folder / "README.md", card(self.s, self.step, self.record.last))


def card(s: Recipe, step: int, metrics: dict[str, float]) -> str:
    """The model card of a checkpoint: README.md, with front matter for the Hub."""
    base = adapters.hub_id(s.model) if not s.tiny else ""
    front = ["---", *([f"base_model: {json.dumps(base)}"] if base else []), "tags:", "- reward-model", "---"]
    agreement = [f"- {key}: {value:.4g}" for key, value in metrics.items() if key.startswith("held_")]
    return "\n".join([
        *front, "", "# A reward model", "",
        f"Objective: {s.objective} (Qwen-Image-2.0-RL, Eq. {11 if s.objective == 'pointwise' else 10}); {step} steps; "
        f"its question stands in {ABOUT}.", "", "Agreement on held-out prompts:", "", *agreement, "",
    ])  # fmt: skip


def loss_of(judge: "VLMJudge | TinyJudge", items: Sequence[Sample] | Sequence[Pair]) -> Tensor:
    """Q Eq. 11 for samples, Eq. 10 for pairs (both pictures of a pair in one forward), a scalar."""
    prompts = [item.prompt for item in items]
    if isinstance(items[0], Sample):
        scores = judge.scores([item.image for item in items], prompts)
        return pointwise_loss(scores, torch.tensor([item.score for item in items], device=scores.device))
    images = [item.winner for item in items] + [item.loser for item in items]
    return pairwise_loss(*judge.scores(images, prompts + prompts).chunk(2))


def score_all(judge: "VLMJudge | TinyJudge", images: Sequence, prompts: Sequence[str], batch: int) -> np.ndarray:
    """R of any number of pictures, `batch` of them at a time, without gradient -> float64 (N,)."""
    with torch.no_grad():
        parts = [judge.scores(images[i : i + batch], prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
    return torch.cat(parts).double().cpu().numpy()


def evaluate(judge: "VLMJudge | TinyJudge", held: Sequence[Sample] | Sequence[Pair], batch: int) -> dict[str, float]:
    """Agreement with people on held-out prompts. Higher is better, but for the error; what is undefined is left out.

    held_pair_accuracy              pairs in the right order: the annotated ones, or any two marks of one prompt
    held_pearson, held_spearman     correlation of R with the marks, of values and of ranks      (samples only)
    held_error                      mean |R - y|, on the scale of 1 to 5                         (samples only)
    """
    if isinstance(held[0], Pair):
        images = [image for pair in held for image in pair[:2]]
        groups, targets = [i // 2 for i in range(len(images))], np.array([1.0, 0.0] * len(held))
        scores = score_all(judge, images, [pair.prompt for pair in held for _ in "wl"], batch)
        return {"held_pair_accuracy": pair_accuracy(scores, targets, groups)}
    prompts, targets = [s.prompt for s in held], np.array([s.score for s in held])
    scores = score_all(judge, [s.image for s in held], prompts, batch)
    found = {
        "held_pair_accuracy": pair_accuracy(scores, targets, prompts),
        "held_pearson": pearson(scores, targets),
        "held_spearman": pearson(ranked(scores), ranked(targets)),
        "held_error": float(np.abs(scores - targets).mean()),
    }
    return {key: value for key, value in found.items() if math.isfinite(value)}


def train(training: Sequence, held: Sequence, judge: "VLMJudge | TinyJudge", s: Recipe) -> Path:
    """Fit a judge to items, with an evaluation on the held-out ones at every checkpoint -> the last checkpoint.

    Q Section 3.1. The `batch_size` pictures of a step come from `data.prompt_batch`: which ones they are is a function
    of (seed, step), so a run that is continued ends as one that was never stopped. Writes report.md.
    """
    count = s.batch_size if s.objective == "pointwise" else s.batch_size // 2
    share = s.micro_batch if s.objective == "pointwise" else s.micro_batch // 2
    judge.train_mode()
    run = RewardRun(s, judge)
    for step in run.steps("loss"):
        items = data.prompt_batch(training, count, s.seed, step, 0, 1)
        loss = 0.0
        for part in (items[i : i + share] for i in range(0, count, share)):
            run.stop_if_asked()
            term = loss_of(judge, part) * (len(part) / count)
            term.backward()
            loss += term.item()
        metrics = {"loss": loss, "grad_norm": run.update()}
        if (step + 1) % s.save_every == 0 or step + 1 == s.steps:
            with run.exported():
                metrics |= evaluate(judge, held, s.micro_batch)
        run.log(metrics)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    rows = {f"step {line['step']}": {k: v for k, v in line.items() if k.startswith("held_")} for line in lines}
    rows = {name: {"scores": scores, "tags": {}} for name, scores in rows.items() if scores}
    notes = [f"{len(training)} items to train on, {len(held)} held out, of prompts that are never trained on."]
    report.write_report(run.folder, f"Reward model, {s.objective}", rows, notes)
    return run.checkpoint


# ----------------------------------------------------------------------------------------------------------- use
def load(folder: str | Path, device: torch.device | str = "cpu", dtype=torch.float32) -> "VLMJudge | TinyJudge":
    """Read a trained reward model from a run, a checkpoint or a Hub id; ModelError names what is missing or broken."""
    folder = adapters.locate(str(folder), ("*.json", "*.safetensors"))
    try:
        about = json.loads((folder / ABOUT).read_text())
        if about["kind"] == "tiny":
            judge = TinyJudge(about["width"], about["layers"])
            judge.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
            return judge.to(device, dtype).requires_grad_(False)
        model, question = about["model"], about["question"]
    except Exception as fault:
        raise ModelError(f"{folder}: not a readable reward model ({first_line(fault)})") from fault
    judge = VLMJudge(model, device, dtype, question)
    modules = dict(judge.network.named_modules())
    state, config = adapters.read_adapter(folder, modules, judge.model, judge.fingerprint)
    judge.add_lora(config, state)
    judge.network.requires_grad_(False)
    return judge


def scorer(
    model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, batch: int = 64
) -> rewards.Scorer:
    """A trained reward model as a reward, named as its folder: R / 5 in [0.2, 1], higher is better, of any picture.

    Divided by 5 as every other rating is, so that weights mean the same. `batch` pictures go through the model at once.
    It judges the picture alone; a source image is not looked at. RewardError names the scorer and the prompt.
    """
    judge, name = load(model, device, dtype), Path(str(model)).name

    def score(images: Tensor, prompts: Sequence[data.Prompt], sources: object = None) -> Tensor:
        texts = [p.text for p in prompts]
        try:
            # A certain model's probabilities add up to one but for the last bit: 5.0000005 is a 5.
            found = score_all(judge, images, texts, batch).clip(LOWEST, HIGHEST) / HIGHEST
        except ValueError as fault:
            raise rewards.RewardError(f"scorer {name!r}: {first_line(fault)}") from None
        return torch.from_numpy(rewards.check_scores(name, found, texts)).float()

    return rewards.Scorer(name, score, LOWEST / HIGHEST, 1.0)


# ---------------------------------------------------------------------------------------------------------- command
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise SettingsError(message.removeprefix("argument "))


def parse(argv: Sequence[str]) -> Recipe:
    """The command line -> a checked Recipe. SettingsError, one line, for a wrong flag, value or combination."""
    parser = _Parser("reward_model.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                     argument_default=argparse.SUPPRESS)  # fmt: skip
    for f in (f for f in fields(Recipe) if f.metadata):
        shown = f"{f.default}; tiny: {TINY[f.name]}" if f.name in TINY else f.default
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    given = vars(parser.parse_args(list(argv)))
    useless = [name for name in NOT_TINY if given.get("tiny") and name in given]
    if useless:
        raise SettingsError(f"--{useless[0]} has no use with --tiny, which brings its own data and model; leave it out")
    s = Recipe(**{**(TINY if given.get("tiny") else {}), **given})
    _check(s)
    return Recipe(**{**asdict(s), "out": str(Path(s.out).parent), "name": Path(s.out).name})


def _check(s: Recipe) -> None:
    for f in fields(s):
        value, flag = getattr(s, f.name), "--" + f.name.replace("_", "-")
        if "choices" in f.metadata and value not in f.metadata["choices"]:
            raise SettingsError(f"{flag} {value}: choose from {', '.join(f.metadata['choices'])}")
        if "low" in f.metadata and not value >= f.metadata["low"]:  # 'not >=' refuses NaN as well
            raise SettingsError(f"{flag} {value}: must be at least {f.metadata['low']}")
    if not s.tiny and not s.data:
        raise SettingsError("--data FILE.jsonl is needed, or --tiny for the tiny world's reward model")
    if not Path(s.out).name:
        raise SettingsError("--out FOLDER is needed, the folder of the run, e.g. --out runs/rm")
    if not _is_free(Path(s.out)):  # --no-resume would empty it
        raise SettingsError(f"--out {s.out}: there is something else, no reward model's run; give another folder")
    if s.objective == "pairwise" and (s.batch_size % 2 or s.micro_batch % 2):
        raise SettingsError("--objective pairwise takes pictures in twos: make --batch-size and --micro-batch even")
    if not 0 < s.holdout < 1:
        raise SettingsError(f"--holdout {s.holdout}: must be between 0 and 1; without held-out prompts nobody knows")
    if s.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: this machine has no CUDA device that torch can use")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError("a reward model trains in one process: start it with python, not with torchrun")
    if s.wandb:
        runtime.require_extra("wandb", "wandb", "--wandb")


def _is_free(folder: Path) -> bool:
    """Is there nothing yet, or a run of this program?"""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    try:
        return "objective" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def prepare(s: Recipe) -> tuple[list, list, "VLMJudge | TinyJudge"]:
    """(training items, held-out items, judge) of a recipe; data are read before the model, which takes longer."""
    device = "cuda" if s.device != "cpu" and torch.cuda.is_available() else "cpu"
    if s.tiny:
        training, held = tiny_items(TINY_PROMPTS, s.objective, s.seed, s.holdout)
        return training, held, TinyJudge(seed=s.seed).to(device)
    training, held = split(read(s.data, s.objective), s.holdout)
    if not training or not held:
        missing = "to train on" if not training else "held out"
        raise DataError(f"{s.data}:0: no prompt is {missing} at --holdout {s.holdout}; change it, or add prompts")
    judge = VLMJudge(s.model, device, getattr(torch, s.precision), s.question)
    judge.add_lora(adapters.lora_config(s.rank, s.alpha, VLM_TARGETS), seed=s.seed)
    return training, held, judge


def main(argv: Sequence[str] | None = None) -> int:
    """0: done or stopped in good order; 2: the user's to mend, said in one line; 130: Ctrl-C."""
    try:
        s = parse(sys.argv[1:] if argv is None else argv)
        training, held, judge = prepare(s)
        checkpoint = train(training, held, judge, s)
        print(f"reward model: {checkpoint}\nreport:       {Path(s.out) / s.name / 'report.md'}")
        return 0
    except ranks.USER_ERRORS as fault:
        # `runtime.Run` knows the run's folder as --name; here it is --out.
        print(f"error: {str(fault).replace('another --name', 'another --out')}", file=sys.stderr)
        return 2
    except runtime.Stopped as stop:
        print(stop, file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print("interrupted: repeat the command to continue from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
