"""How much of the quoted text can be read from a picture (OCR), and how plain is the picture (JPEG)?"""

import io
import math
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from rewards import RewardError, Scorer, as_seen, ocr_reward, ocr_target
from scorers.common import batched, require


def ocr(device: str = "cpu", engine: Callable | None = None, released: bool = False) -> Scorer:
    """How much of the quoted text can be read: `rewards.ocr_reward` of what an OCR engine reads. F §6.1 (OCR).

    engine: (H, W, 3) uint8, RGB -> [(text of a line, confidence), ...]; lines of confidence 0 are left out. By default
    RapidOCR (PP-OCR's networks, as in F, with the weights in its wheel), on the GPU if `device` is one and the
    installed ONNX runtime can use it. A target with a letter that it does not know can never be read, and is refused.
    `released` compares as the released rule does.
    """
    read, letters = (engine, "") if engine else _rapidocr(device)
    known = set(as_seen(letters))

    def rate(pixels, prompts):
        lines = [[text for text, confidence in read(picture) if confidence > 0] for picture in pixels]
        return [ocr_reward(" ".join(found), p.text, p.metadata.get("target", ""), released)
                for found, p in zip(lines, prompts, strict=True)]  # fmt: skip

    def check(prompt):
        target = prompt.metadata.get("target") or ocr_target(prompt.text)
        if known and (missing := [letter for letter in as_seen(target) if letter not in known]):
            name = unicodedata.name(missing[0], "a letter without a name").lower()
            raise RewardError(f"this OCR engine does not know {missing[0]!r} ({name}), so {target!r} can never be read")

    # The engine takes one at a time; errors then name their prompt.
    return batched("ocr", rate, 0.0, 1.0, batch=1)._replace(check=check)


def _rapidocr(device: str) -> tuple[Callable, str]:
    """(picture -> lines, the letters that it knows, with blanks between them)."""
    require("ocr", "rapidocr", "onnxruntime", "cv2")
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
        found = reader(Image.fromarray(picture), use_det=True)  # an array would be taken for BGR
        return list(zip(found.txts or (), found.scores or (), strict=True))

    reader(Image.new("RGB", (64, 32)), use_det=False)  # loads the network; the option would hold for later calls, too
    return read, " ".join(reader.text_rec.postprocess_op.character)


def jpeg() -> Scorer:
    """Compressibility, `score_jpeg`. It needs no model: the reward to try a new machine with."""
    return batched("jpeg", lambda pixels, _: score_jpeg(pixels), -math.inf, 1.0, batch=16)


def score_jpeg(pixels: Sequence[np.ndarray]) -> list[float]:
    """DDPO's compressibility (in neither paper): 1 - JPEG bytes / raw bytes, below 1, higher is plainer.

    pixels: B pictures (H, W, 3) of uint8. Quality 95 and no chroma subsampling, so that detail counts. Any image model
    can learn it.
    """
    scores = []
    for picture in pixels:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "JPEG", quality=95, subsampling=0)
        scores.append(1 - stream.tell() / picture.size)
    return scores
