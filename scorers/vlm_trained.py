"""A trained reward model as a scorer: a Qwen-VL with a LoRA that marks pictures from 1 to 5 (Q 3.1).

`train.py --stage reward` trains one, and the kind `trained` of --rewards uses it. A checkpoint is the weights and
reward_model.json, which says what they belong to. A tiny world's judge (tiny/judge.py) is saved and loaded here too.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn

from data.common import first_line, write_atomic
from data.files import Prompt
from data.pictures import decode, to_picture
from data.preferences import Pair, Sample
from models import hub, lora, qwen_vl
from models.hub import ModelError
from reward_model import HIGHEST, LOWEST, expected_score, pair_accuracy, pearson, ranked
from rewards import RewardError, Scorer
from scorers.common import check_scores
from tiny import judge as tiny_judge
from tiny.judge import TinyJudge

ABOUT = "reward_model.json"  # beside a model's weights; a config.json would make a PEFT folder look like a whole model
SYSTEM = "You are a helpful assistant."
QUESTION = (
    "This picture was drawn for the following prompt.\nPrompt: {prompt}\nHow good is the picture? Look at clarity, "
    "light, colour, texture, structure and artifacts. Answer with one number from 1 (bad) to 5 (excellent)."
)
# The language part's attention. Qwen's vision part names its own differently (attn.qkv, attn.proj), and stays as it is.
TARGETS = tuple(f"self_attn.{layer}_proj" for layer in "qkvo")
LORA = "reward"  # the adapter's name inside the model


class VLMJudge:
    """A VLM of the Qwen family (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) that marks pictures."""

    def __init__(self, model: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 question: str = ""):  # fmt: skip
        """model: a Hub id or a folder; question: what is asked of each picture, by default QUESTION, {prompt} standing
        for the prompt. ModelError, one line, for what is missing, broken or of another family.
        """
        self.model, self.question, self.device = model, question or QUESTION, torch.device(device)
        self.vlm = qwen_vl.load(model, device, dtype)
        self.network, self.lora = self.vlm.network, None
        self.fingerprint = hub.fingerprint(hub.locate(model, qwen_vl.FILES))
        self.token_ids = [self.vlm.token(str(mark)) for mark in range(LOWEST, HIGHEST + 1)]

    def inputs(self, images: Sequence[Path | Tensor], prompts: Sequence[str]) -> dict[str, Tensor]:
        """The network's input for B pictures, files or tensors (3, H, W) in [0, 1]: each is shown, then asked about."""
        questions = []
        for image, prompt in zip(images, prompts, strict=True):
            picture = to_picture(image) if isinstance(image, Tensor) else Image.fromarray(decode(image))
            questions.append(qwen_vl.chat(SYSTEM, [picture, self.question.replace("{prompt}", prompt)]))
        return self.vlm.inputs(questions)

    def scores(self, images: Sequence[Path | Tensor], prompts: Sequence[str]) -> Tensor:
        """R of Q Eq. 12 for B pictures, (B,) float32 on the device; gradients flow to the LoRA.

        Only the five logits are computed, and in float32: bfloat16 has steps of 1/8 there, too coarse to rank a group.
        """
        hidden = self.network.model(**self.inputs(images, prompts), use_cache=False).last_hidden_state[:, -1]
        head = self.network.get_output_embeddings().weight[self.token_ids]
        return expected_score(hidden.float() @ head.float().T, range(HIGHEST))

    def add_lora(self, config: LoraConfig, state: dict[str, Tensor] | None = None, seed: int = 0) -> None:
        """Put the LoRA on the language part, in float32: from `state`, or new (A gaussian, B zero: it begins as the
        base). A new one trains, with its blocks computed again in backward, so that a 7B model fits one accelerator.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lora.add(self.network, LORA, config, state)
        self.lora = config
        for name, p in self.network.named_parameters():
            p.requires_grad_(f".{LORA}." in name and state is None)
        if state is None:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
            self.network.train()

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> dict:
        """Write the LoRA in PEFT's layout -> what `load` needs besides."""
        lora.save_adapter(folder, lora.state_of(self.network, LORA), self.lora, self.model, self.fingerprint)
        return {"kind": "vlm", "model": self.model, "question": self.question}


Judge = VLMJudge | TinyJudge


# ------------------------------------------------------------------------------------------- agreement with people
def score_all(judge: Judge, images: Sequence, prompts: Sequence[str], batch: int) -> np.ndarray:
    """R of any number of pictures, `batch` of them at a time, without gradient -> float64 (N,)."""
    with torch.no_grad():
        parts = [judge.scores(images[i : i + batch], prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
    return torch.cat(parts).double().cpu().numpy()


def agreement(judge: Judge, held: Sequence[Sample] | Sequence[Pair], batch: int) -> dict[str, float]:
    """Agreement with people on held-out prompts (Q 3.1). What is undefined, such as a correlation with marks that are
    all equal, is left out.

    held_pair_accuracy              pairs in the right order: the annotated ones, or any two marks of one prompt
    held_pearson, held_spearman     correlation of R with the marks, of values and of ranks      (samples only)
    held_error                      mean |R - y|, on the scale of 1 to 5                         (samples only)
    """
    if isinstance(held[0], Pair):
        images = [image for pair in held for image in (pair.winner, pair.loser)]
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


# ----------------------------------------------------------------------------------------------------- checkpoints
def save(judge: Judge, folder: Path, objective: str) -> None:
    """Write a judge to a folder; `load` reads it again, and PEFT the LoRA of a VLM."""
    about = {"objective": objective, **judge.save(folder)}
    write_atomic(folder / ABOUT, json.dumps(about, indent=1) + "\n")


def load(where: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Judge:
    """A trained judge from a run, a checkpoint or a Hub id, frozen; ModelError names what is missing or broken."""
    folder = hub.locate(str(where), ("*.json", "*.safetensors"))
    try:
        about = json.loads((folder / ABOUT).read_text())
        if about["kind"] == "tiny":
            return tiny_judge.load(folder, about).to(device, dtype)
        model, question = about["model"], about["question"]
    except Exception as fault:
        raise ModelError(f"{folder}: not a readable reward model ({first_line(fault)})") from fault
    judge = VLMJudge(model, device, dtype, question)
    state, config = lora.read_adapter(folder, dict(judge.network.named_modules()), judge.model, judge.fingerprint)
    judge.add_lora(config, state)
    return judge


def scorer(
    model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, batch: int = 64
) -> Scorer:
    """A trained reward model as a reward, named as its folder: R / 5 in [0.2, 1], higher is better, of any picture.

    `batch` pictures go through the model at once. A source image is not looked at. RewardError names the scorer and the
    prompt.
    """
    judge, name = load(model, device, dtype), Path(str(model)).name

    def score(images: Tensor, prompts: Sequence[Prompt], sources: object = None) -> Tensor:
        texts = [p.text for p in prompts]
        try:
            # A certain model's probabilities add up to one but for the last bit: 5.0000005 is a 5.
            found = score_all(judge, images, texts, batch).clip(LOWEST, HIGHEST) / HIGHEST
        except ValueError as fault:
            raise RewardError(f"scorer {name!r}: {first_line(fault)}") from None
        return torch.from_numpy(check_scores(name, found, texts)).float()

    return Scorer(name, score, LOWEST / HIGHEST, 1.0)
