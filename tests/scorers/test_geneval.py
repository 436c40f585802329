"""Oracles for GenEval's models: what Mask2Former's outputs become, and which colour CLIP names."""

import math
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data.written import CLASSES, COLORS
from rewards import RewardError
from scorers import geneval as G
from scorers import selftest
from scorers.common import pixels_of
from scorers.geneval import geneval
from tests.helpers.clip import PROMPTS, pictures, prompt, save_clip, save_detector


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


NAMES = ("cat", "dog", "cow")


def test_a_mask_becomes_a_box_and_a_score_as_by_hand():
    classes = torch.full((4, 4), -40.0)
    classes[0, 1] = 0.0  # a dog for sure
    classes[1, 3] = 0.0  # nothing
    classes[2, 0] = classes[2, 2] = 0.0  # half a cat and half a cow
    classes[3, 2] = 0.0  # a cow, nowhere
    masks = torch.full((4, 4, 6), -9.0)
    masks[0, 1:3, 2:5] = torch.tensor([[4.0, 4.0, 4.0], [0.5, 0.5, 0.5]])
    masks[2, 0, 0] = 2.0
    found = G.instances(classes, masks, (4, 6), NAMES)
    sigmoid = {x: 1 / (1 + math.exp(-x)) for x in (4.0, 0.5, 2.0)}
    assert found[0]["class"] == "dog" and found[0]["box"] == (2, 1, 5, 3)
    assert {(f["class"], f["box"]) for f in found[1:]} == {("cat", (0, 0, 1, 1)), ("cow", (0, 0, 1, 1))}
    expected = [(sigmoid[4.0] + sigmoid[0.5]) / 2, sigmoid[2.0] / 2, sigmoid[2.0] / 2]
    assert [f["score"] for f in found] == pytest.approx(expected, rel=1e-5)
    assert found[0]["mask"].shape == (4, 6) and found[0]["mask"].sum() == 6


def test_only_as_many_detections_as_queries_and_none_below_the_threshold():
    classes = torch.log(torch.tensor([[0.33, 0.33, 0.33, 0.01], [0.31, 0.29, 0.2, 0.2]]))
    masks = torch.full((2, 4, 6), 40.0)
    assert len(G.instances(classes, masks, (4, 6), NAMES)) == 2  # the third 0.33 and the 0.31 come too late
    classes[0] = torch.log(torch.tensor([0.299, 0.299, 0.299, 0.103]))
    assert [f["score"] for f in G.instances(classes, masks, (4, 6), NAMES)] == pytest.approx([0.31])
    masks[:] = 1.0  # sigmoid 0.73: 0.31 becomes 0.23
    assert G.instances(classes, masks, (4, 6), NAMES) == []


def test_boxes_and_scores_agree_with_transformers_own_post_processing():
    from transformers import Mask2FormerImageProcessorPil

    rng = torch.Generator().manual_seed(0)
    classes = 6 * torch.randn(2, 9, 4, generator=rng)
    masks = F.interpolate(4 * torch.randn(2, 9, 4, 4, generator=rng), (24, 24), mode="bicubic")
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        outputs, threshold=0.3, target_sizes=[(96, 120)] * 2, return_binary_maps=True
    )
    for k in range(2):
        ours = sorted(G.instances(classes[k], masks[k], (96, 120), NAMES), key=lambda found: -found["score"])
        told = zip(theirs[k]["segments_info"], theirs[k]["segmentation"], strict=True)
        told = sorted(told, key=lambda both: -both[0]["score"])
        for mine, (info, mask) in zip(ours, told, strict=True):
            assert mine["class"] == NAMES[info["label_id"]]
            assert mine["score"] == pytest.approx(info["score"], abs=1e-2)
            assert (torch.from_numpy(mine["mask"]) ^ mask.bool()).sum() < 0.05 * mask.sum() + 30
        assert len(ours) > 4


def test_an_object_is_cut_out_on_grey_and_a_sliver_keeps_its_middle_only():
    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    mask = np.zeros((5, 7), bool)
    mask[1, 2] = mask[3, 4] = True
    crop = G.isolated(picture, {"box": (2, 1, 5, 4), "mask": mask})
    assert crop.shape == (3, 3, 3) and (crop.reshape(9, 3)[1:8] == 0x99).all()
    assert (crop[0, 0] == picture[1, 2]).all() and (crop[2, 2] == picture[3, 4]).all()
    picture, mask = np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 3, 3)), np.ones((200, 3), bool)
    crop = G.isolated(picture, {"box": (0, 0, 2, 200), "mask": mask})
    assert crop.shape == (16, 2, 3) and crop[0, 0, 0] == 92 and crop[-1, 0, 0] == 107
    assert G.isolated(picture, {"box": (0, 0, 3, 24), "mask": mask}).shape == (24, 3, 3)


needs_scipy = pytest.mark.skipif(find_spec("scipy") is None, reason="extra geneval")


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("sure"), sure_of="sofa")


