"""Scorers: which models, run here, look at a picture, and what do the rules of `rewards.py` make of what they see?

    kind          eyes                                   number                                        range
    geneval       Mask2Former, CLIP L/14 for colours     rewards.geneval_reward, or strict: verdict    [0, 1]
    ocr           an OCR engine                          rewards.ocr_reward                            [0, 1]
    pickscore     CLIP H/14, fine-tuned                  exp(logit_scale) cos / 26                     +- 100 / 26
    clipscore     CLIP L/14                              100 cos / 30                                  +- 100 / 30
    hps           CLIP H/14, fine-tuned (HPS-v2.1)       cos, about 0.3                                [-1, 1]
    aesthetic     CLIP L/14, linear head                 head(image features), about 1 to 10           any
    imagereward   BLIP, linear head                      (head(text on image) - mean) / std            any
    jpeg          none                                   rewards.score_jpeg                            below 1

cos is the cosine of CLIP's image and text features. Higher is better everywhere. F §6.1 and App. A name the rewards.
Each factory gives a `rewards.Scorer` on the device and in the dtype that the caller chooses; `make` builds one by name
and `self_test` asks it about a picture whose score is known, so that a run with blind eyes ends before it costs much.

Three checkpoints are published as pickles only: hps, imagereward and aesthetic's head. Nothing here unpickles on its
own; `convert.py` does, once, when a user calls it, and writes safetensors:

    python -c "import convert; convert.convert('hps', 'HPS_v2.1_compressed.pt', 'hps')"    then make("hps", model="hps")

Pictures are rounded to 8 bits first, as a saved PNG would be, and prepared by transformers' image processors in their
PIL form, which need no torchvision. A batch is looked at in parts of `batch` pictures, so that memory stays bounded.
Notation: B samples, Q queries of the detector, K classes; a detection is as in `rewards.py`, with a "mask" besides.
"""

import difflib
import inspect
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import rewards
from data.common import first_line
from data.files import Prompt
from data.written import CLASSES, COLORS
from models import lora as adapters
from rewards import RewardError, Scorer

CLIP_L, CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE, DETECTOR = "yuvalkirstain/PickScore_v1", "facebook/mask2former-swin-small-coco-instance"
BERT = "google-bert/bert-base-uncased"  # the tokenizer of BLIP's text half
PICKLED = {  # kind -> the published file, which only `convert` opens
    "hps": "HPS_v2.1_compressed.pt of xswu/HPSv2",
    "imagereward": "ImageReward.pt of THUDM/ImageReward",
    "aesthetic": "sac+logos+ava1-l14-linearMSE.pth of the improved aesthetic predictor",
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-0*.safetensors")
PROCESSOR_FILES = ("preprocessor_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json")
MODEL_FILES = ("config.json", *WEIGHTS, *PROCESSOR_FILES)
HEAD_FILE = "head.safetensors"

GREY = 0x99  # GenEval paints what is not the object #999999 before CLIP sees the colour
COLOR_TEXTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# Detectors name some of COCO's classes as COCO or Darknet does, GenEval's prompts as people do.
GENEVAL_NAMES = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
    "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv",
}  # fmt: skip
THINNEST = 8  # a crop longer than this many times its width loses its ends, which CLIP's centre crop would drop anyway
IMAGEREWARD_MEAN, IMAGEREWARD_STD, IMAGEREWARD_TOKENS = 0.16717362830052426, 1.0333394966054072, 35
CLIPSCORE_SCALE = 100 / 30  # cosines of CLIP L/14 are about 0.3 at best; this brings them near 1


