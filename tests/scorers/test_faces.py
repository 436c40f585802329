"""Oracles for the face scorer: a toy engine, and, if dlib is installed, real photographs."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from data.files import Prompt
from rewards import Face, RewardError
from scorers import common
from scorers import faces as F
from scorers.geneval import geneval
from scorers.ocr import ocr
from tests.helpers.checks import refusal as _refusal


def prompts(*texts):
    return [Prompt(text, "edit", {}, f"p.jsonl:{line}") for line, text in enumerate(texts, start=1)]


def refusal(call, *arguments):
    return _refusal(call, *arguments, error=RewardError)


# ----------------------------------------------------------------------------------------------------- the scorer
def toy_engine():
    """Sees a face in a picture that is not black: its embedding is the mean colour; `seen` counts the pictures."""
    seen = []

    def find(pixels):
        seen.append(pixels.shape)
        color = pixels.reshape(-1, 3).mean(0)
        return [Face((0, 0, 10, 10), color)] if color.any() else []

    return F.Engine(find, 0.0), seen


def plain(red, green, blue, side=4):
    return torch.tensor([red, green, blue], dtype=torch.float32).view(3, 1, 1).expand(3, side, side).clone()


def test_each_sample_is_compared_with_its_own_source_the_first_of_several():
    engine, seen = toy_engine()
    scorer = F.face(engine)
    images = torch.stack([plain(1, 0, 0), plain(0.6, 0.8, 0), plain(0.6, 0.8, 0), plain(0, 0, 0), plain(0, 1, 0)])
    red, green = plain(1, 0, 0, side=6), plain(0, 1, 0, side=5)
    scores = scorer.score(images, prompts(*"abcde"), [(red,), (red, green), (green,), (green, red), (green,)])
    assert scores.tolist() == pytest.approx([1, 0.6, 0.8, 0, 1], abs=0.01) and scores.dtype == torch.float32
    assert (scorer.name, scorer.low, scorer.high) == ("identity", 0.0, 1.0)
    assert seen.count((6, 6, 3)) == seen.count((5, 5, 3)) == 1, "a group's source is looked at once"


def test_a_source_without_a_face_is_an_error_or_skipped_with_one_neutral_score_for_the_whole_group():
    images = torch.stack([plain(1, 0, 0), plain(0, 1, 0), plain(0, 0, 0)])
    message = refusal(F.face(toy_engine()[0]).score, images, prompts(*["give her a hat"] * 3), [(plain(0, 0, 0),)] * 3)
    assert "'give her a hat'" in message and "identity" in message and "skip" in message
    scorer = F.face(toy_engine()[0], no_face="skip")
    scores = scorer.score(images, prompts("p", "p", "p"), [(plain(0, 0, 0),)] * 3)
    assert scores.tolist() == [F.NEUTRAL] * 3 and (scores - scores.mean()).eq(0).all(), "no advantage for anybody"


def test_what_cannot_be_scored_is_named(tmp_path):
    scorer, bad = F.face(toy_engine()[0]), plain(math.inf, 0, 0)
    for said, call, *arguments in (
        ("never", F.face, toy_engine()[0], "never"), ("source images", scorer.score, bad[None], prompts("p"), None),
        ("'my p'", scorer.score, bad[None], prompts("my p"), [(plain(1, 0, 0),)]),
        *([(str(tmp_path), F.dlib_engine, str(tmp_path))] if importlib.util.find_spec("dlib") else []),
    ):  # fmt: skip
        assert said in refusal(call, *arguments)


EXTRAS = {"face": F.face, "ocr": ocr, "geneval": geneval}


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_scorer_whose_packages_are_missing_names_their_extra(monkeypatch, extra):
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    assert f"[{extra}]" in refusal(EXTRAS[extra])


# ------------------------------------------------------------------------------------------------ real photographs
def photograph(package, path):
    spec = importlib.util.find_spec(package)
    file = Path(spec.origin).parent / path if spec else None
    if file is None or not file.is_file():
        pytest.skip(f"{package} with its sample photograph is not installed")
    return Image.open(file).convert("RGB")


@pytest.fixture(scope="module")
def dlib_scorer():
    pytest.importorskip("dlib", exc_type=ImportError)
    return F.face()


@pytest.fixture(scope="module")
def hopper():
    return photograph("matplotlib", "mpl-data/sample_data/grace_hopper.jpg")


def tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def score(scorer, source, result):
    return scorer.score(tensor(result)[None], prompts("an edit"), [(tensor(source),)]).item()


def test_one_person_keeps_her_identity_through_edits_that_do_not_touch_it(dlib_scorer, hopper):
    assert score(dlib_scorer, hopper, hopper) == 1
    edited = (ImageOps.mirror(hopper), ImageOps.grayscale(hopper).convert("RGB"), hopper.resize((256, 300)),
              hopper.filter(ImageFilter.GaussianBlur(2)))  # fmt: skip
    assert all(0.85 < score(dlib_scorer, hopper, each) < 1 for each in edited)
    assert score(dlib_scorer, hopper, hopper.rotate(45)) > 0.85, "a tilted head is not taken for a lost one"
    assert score(dlib_scorer, hopper, Image.new("RGB", (300, 300), "gray")) == 0
    assert "no face found" in refusal(score, dlib_scorer, Image.new("RGB", (300, 300), "gray"), hopper)


def test_another_person_scores_below_half_and_a_crowd_as_its_likeliest_member(dlib_scorer, hopper):
    collins = photograph("skimage", "data/astronaut.png")
    assert 0.3 < score(dlib_scorer, hopper, collins) < 0.5 and 0.3 < score(dlib_scorer, collins, hopper) < 0.5
    together = Image.new("RGB", (1024, 600))
    together.paste(collins, (0, 0))
    together.paste(hopper, (512, 0))
    assert score(dlib_scorer, collins, together) > 0.9 and score(dlib_scorer, hopper, together) > 0.9
    assert score(dlib_scorer, together, hopper) > 0.9, "she fills more of the picture"
