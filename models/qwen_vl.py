"""How is a Qwen-VL asked about pictures?

    load(where)        a checkpoint (folder or Hub id) -> tokenizer, image processor and network, every weight checked
    chat(system, user) a system text, and texts and pictures of a user -> Question
    VLM.inputs         B questions -> input_ids, attention_mask, mm_token_type_ids (B, S), pixel_values, image_grid_thw

Qwen-Image's text encoders (qwen.py, qwen21.py), the judges (scorers/vlm.py, vqa.py) and the trained reward model
(scorers/vlm_trained.py) ask one. transformers has a processor for the whole input, but its video half needs
torchvision. The image half does not, so the text half is written here.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from models.hub import ModelError, locate, read_json, read_weights, reading

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")  # all write a picture into the text alike
FILES = ("*.json", "merges.txt", "*.safetensors")  # what the Hub has of a VLM
PICTURE = "<|image_pad|>"
CONTROL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", PICTURE)


class Question(NamedTuple):
    """One row of a batch. `template` holds the control tokens, {} for each text and <|image_pad|> for each picture.

    The texts are read as plain text: a "<|im_end|>" in them is ten characters and ends nothing.
    """

    template: str
    texts: Sequence[str]
    pictures: Sequence[Image.Image] = ()


def chat(system: str, user: Sequence[str | Image.Image]) -> Question:
    """The family's chat up to where the answer begins; `user` has texts and pictures in the order they are shown in."""
    places = ("{}" if isinstance(part, str) else f"<|vision_start|>{PICTURE}<|vision_end|>" for part in user)
    template = (
        "<|im_start|>system\n{}<|im_end|>\n"
        f"<|im_start|>user\n{''.join(places)}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )  # fmt: skip
    texts = [system, *(part for part in user if isinstance(part, str))]
    return Question(template, texts, [part for part in user if not isinstance(part, str)])


class VLM(NamedTuple):
    """A Qwen-VL. `processor` prepares pictures; it is None if the checkpoint is asked about texts only."""

    tokenizer: Any
    processor: Any
    network: nn.Module

    def inputs(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """What the network takes, on its device. ValueError if a template has not one place for each text and picture.

        Rows are padded on the left, so that the answer of each begins right after its last token.

        TRAP: without mm_token_type_ids, Qwen2.5-VL silently gives a picture's tokens the positions of text.
        """
        pictures = [picture for question in questions for picture in question.pictures]
        pixels = self.processor(pictures, return_tensors="pt") if pictures else {}
        # The vision tower makes one token of merge_size^2 patches.
        counts = (pixels["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist() if pictures else []
        left = iter(counts)
        rows = [self._row(question, [next(left) for _ in question.pictures]) for question in questions]
        longest = max(map(len, rows))
        # Any token pads, since the mask hides it, except a picture's, which would be counted.
        ids = torch.tensor([[rows[0][0]] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        types = (ids == self.token(PICTURE)).int()
        found = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types, **pixels}
        return {name: value.to(self.network.device) for name, value in found.items()}

    def _row(self, question: Question, counts: Sequence[int]) -> list[int]:
        """The token ids of one question; its pictures have `counts` tokens."""
        pieces = question.template.split("{}")
        if len(pieces) != len(question.texts) + 1 or question.template.count(PICTURE) != len(counts):
            raise ValueError(f"{len(question.texts)} texts and {len(counts)} pictures for {question.template!r}")
        # Our own text is cut at its control tokens, the user's text is not. What stands between two control tokens is
        # tokenised at once, as the stock processors do it: a blank at a text's beginning belongs to what is before it.
        runs = [[""]]  # [plain text, the control token after it]
        for number, piece in enumerate(pieces):
            if number:
                runs[-1][0] += question.texts[number - 1]
            for part in re.split(f"({'|'.join(map(re.escape, CONTROL))})", piece):
                if part in CONTROL:
                    runs[-1].append(part)
                    runs.append([""])
                else:
                    runs[-1][0] += part
        ids, left = [], iter(counts)
        for text, *control in runs:
            ids += self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids if text else []
            for token in control:
                ids += [self.token(token)] * (next(left) if token == PICTURE else 1)
        if ids.count(self.token(PICTURE)) != sum(counts):
            raise ValueError(f"the tokenizer reads {PICTURE} in a text as a picture")
        return ids

    def token(self, text: str) -> int:
        """The id of a text that is one token. ModelError if it is several, or unknown."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ModelError(f"{text!r} is not one token of this checkpoint; is it a Qwen-VL?")
        return ids[0]


def load(where: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VLM:
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL from a folder or Hub id, frozen. Only safetensors, no code of its authors.

    ModelError, one line, if it is missing, broken or of another family; then only its config.json has been fetched.
    """
    family = read_json(locate(where, ("config.json",)) / "config.json").get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"{where}: a {family} model; give a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, or serve it elsewhere")
    folder = locate(where, FILES)
    return read(folder, folder, folder, device, dtype)


def read(network: Path, tokenizer: Path, processor: Path | None, device: torch.device | str, dtype: torch.dtype) -> VLM:
    """A VLM whose three parts stand in these folders, frozen. ModelError names the folder that is not readable."""
    with reading(tokenizer, "a tokenizer"):
        words = AutoTokenizer.from_pretrained(tokenizer)
    with reading(processor, "Qwen-VL's image processor"):
        images = AutoImageProcessor.from_pretrained(processor, backend="pil") if processor else None
        if images and not hasattr(images, "merge_size"):
            raise ValueError("it has no merge_size")
    with reading(network, "a Qwen-VL"):
        module = read_weights(AutoModelForImageTextToText, network, dtype, strict=True).to(device)
        vlm = VLM(words, images, module)
        if [vlm.token(mark) for mark in CONTROL][-1] != module.config.image_token_id:
            raise ValueError(f"tokenizer and network disagree about {PICTURE}")
    return vlm