# ------------------------------------------------------------------------------------------------- by their names
def make(kind: str, device: str = "cpu", dtype: torch.dtype | str = "float32", **options) -> Scorer:
    """The scorer of a kind, e.g. make("geneval", device="cuda", strict=True); options are its factory's arguments.

    device and dtype (a torch.dtype or its name) go to the factories that have a use for them. Raises RewardError for
    an unknown kind, option or dtype, with what was probably meant, and as the factory.
    """
    if kind not in FACTORIES:
        raise RewardError(f"unknown scorer {kind!r}{hint(kind, FACTORIES)}")
    known = inspect.signature(FACTORIES[kind]).parameters
    for option in options:
        if option not in known:
            raise RewardError(f"scorer {kind!r} has no option {option!r}{hint(option, known)}")
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype not in (*dtypes, *dtypes.values()):
        raise RewardError(f"scorer {kind!r}: unknown dtype {dtype!r}{hint(str(dtype), dtypes)}")
    common = {"device": device, "dtype": dtypes.get(dtype, dtype)}
    return FACTORIES[kind](**{name: value for name, value in common.items() if name in known}, **options)


def hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; choose one of {', '.join(known)}"


def _scorer(name: str, judge: Callable, low: float, high: float, batch: int) -> Scorer:
    """A Scorer from judge(pixels, prompts) -> scores, where pixels are at most `batch` arrays (H, W, 3) of uint8."""
    if batch < 1:
        raise RewardError(f"scorer {name!r}: batch is {batch}; it must be 1 at least")

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[Prompt], sources: object = None) -> Tensor:
        if len(images) != len(prompts):
            raise RewardError(f"scorer {name!r}: {len(images)} images for {len(prompts)} prompts")
        scores: list[float] = []
        for first in range(0, len(prompts), batch):
            some = prompts[first : first + batch]
            try:
                answer = judge(_pixels(images[first : first + batch]), some)
            except Exception as fault:  # whatever the model's library raises, the run has to hear which scorer it was
                others = f" or one of the {len(some) - 1} after it" if len(some) > 1 else ""
                cause = f"scorer {name!r}: {first_line(fault)}, for the prompt {some[0].text!r}{others}"
                raise RewardError(cause) from fault
            scores.extend(rewards.check_scores(name, answer, [p.text for p in some], low, high))
        return torch.tensor(scores, dtype=torch.float32)

    return Scorer(name, score, low, high)