def couch(count=1, **more):
    return prompt("", tag="colors", include=[{"class": "couch", "count": count, **more}])


@needs_scipy
def test_geneval_counts_what_the_detector_finds_under_genevals_names(clip, sure):
    images, options = pictures(3, 40, 56), {"detector": str(sure), "clip": str(clip), "short_side": 64, "batch": 2}
    network = G._detector(str(sure), "cpu", torch.float32, 64)
    with torch.no_grad():
        found = network(pixels_of(images))
        images[1] = 1 - images[1]
        changed = network(pixels_of(images))
        images[1] = 1 - images[1]
    assert {each["class"] for row in found for each in row} == {"couch"}
    told = [[[(f["class"], f["score"], f["box"]) for f in row] for row in rows] for rows in (found, changed)]
    assert [a == b for a, b in zip(*told, strict=True)] == [True, False, True], "a sample does not touch its neighbours"
    counts = [len(row) for row in found]
    assert min(counts) >= 1 and all(each["mask"].shape == (40, 56) for row in found for each in row)
    prompts = [couch(count) for count in counts]
    assert geneval(**options).score(images, prompts, None).tolist() == [1, 1, 1]
    more = [couch(count + 1) for count in counts]
    graded = geneval(**options).score(images, more, None)
    assert graded.tolist() == pytest.approx([1 - 1 / (count + 1) for count in counts])
    verdicts = geneval(strict=True, **options).score(images, [more[0], *prompts[1:]], None)
    assert verdicts.tolist() == [0, 1, 1]
    grey = couch(color="grey")
    bad = prompt("", include=[{"class": "cat", "count": 1}], exclude=[{"class": "remote", "count": 2}])
    for asked, fault in ((bad, "no class 'remote'"), (grey, "no color 'grey'"), (PROMPTS[0], "non-empty 'include'")):
        with pytest.raises(RewardError, match=f"'geneval': .*{fault}.*for the prompt '{asked.text}'"):
            geneval(**options).score(images[:1], [asked], None)


def test_the_colour_is_the_nearest_of_the_ten_by_clips_logits(clip):
    """Against CLIPModel's features of each crop and text on its own, averaged as GenEval does."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    name_color = G._color_classifier(str(clip), "cpu", torch.float32)
    picture, detections = pixels_of(pictures(1, 60, 60))[0], []
    for k, name in enumerate(("cat", "couch", "cat", "bus", "tv", "couch")):
        mask = np.zeros((60, 60), bool)
        mask[5 * k : 5 * k + 20, 3 * k : 3 * k + 30] = True
        detections.append({"class": name, "box": (3 * k, 5 * k, 3 * k + 30, 5 * k + 20), "mask": mask})
    with torch.no_grad():
        name_color(picture, detections)
        for found in detections:
            crop = Image.fromarray(G.isolated(picture, found))
            image = model.get_image_features(**CLIPImageProcessorPil.from_pretrained(clip)(crop, return_tensors="pt"))
            similar = []
            for color in COLORS:
                name = found["class"]
                lines = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}",
                         f"a photo of a {color} object"]  # fmt: skip
                unit = [F.normalize(model.get_text_features(**tokenizer(line, truncation=True, max_length=30,
                        return_tensors="pt")).pooler_output, dim=-1) for line in lines]  # fmt: skip
                similar.append(F.cosine_similarity(image.pooler_output, sum(unit)).item())
            assert found["color"] == COLORS[int(np.argmax(similar))]
    assert len({found["color"] for found in detections}) > 1


@needs_scipy
def test_geneval_asks_for_colours_only_where_the_prompt_does(clip, sure, monkeypatch):
    asked = []
    monkeypatch.setattr(G, "_color_classifier", lambda *_: lambda picture, found: [
        (asked.append(each["class"]), each.update(color="pink")) for each in found])  # fmt: skip
    scorer = geneval(detector=str(sure), clip=str(clip), short_side=64)
    plain = scorer.score(pictures(1), [couch()], None)
    assert asked == [] and 0 <= plain[0] <= 1
    count = 6 if plain[0] == 0 else next(n for n in range(1, 7) if scorer.score(pictures(1), [couch(n)], None) == 1)
    pink, blue = (scorer.score(pictures(1), [couch(count, color=c)], None).item() for c in ("pink", "blue"))
    assert (pink, blue) == (1.0, 0.5) and set(asked) == {"couch"}


@needs_scipy
def test_a_detector_of_other_classes_and_one_that_sees_things_on_a_blank_picture_are_refused(clip, sure, tmp_path):
    options = {"clip": str(clip), "short_side": 64}
    assert selftest.self_test(geneval(detector=str(save_detector(tmp_path / "good")), **options)) is True
    with pytest.raises(RewardError, match="blank picture must show no object"):
        selftest.self_test(geneval(detector=str(sure), **options))
    labels = [name for name in CLASSES if name != "zebra"] + ["unicorn"]
    with pytest.raises(RewardError, match="zebra"):
        geneval(detector=str(save_detector(tmp_path / "other", labels=labels)), clip=str(clip))
