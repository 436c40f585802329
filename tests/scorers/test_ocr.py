"""Oracles for what needs no network of ours: pictures as bytes, OCR, JPEG, and the self-tests of all scorers."""

import io
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from rewards import RewardError, Scorer
from scorers import registry, selftest
from scorers.ocr import jpeg, ocr
from scorers.panel import Panel
from tests.helpers.clip import PROMPTS, prompt


# ------------------------------------------------------------------------------------------------------- JPEG
def test_jpeg_is_one_minus_the_bytes_of_the_file_over_those_of_the_pixels():
    noise, found = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0)), {}
    # 0.25 is byte 63.75, hence 64; a picture of 16 x 24 x 3 = 1,152 bytes
    arrays = np.full((16, 24, 3), 64, np.uint8), (noise * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    for options in ((95, 0), (95, -1), (75, 0)):
        for pixels in arrays:
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG", quality=options[0], subsampling=options[1])
            found.setdefault(options, []).append(1 - len(stream.getvalue()) / 1152)
    scores = jpeg().score(torch.stack([torch.full_like(noise, 0.25), noise]), PROMPTS[:2], None).tolist()
    assert scores == pytest.approx(found[95, 0]) and scores[0] > scores[1] + 0.3
    assert found[95, -1][1] != found[95, 0][1] != found[75, 0][1], "its own settings"


# ------------------------------------------------------------------------------------------------------------ OCR
def test_ocr_scores_what_the_engine_reads_and_leaves_out_lines_it_did_not():
    lines = {10: [("GRAND", 0.9), ("opening", 0.2)], 20: [("GRAND", 0.9), ("opening", 0.0)], 30: []}
    scorer = ocr(engine=lambda picture: lines[int(picture[0, 0, 0])])
    images = torch.tensor([30, 10, 20])[:, None, None, None].expand(3, 3, 4, 6) / 255
    scores = scorer.score(images, [prompt('a banner "Grand Opening"')] * 3, None)
    # "GRAND" against "grandopening", 12 letters: 7 are missing
    assert scores.tolist() == pytest.approx([0.0, 1.0, 5 / 12])
    given = prompt("a banner", target="grand opening")
    assert scorer.score(images, [given] * 3, None).tolist() == scores.tolist()
    full = (
        ocr(engine=lambda picture: [("ＯＰＥＮ", 1.0)]),
        ocr(engine=lambda picture: [("ＯＰＥＮ", 1.0)], released=True),
    )
    assert [s.score(images[:1], [prompt('"open"')], None).item() for s in full] == [1, 0]
    with pytest.raises(RewardError, match=r"scorer 'ocr': no target text.*for the prompt 'no words'"):
        scorer.score(images[:2], [prompt('a "b"'), prompt("no words")], None)


def sign(*lines, paper=(240, 235, 220), ink=(20, 30, 120)):
    picture = Image.new("RGB", (384, 256), paper)
    for row, line in enumerate(lines):
        ImageDraw.Draw(picture).text((192, 70 + 90 * row), line, ink, ImageFont.load_default(44), anchor="mm")
    return selftest._tensor(picture)


@pytest.mark.skipif(any(find_spec(m) is None for m in ("rapidocr", "onnxruntime", "cv2")), reason="extra ocr")
def test_the_real_engine_reads_rendered_words():
    scorer = ocr()
    images = torch.stack([sign("minOPD 2026"), sign("Grand", "Opening"), sign("Open"), sign()])
    texts = ['a sign "minOPD 2026"', 'a banner "Grand Opening"', 'a door "Closed"', 'a wall "Grand Opening"']
    scores = scorer.score(images, [prompt(text) for text in texts], None).tolist()
    # "open" for "closed", 6 letters: c and l are missing, p should be s, n should be d
    assert scores == pytest.approx([1, 1, 1 - 4 / 6, 0])
    for text in ("Open", "Café 24!", "Straße", "营业中", "營業", "かな", "naïve – “x”"):
        scorer.check(prompt("", target=text))
    for script, text in (("cyrillic", "ПРИВЕТ"), ("hangul", "안녕"), ("arabic", "مرحبا"), ("devanagari", "हिन्दी")):
        with pytest.raises(RewardError, match=f"{script}.*'{text}' can never be read"):
            scorer.check(prompt(f'a sign "{text}"'))
    for metadata, said in (({"target": "안녕"}, "hangul"), ({}, "no target text")):
        with pytest.raises(RewardError, match=f"^p.txt:1: scorer 'ocr': .*{said}"):
            Panel([scorer], {"default": {"ocr": 1.0}}).check([prompt('"fine"'), prompt("a dog", **metadata)])
    Panel([scorer], {"default": {"ocr": 0.0}}).check([prompt("a dog")])
    assert selftest.self_test(scorer) and selftest.self_test(jpeg())


# ------------------------------------------------------------------------------------------------------ self-test
def rigged(name, *scores):
    return Scorer(name, lambda images, prompts, sources: torch.tensor(scores[: len(prompts)]), -math.inf, math.inf)


RIGGED = [
    ("ocr", (1.0, 0.0), (0.0, 0.0)), ("ocr", (1.0, 0.0), (1.0, 0.2)), ("jpeg", (0.98, 0.2), (0.98, 0.97)),
    ("geneval", (1.0, 0.0, 0.0), (1.0, 0.0125, 0.0)), ("geneval", (1.0, 0.0, 0.0), (1.0, 0.0, 1.0)),
    ("pickscore", (0.8, 0.7), (0.7, 0.7)), ("clipscore", (0.9, 0.8), (0.8, 0.9)), ("hps", (0.3, 0.2), (0.2, 0.3)),
    ("imagereward", (1.0, -1.0), (-1.0, 1.0)), ("aesthetic", (5.0,), (40.0,)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "good", "bad"), RIGGED)
def test_a_blind_scorer_fails_its_self_test_by_name(name, good, bad):
    assert selftest.self_test(rigged(name, *good)) is True
    with pytest.raises(RewardError, match=f"scorer '{name}' .*said {bad[0]:.4g}"):
        selftest.self_test(rigged(name, *bad))


def test_a_scorer_of_another_name_has_no_self_test():
    assert selftest.self_test(rigged("mine", 0.0)) is False
    assert set(selftest.KNOWN_ANSWERS) <= set(registry.KINDS)