def _pixels(images: Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [0, 1] -> B arrays (H, W, 3) of uint8; ValueError for anything else, nan above all."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    low, high = images.min().item(), images.max().item()
    if not -1e-3 <= low <= high <= 1 + 1e-3:  # false for nan, too
        raise ValueError(f"images must be in [0, 1], they are in [{low:.4g}, {high:.4g}]")
    return [np.asarray(rewards.to_picture(image)) for image in images]


# ------------------------------------------------------------------------------------------------ reading weights
def _folder(name: str, where: str, patterns: Sequence[str]) -> Path:
    """The folder of a scorer's files, by `adapters.locate`; RewardError where nothing was given or all are pickles."""
    if not where:
        raise RewardError(f"scorer {name!r}: {_how_to_convert(name)}")
    folder = adapters.locate(where, patterns)
    pickles = ", ".join(file.name for pattern in adapters.PICKLES for file in folder.glob(pattern))
    if pickles and not any(folder.rglob("*.safetensors")):
        raise RewardError(f"scorer {name!r}: {folder} holds pickles only ({pickles}); {_how_to_convert(name)}")
    return folder


def _how_to_convert(name: str) -> str:
    if name not in PICKLED:
        return "have the weights saved as safetensors"
    option, call = "head" if name == "aesthetic" else "model", f"convert.convert({name!r}, FILE, FOLDER)"
    return f"its weights are published as a pickle, {PICKLED[name]}; run {call} on it and give {option}=FOLDER"


def load_part(name: str, kind: str, folder: Path, **options):
    """`transformers.KIND.from_pretrained(folder)`, from this folder alone, frozen where it is a model.

    RewardError, one line, where it cannot be read or weights are missing: transformers would draw those at random,
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
    wrong = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
    if wrong:
        raise RewardError(f"scorer {name!r}: {folder} has no {wrong[0]}, one of {len(wrong)} weights that {kind} needs")
    return model.eval().requires_grad_(False)


def head_of(width: int) -> nn.Sequential:
    """The head that Aesthetic and ImageReward share: width-1024-128-64-16-1, linear all through.

    Its layers are numbered as in the public files, which count the dropouts between them.
    """
    sizes = itertools.pairwise((width, 1024, 128, 64, 16, 1))
    return nn.Sequential(OrderedDict((place, nn.Linear(*size)) for place, size in zip("02467", sizes, strict=True)))


def _load_head(name: str, folder: Path, width: int, device: str) -> nn.Sequential:
    """The head in float32, whatever the backbone's dtype: it costs nothing."""
    head = head_of(width)
    try:
        head.load_state_dict(safetensors.torch.load_file(folder / HEAD_FILE))
    except Exception as fault:
        raise RewardError(
            f"scorer {name!r}: {folder / HEAD_FILE}: no head for {width} features ({first_line(fault)}); "
            f"{_how_to_convert(name)}"
        ) from fault
    return head.to(device).eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------- CLIP and kin
def _clip(name: str, model: str, processor: str, device: str, dtype: torch.dtype) -> tuple[Callable, Callable, float]:
    """(images, texts, scale): unit features (B, D) float32 of B pictures and of B texts, and exp(logit_scale).

    `processor` is where the tokenizer and the preprocessing are; "" where they lie beside the model.
    """
    folder = _folder(name, model, MODEL_FILES)
    clip = load_part(name, "CLIPModel", folder, dtype=dtype).to(device)
    beside = adapters.locate(processor, PROCESSOR_FILES) if processor else folder
    prepare = load_part(name, "CLIPImageProcessorPil", beside)
    tokenizer = load_part(name, "CLIPTokenizer", beside)
    length = clip.config.text_config.max_position_embeddings

    def images(pixels: Sequence[np.ndarray]) -> Tensor:
        values = prepare(list(pixels), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        return F.normalize(clip.get_image_features(values.to(device, dtype)).pooler_output.float(), dim=-1)

    def texts(lines: Sequence[str]) -> Tensor:
        unique = list(dict.fromkeys(lines))  # a group shares its prompt
        # Always padded to the full length: a text's features must not depend on its neighbours in the batch.
        tokens = tokenizer(unique, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        inputs = {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}
        features = F.normalize(clip.get_text_features(**inputs).pooler_output.float(), dim=-1)
        return features[[unique.index(line) for line in lines]]

    return images, texts, clip.logit_scale.double().exp().item()


def _similarity(name: str, clip: tuple, factor: float, batch: int, shaped: Callable = np.asarray) -> Scorer:
    """A Scorer that says factor * cos of each `shaped` picture and its text, within +- factor in spite of rounding."""
    images, texts, _ = clip

    def judge(pixels, prompts):
        seen, read = images([shaped(picture) for picture in pixels]), texts([p.text for p in prompts])
        return factor * (seen.double() * read.double()).sum(-1).clamp(-1, 1).cpu()

    return _scorer(name, judge, -factor, factor, batch)


def pickscore(
    device: str = "cpu", dtype: torch.dtype = torch.float32, model: str = PICKSCORE, processor: str = CLIP_H,
    batch: int = 16,
) -> Scorer:  # fmt: skip
    """PickScore: exp(logit_scale) cos / 26, about 0.8; F Table 2 prints it times 26. F §6.1."""
    clip = _clip("pickscore", model, processor, device, dtype)
    return _similarity("pickscore", clip, clip[2] / rewards.PICKSCORE_SCALE, batch)


def clipscore(device: str = "cpu", dtype: torch.dtype = torch.float32, model: str = CLIP_L, batch: int = 16) -> Scorer:
    """CLIPScore: 100 cos / 30, about 1."""
    return _similarity("clipscore", _clip("clipscore", model, "", device, dtype), CLIPSCORE_SCALE, batch)


def hps(device: str = "cpu", dtype: torch.dtype = torch.float32, model: str = "", batch: int = 16) -> Scorer:
    """HPS-v2.1: cos, about 0.3. `model` is a folder from `convert`. Pictures are padded to a square, not cropped."""
    return _similarity("hps", _clip("hps", model, "", device, dtype), 1.0, batch, _padded)


def _padded(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) in the middle of a black square."""
    side = max(picture.shape[:2])
    above, left = ((side - length) // 2 for length in picture.shape[:2])
    square = np.zeros((side, side, 3), np.uint8)
    square[above : above + picture.shape[0], left : left + picture.shape[1]] = picture
    return square


def aesthetic(
    device: str = "cpu", dtype: torch.dtype = torch.float32, model: str = CLIP_L, head: str = "", batch: int = 16
) -> Scorer:
    """Aesthetic: a linear head on CLIP L/14's unit image features, about 1 to 10. `head` is a folder from `convert`."""
    folder = _folder("aesthetic", head, (HEAD_FILE,))  # before the larger download
    images, _, _ = _clip("aesthetic", model, "", device, dtype)
    width = images([np.zeros((8, 8, 3), np.uint8)]).shape[-1]
    rate = _load_head("aesthetic", folder, width, device)
    return _scorer("aesthetic", lambda pixels, _: rate(images(pixels))[:, 0].cpu(), -math.inf, math.inf, batch)


def imagereward(device: str = "cpu", dtype: torch.dtype = torch.float32, model: str = "", batch: int = 16) -> Scorer:
    """ImageReward, about -2 to 2: BLIP reads the prompt with the picture in its cross-attention, a head rates it.

    `model` is a folder that `convert` wrote: vision/ and text/ (transformers), head.safetensors, tokenizer.
    """
    folder = _folder("imagereward", model, (*(f"{half}/{f}" for half in ("vision", "text") for f in MODEL_FILES),
                                            *PROCESSOR_FILES, HEAD_FILE))  # fmt: skip
    vision = load_part("imagereward", "BlipVisionModel", folder / "vision", dtype=dtype).to(device)
    text = load_part("imagereward", "BlipTextModel", folder / "text", dtype=dtype, add_pooling_layer=False).to(device)
    head = _load_head("imagereward", folder, text.config.hidden_size, device)
    prepare = load_part("imagereward", "CLIPImageProcessorPil", folder)
    tokenizer = load_part("imagereward", "BertTokenizer", folder)

    def judge(pixels, prompts):
        values = prepare(pixels, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        seen = vision(values.to(device, dtype)).last_hidden_state
        tokens = tokenizer([p.text for p in prompts], padding="max_length", truncation=True,
                           max_length=IMAGEREWARD_TOKENS, return_tensors="pt").to(device)  # fmt: skip
        read = text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
        rating = head(read.last_hidden_state[:, 0].float())[:, 0]  # the first token's, [CLS]
        return ((rating - IMAGEREWARD_MEAN) / IMAGEREWARD_STD).cpu()

    return _scorer("imagereward", judge, -math.inf, math.inf, batch)


# -------------------------------------------------------------------------------------------- text, and no model
def ocr(device: str = "cpu", engine: Callable | None = None) -> Scorer:
    """How much of the quoted text can be read: `rewards.ocr_reward` of what an OCR engine reads. F §6.1 (OCR).

    engine: (H, W, 3) uint8, RGB -> [(text of a line, confidence), ...]; lines of confidence 0 are left out. By default
    RapidOCR (PP-OCR's networks, as in F, with the weights in its wheel), on the GPU if `device` is one and the
    installed ONNX runtime can use it.
    """
    read = engine or _rapidocr(device)

    def judge(pixels, prompts):
        lines = [[text for text, confidence in read(picture) if confidence > 0] for picture in pixels]
        return [rewards.ocr_reward(" ".join(found), p.text) for found, p in zip(lines, prompts, strict=True)]

    return _scorer("ocr", judge, 0.0, 1.0, batch=1)  # the engine takes one at a time; errors then name their prompt


def _rapidocr(device: str) -> Callable:
    if any(find_spec(module) is None for module in ("rapidocr", "onnxruntime", "cv2")):
        raise RewardError("scorer 'ocr' needs the extra 'ocr': pip install 'minopd[ocr]'")
    import onnxruntime
    from rapidocr import RapidOCR

    cuda = str(device).startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    # F's engine keeps every line and does not turn lines round. Finding no text is news to the engine, not to us.
    params = {"Global.text_score": 0.0, "Global.use_cls": False, "Global.log_level": "critical",
              "EngineConfig.onnxruntime.use_cuda": cuda}  # fmt: skip
    if cuda and ":" in str(device):
        params["EngineConfig.onnxruntime.cuda_ep_cfg.device_id"] = int(str(device).split(":")[1])
    reader = RapidOCR(params=params)

    def read(picture: np.ndarray) -> list[tuple[str, float]]:
        found = reader(Image.fromarray(picture))  # an array would be taken for BGR
        return list(zip(found.txts or (), found.scores or (), strict=True))

    return read


def jpeg() -> Scorer:
    """Compressibility, `rewards.score_jpeg`: needs no model; the reward for smoke runs."""

    def judge(pixels, prompts):
        return rewards.score_jpeg(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255, prompts)

    return _scorer("jpeg", judge, -math.inf, 1.0, batch=16)


# --------------------------------------------------------------------------------------------------------- GenEval
def geneval(
    device: str = "cpu", dtype: torch.dtype = torch.float32, detector: str = DETECTOR, clip: str = CLIP_L,
    strict: bool = False, short_side: int = 800, batch: int = 4,
) -> Scorer:  # fmt: skip
    """GenEval: are the right objects there? The graded training reward, or, with `strict`, the verdict, 1 or 0. F §6.1.

    Prompts need GenEval metadata. Pictures are enlarged to `short_side` pixels for the detector, as GenEval does: its
    thresholds belong to that size, and to float32. RewardError for a prompt that names a class or colour that nothing
    here can see: it would score 0 for ever.

    DEVIATION: GenEval runs mmdetection's Mask2Former (Swin-S, COCO); this is the same network as transformers
    publishes it, with other weights, so that scores near a threshold can differ.
    """
    find = _detector(detector, device, dtype, short_side)
    name_color = _color_classifier(clip, device, dtype)
    rule = rewards.geneval_verdict if strict else rewards.geneval_reward

    def judge(pixels, prompts):
        for prompt in prompts:
            check_checklist(prompt.metadata)
        scores = []
        for picture, found, prompt in zip(pixels, find(pixels), prompts, strict=True):
            found = rewards.filter_detections(found, prompt.metadata)
            colored = {entry["class"] for entry in prompt.metadata.get("include", []) if "color" in entry}
            name_color(picture, [each for each in found if each["class"] in colored])
            scores.append(float(rule(found, prompt.metadata)))
        return scores

    return _scorer("geneval", judge, 0.0, 1.0, batch)


def tag_report(scores: Sequence[float], prompts: Sequence[Prompt]) -> dict[str, float]:
    """{tag: share of correct pictures} from the scores of a strict `geneval`. F §6.1 (GenEval), Table 2.

    Raises ValueError for graded scores, which are no verdicts, and as `rewards.per_tag_accuracy`.
    """
    values = [float(score) for score in scores]
    if not set(values) <= {0.0, 1.0}:
        raise ValueError("a report by tag needs verdicts, 0 or 1: score with geneval(strict=True)")
    return rewards.per_tag_accuracy([value == 1 for value in values], [p.metadata["tag"] for p in prompts])


def check_checklist(metadata: Mapping) -> None:
    """RewardError for a GenEval line with a class that the detector, or a colour that the classifier, cannot name."""
    for entry in [*metadata.get("include", []), *metadata.get("exclude", [])]:
        for field, known in (("class", CLASSES), ("color", COLORS)):
            if entry.get(field, known[0]) not in known:
                raise RewardError(f"GenEval knows no {field} {entry[field]!r}{hint(entry[field], known)}")


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
    if find_spec("scipy") is None:  # transformers cannot build the class without it
        raise RewardError("scorer 'geneval' needs the extra 'geneval': pip install 'minopd[geneval]'")
    folder = _folder("geneval", model, MODEL_FILES)
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
    images, texts, _ = _clip("geneval", clip, "", device, dtype)
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


# ----------------------------------------------------------------------------------------------- by their names
FACTORIES = {
    "geneval": geneval, "ocr": ocr, "pickscore": pickscore, "clipscore": clipscore, "aesthetic": aesthetic, "hps": hps,
    "imagereward": imagereward, "jpeg": jpeg,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- known answers
def self_test(scorer: Scorer) -> bool:
    """Ask a scorer about a picture whose score is known; by its name, so that a served one can be asked, too.

    True: it passed; False: for its name there is no picture of known score. RewardError that names the scorer, what it
    was shown and what it said where it fails.
    """
    if scorer.name not in KNOWN_ANSWERS:
        return False
    images, prompts, is_right, claim = KNOWN_ANSWERS[scorer.name]()
    scores = [float(score) for score in scorer.score(torch.stack(images), prompts, None)]
    if not is_right(*scores):
        said = ", ".join(f"{score:.4g}" for score in scores)
        raise RewardError(f"scorer {scorer.name!r} failed its self-test: {claim}, but it said {said}")
    return True


def _flat(color: str) -> Image.Image:
    return Image.new("RGB", (256, 256), color)


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def _prompt(text: str, **metadata) -> Prompt:
    return Prompt(text, "quality", metadata, "self-test")


def _known_ocr() -> tuple:
    sign = _flat("white")
    ImageDraw.Draw(sign).text((128, 128), "HELLO", "black", ImageFont.load_default(48), anchor="mm")
    prompts = [_prompt('a sign that says "HELLO"')] * 2
    claim = "a rendered word must score 1 and a blank page 0"
    return [_tensor(sign), _tensor(_flat("white"))], prompts, lambda word, blank: (word, blank) == (1, 0), claim


def _known_jpeg() -> tuple:
    noise = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))
    claim = "a flat picture must score above 0.95 and noise below 0.5"
    return [_tensor(_flat("grey")), noise], [_prompt("")] * 2, lambda flat, rough: flat > 0.95 and rough < 0.5, claim


def _known_clip() -> tuple:
    prompts = [_prompt("a red square"), _prompt("a blue square")]
    claim = "a red square must score higher as 'a red square' than as 'a blue square'"
    return [_tensor(_flat("red"))] * 2, prompts, lambda red, blue: red > blue, claim


def _known_aesthetic() -> tuple:
    claim = "a sunset must score in [0, 12]"  # a wrong head, or features of another length, are far off
    sunset = torch.linspace(0, 1, 256)[None, :, None] * torch.tensor([1.0, 0.5, 0.2])[:, None, None].expand(3, 1, 256)
    return [sunset], [_prompt("")], lambda rating: 0 <= rating <= 12, claim


def _known_geneval() -> tuple:
    sign = _flat("white")
    ImageDraw.Draw(sign).regular_polygon((128, 128, 80), 8, fill="red")
    drawn = _prompt("a photo of a red stop sign", include=[{"class": "stop sign", "count": 1, "color": "red"}])
    # Of so many objects asked for, each one found adds to the graded reward; the verdict is asked about one of them.
    crowd = [{"class": name, "count": rewards.MAX_PER_CLASS} for name in CLASSES]
    prompts = [drawn, _prompt("a crowd", include=crowd), _prompt("a person", include=[{"class": "person", "count": 1}])]
    claim = "a blank picture must show no object, hence score 0"
    blank = _tensor(_flat("grey"))
    return [_tensor(sign), blank, blank], prompts, lambda _, crowd, person: crowd == person == 0, claim


KNOWN_ANSWERS = {
    "ocr": _known_ocr, "jpeg": _known_jpeg, "geneval": _known_geneval, "aesthetic": _known_aesthetic,
    **dict.fromkeys(("pickscore", "clipscore", "hps", "imagereward"), _known_clip),
}  # fmt: skip
