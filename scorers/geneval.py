"""GenEval: are the objects that a prompt lists in the picture, in the right number, colour and place? F §6.1.

Mask2Former finds objects, CLIP names the colour of each, and `rewards.geneval_reward` (training, graded) or
`rewards.geneval_verdict` (evaluation, 1 or 0) turns what was found into a number.

Notation: Q queries of the detector, K classes; a detection is as in `rewards.py`, with a "mask" (H, W) besides.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import rewards
from data.files import Prompt
from data.written import CLASSES, COLORS
from rewards import RewardError, Scorer
from scorers.clip import CLIP_L, clip_features
from scorers.common import MODEL_FILES, batched, folder_of, load_part, require

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
GREY = 0x99  # GenEval paints what is not the object #999999 before CLIP sees the colour
COLOR_TEXTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# Detectors name some of COCO's classes as COCO or Darknet does, GenEval's prompts as people do.
GENEVAL_NAMES = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
    "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv",
}  # fmt: skip
THINNEST = 8  # a crop longer than this many times its width loses its ends, which CLIP's centre crop would drop anyway


def geneval(
    device: str = "cpu", dtype: torch.dtype = torch.float32, detector: str = DETECTOR, clip: str = CLIP_L,
    strict: bool = False, short_side: int = 800, batch: int = 4,
) -> Scorer:  # fmt: skip
    """GenEval: are the right objects there? A graded reward for training, and for evaluations the verdict. F §6.1.

    strict: the verdict in training, too, and to a far run (scorers/serve.py), which is told one number a picture.

    Prompts need GenEval metadata. Pictures are enlarged to `short_side` pixels for the detector, as GenEval does: its
    thresholds belong to that size, and to float32. RewardError for a prompt that names a class or colour that the
    detector does not know: it would score 0 for ever.

    DEVIATION (GenEval): it runs mmdetection's Mask2Former (Swin-S, COCO); this is the same network as transformers
    publishes it, with other weights, so that scores near a threshold can differ.
    """
    find = _detector(detector, device, dtype, short_side)
    name_color = _color_classifier(clip, device, dtype)

    def rate(rule, pixels, prompts):
        for prompt in prompts:
            check(prompt)
        scores = []
        for picture, found, prompt in zip(pixels, find(pixels), prompts, strict=True):
            found = rewards.filter_detections(found, prompt.metadata)
            colored = {entry["class"] for entry in prompt.metadata.get("include", []) if "color" in entry}
            name_color(picture, [each for each in found if each["class"] in colored])
            scores.append(float(rule(found, prompt.metadata)))
        return scores

    graded, verdict = (
        batched("geneval", partial(rate, rule), 0.0, 1.0, batch)
        for rule in (rewards.geneval_reward, rewards.geneval_verdict)
    )
    return (verdict if strict else graded)._replace(verdict=verdict.score, check=check)


def check(prompt: Prompt) -> None:
    """RewardError for a GenEval line without a checklist, or with a class or a colour that the models cannot name."""
    if not prompt.metadata.get("include"):
        raise RewardError("GenEval's rules need metadata with a non-empty 'include'")
    for entry in [*prompt.metadata["include"], *prompt.metadata.get("exclude", [])]:
        for field, known in (("class", CLASSES), ("color", COLORS)):
            if entry.get(field, known[0]) not in known:
                raise RewardError(f"GenEval knows no {field} {entry[field]!r}; choose from {', '.join(known)}")


def instances(class_logits_QK: Tensor, mask_logits_Qhw: Tensor, size: tuple[int, int], names: Sequence[str]) -> list:
    """Detections of one picture from the outputs of Mask2Former's Q queries, those of a score above 0.3. F §6.1.

    class_logits_QK: (Q, K + 1), the last is "nothing"; mask_logits_Qhw: (Q, h, w) over the whole picture; size: (H, W)
    of the picture; names: K. A query may stand for several classes: of the Q x K probabilities p the Q largest count.
        score = p * mean of sigmoid(mask logits) over the mask         mask = logits > 0, enlarged to (H, W)
        box   = the mask's bounds (x0, y0, x1, y1), the last ones exclusive
    """
    probabilities = class_logits_QK.float().softmax(-1)[:, :-1]
    best, places = probabilities.flatten().topk(len(probabilities))
    found = []
    for probability, place in zip(best.tolist(), places.tolist(), strict=True):
        if probability <= rewards.CONFIDENCE:  # nor would the score be above it; large masks are made for few queries
            break
        query, label = divmod(place, len(names))
        logits = F.interpolate(mask_logits_Qhw[query].float()[None, None], size, mode="bilinear")[0, 0]
        mask = logits > 0
        if not mask.any():
            continue
        ys, xs = (mask.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
        score = probability * logits[mask].sigmoid().mean().item()
        found.append({"class": names[label], "score": score, "box": (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1),
                      "mask": mask.cpu().numpy()})  # fmt: skip
    return [each for each in found if each["score"] > rewards.CONFIDENCE]


def isolated(picture: np.ndarray, detection: Mapping) -> np.ndarray:
    """The object alone, (h, w, 3): its box cut from the picture (H, W, 3), grey #999 around it. F §6.1 (GenEval)."""
    x0, y0, x1, y1 = detection["box"]
    crop = np.where(detection["mask"][..., None], picture, np.uint8(GREY))[y0:y1, x0:x1]
    # CLIP enlarges the short side to 224 and keeps the middle: of a line of pixels it would make megabytes first.
    limit = THINNEST * min(crop.shape[:2])
    top, left = (max(0, length - limit) // 2 for length in crop.shape[:2])
    return crop[top : top + limit, left : left + limit]


def _detector(model: str, device: str, dtype: torch.dtype, short_side: int) -> Callable:
    """pixels -> a list of detections, without colours, for each picture."""
    require("geneval", "scipy")  # transformers cannot build the class without it
    folder = folder_of("geneval", model, MODEL_FILES)
    network = load_part("geneval", "Mask2FormerForUniversalSegmentation", folder, dtype=dtype).to(device)
    longest = short_side * 1333 // 800  # of a very long picture, as in mmdetection
    sides = {"shortest_edge": short_side, "longest_edge": longest}
    prepare = load_part("geneval", "Mask2FormerImageProcessorPil", folder, size=sides)
    labels = network.config.id2label
    names = [GENEVAL_NAMES.get(labels[k], labels[k]) for k in range(len(labels))]
    missing = ", ".join(sorted(set(CLASSES) - set(names)))
    if missing:
        raise RewardError(f"scorer 'geneval': {folder} detects no {missing}; give a detector of COCO's classes")

    def find(pixels: Sequence[np.ndarray]) -> list[list[dict]]:
        inputs = prepare(list(pixels), return_tensors="pt", input_data_format="channels_last")
        seen = network(inputs["pixel_values"].to(device, dtype), pixel_mask=inputs["pixel_mask"].to(device))
        outputs = zip(seen.class_queries_logits, seen.masks_queries_logits, pixels, strict=True)
        return [instances(classes, masks, picture.shape[:2], names) for classes, masks, picture in outputs]

    return find


def _color_classifier(clip: str, device: str, dtype: torch.dtype) -> Callable:
    """(picture, detections) -> None: gives each detection its "color", zero-shot by CLIP. F §6.1 (GenEval).

    A colour's vector is the mean of its unit text features over `COLOR_TEXTS`, the object's colour the nearest one.
    """
    images, texts, _ = clip_features("geneval", clip, "", device, dtype)
    known: dict[str, Tensor] = {}

    def vectors(name: str) -> Tensor:
        if name not in known:
            lines = [text.format(color=color, name=name) for color in COLORS for text in COLOR_TEXTS]
            known[name] = F.normalize(texts(lines).unflatten(0, (len(COLORS), len(COLOR_TEXTS))).mean(1), dim=-1)
        return known[name]

    def name_color(picture: np.ndarray, detections: Sequence[dict]) -> None:
        seen = images([isolated(picture, found) for found in detections]) if detections else ()
        for found, features in zip(detections, seen, strict=True):
            found["color"] = COLORS[int((vectors(found["class"]) @ features).argmax())]

    return name_color
