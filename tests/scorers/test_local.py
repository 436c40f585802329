"""Do the scorers hand the right pixels to the right network and the right numbers to the rules?

The networks are tiny and random, saved in the layouts of the public ones; what they should say is computed by other
routes: transformers' own forward, the published models written out by hand in the names of their files, closed forms.
"""

import json
import math
import os
import pickle
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import rewards
from data.files import Prompt
from rewards import RewardError, Scorer
from scorers import convert
from scorers import local as scorers
from tests.helpers.sd3 import _clip_vocabulary, _randomise

SIDE, HEADS = 24, 2  # of the tiny CLIPs' pictures, and of their attention


def prompt(text, **metadata):
    return Prompt(text, "quality", metadata, "p.txt:1")


def pictures(count, height=40, width=40, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


TEXTS = ["a cat", "two dogs and a cat", "", "a cat"]
PROMPTS = [prompt(text) for text in TEXTS]


# ------------------------------------------------------------------------------------------------ tiny checkpoints
def save_clip(folder, scale=37.0, seed=0):
    """A random CLIPModel with its processor and tokenizer, two files wide, vision and text of different widths."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    vocabulary = _clip_vocabulary()
    size = len(vocabulary)
    config = CLIPConfig(
        text_config={"vocab_size": size, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2,
                     "num_attention_heads": HEADS, "max_position_embeddings": 30, "hidden_act": "gelu",
                     "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1},
        vision_config={"hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 3, "image_size": SIDE,
                       "num_attention_heads": HEADS, "patch_size": 8, "hidden_act": "gelu"},
        projection_dim=12,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
        _randomise(model)
        model.logit_scale.data.fill_(math.log(scale))
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size=SIDE, crop_size=SIDE).save_pretrained(folder)  # plain numbers, as OpenAI's files have
    letters = folder / "letters"
    letters.mkdir()
    (letters / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (letters / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(letters, model_max_length=77).save_pretrained(folder)
    return folder


def save_detector(folder, sure_of=None, seed=0, labels=None):
    """A random Mask2Former of COCO's 80 classes; with `sure_of` every query says this class with certainty."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    backwards = {new: old for old, new in scorers.GENEVAL_NAMES.items() if old not in ("mouse", "remote", "keyboard")}
    labels = labels or [backwards.get(name, name) for name in scorers.CLASSES]
    swin = SwinConfig(image_size=32, embed_dim=12, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6,
        id2label=dict(enumerate(labels)), label2id={name: k for k, name in enumerate(labels)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mask2FormerForUniversalSegmentation(config).eval()
        if sure_of is not None:
            model.class_predictor.bias.data[labels.index(sure_of)] = 30.0
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


# ------------------------------------------------------------------------------------------------- make and score
def test_make_names_what_was_probably_meant():
    assert scorers.make("jpeg").name == "jpeg"
    with pytest.raises(RewardError, match="unknown scorer 'pikscore'; did you mean 'pickscore'"):
        scorers.make("pikscore")
    with pytest.raises(RewardError, match="unknown scorer '0'; choose one of geneval, ocr"):
        scorers.make("0")
    with pytest.raises(RewardError, match="'geneval' has no option 'strickt'; did you mean 'strict'"):
        scorers.make("geneval", strickt=True)
    with pytest.raises(RewardError, match="unknown dtype 'float23'; did you mean 'float32'"):
        scorers.make("jpeg", dtype="float23")


def test_make_hands_device_and_dtype_to_those_that_use_them(monkeypatch):
    seen = {}
    both = lambda device, dtype, depth=1: seen.update(device=device, dtype=dtype, depth=depth)  # noqa: E731
    monkeypatch.setitem(scorers.FACTORIES, "both", both)
    monkeypatch.setitem(scorers.FACTORIES, "neither", lambda depth=1: seen.update(depth=depth))
    scorers.make("both", device="meta", dtype="bfloat16", depth=3)
    assert seen == {"device": "meta", "dtype": torch.bfloat16, "depth": 3}
    seen.clear()
    scorers.make("neither", device="meta", dtype=torch.float16)
    assert seen == {"depth": 1}


def test_every_kind_is_a_factory_that_is_named_like_it():
    assert all(factory.__name__ == kind for kind, factory in scorers.FACTORIES.items())


def mean_of(pixels, prompts):
    return [p.mean() / 255 + len(q.text) for p, q in zip(pixels, prompts, strict=True)]


def test_a_batch_is_looked_at_in_parts_and_its_order_is_kept():
    sizes = []

    def judge(pixels, prompts):
        sizes.append(len(pixels))
        return mean_of(pixels, prompts)

    images, prompts = pictures(7), [prompt("x" * n) for n in (3, 1, 4, 1, 5, 9, 2)]
    scores = scorers._scorer("mean", judge, 0, 99, batch=3).score(images, prompts, None)
    assert sizes == [3, 3, 1] and scores.dtype == torch.float32 and scores.shape == (7,)
    expected = [image.mean().item() + len(p.text) for image, p in zip(images, prompts, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=2e-3)


def test_pixels_are_rounded_to_the_nearest_byte_and_keep_their_places():
    image = torch.zeros(1, 3, 2, 5)
    image[0, 1, 0, 4], image[0, 2, 1, 0] = 0.4999, 1.0005
    (array,) = scorers._pixels(image)
    assert array.shape == (2, 5, 3) and array.dtype == np.uint8
    assert array[0, 4].tolist() == [0, 127, 0] and array[1, 0].tolist() == [0, 0, 255] and array.sum() == 127 + 255


@pytest.mark.parametrize(
    ("images", "fault"),
    [
        (torch.full((2, 3, 4, 4), math.nan), r"\[0, 1\], they are in \[nan"),
        (pictures(2) * 255, r"they are in \[0"),
        (pictures(2) * 2 - 1, r"they are in \[-"),
        (pictures(2)[:, :1], r"\(B, 3, H, W\), got \(2, 1, 40, 40\)"),
    ],
)
def test_pictures_that_are_none_are_refused_by_name(images, fault):
    with pytest.raises(RewardError, match=rf"scorer 'mean': images must be .*{fault}.*for the prompt 'a cat'"):
        scorers._scorer("mean", mean_of, 0, 99, 4).score(images, PROMPTS[:2], None)


def test_whatever_fails_in_a_model_is_one_line_with_scorer_prompt_and_cause():
    def judge(pixels, prompts):
        if prompts[0].text == "two dogs and a cat":
            raise RuntimeError("CUDA out of memory\nTried to allocate")
        return [math.nan if p.text == "" else 0.5 for p in prompts]

    scorer = scorers._scorer("odd", judge, 0, 1, batch=1)
    with pytest.raises(RewardError) as caught:
        scorer.score(pictures(2), PROMPTS[:2], None)
    assert str(caught.value) == "scorer 'odd': CUDA out of memory, for the prompt 'two dogs and a cat'"
    with pytest.raises(RewardError, match="'odd': nan is not finite, for the prompt ''"):
        scorer.score(pictures(1), PROMPTS[2:3], None)
    with pytest.raises(RewardError, match="'odd': 3 images for 2 prompts"):
        scorer.score(pictures(3), PROMPTS[:2], None)
    with pytest.raises(RewardError, match="batch is 0; it must be 1 at least"):
        scorers._scorer("odd", judge, 0, 1, batch=0)
    with pytest.raises(RewardError, match="2 prompts but scores of shape"):  # a (B, 1) would broadcast later
        scorers._scorer("odd", lambda pixels, _: [[0.1], [0.2]], 0, 1, 4).score(pictures(2), PROMPTS[:2], None)


# --------------------------------------------------------------------------------------------------- CLIP and kin
def own_logits(folder, images, texts):
    """exp(logit_scale) cos by CLIPModel's forward, each pair on its own, and the cosine."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    prepare, logits = CLIPImageProcessorPil.from_pretrained(folder), []
    for image, text in zip(images, texts, strict=True):
        pixels = prepare(Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()), return_tensors="pt")
        tokens = tokenizer(text, truncation=True, max_length=30, return_tensors="pt")  # unpadded: another route
        with torch.no_grad():
            logits.append(model(**pixels, **tokens).logits_per_image.item())
    return torch.tensor(logits)


def test_pickscore_clipscore_and_hps_are_clips_own_logits_scaled(clip):
    images, texts = pictures(4), [*TEXTS[:3], "a very long text " * 9]  # the last one is cut
    prompts, logits = [prompt(text) for text in texts], own_logits(clip, images, texts)
    made = {kind: scorers.make(kind, model=str(clip), batch=3) for kind in ("clipscore", "hps")}
    made["pickscore"] = scorers.pickscore(model=str(clip), processor=str(clip), batch=3)
    factors = {"pickscore": 1 / 26, "clipscore": 100 / 30 / 37, "hps": 1 / 37}
    assert logits.std() > 1
    for kind, scorer in made.items():
        assert torch.allclose(scorer.score(images, prompts, None), logits * factors[kind], atol=2e-5), kind
        assert scorer.high == pytest.approx(37 * factors[kind]) and scorer.low == -scorer.high


def test_a_sample_of_the_batch_does_not_touch_its_neighbours(clip):
    scorer, images = scorers.clipscore(model=str(clip)), pictures(4)
    before = scorer.score(images, PROMPTS, None)
    images[1], prompts = 1 - images[1], [*PROMPTS[:2], prompt("a longer text than the others have"), PROMPTS[3]]
    after = scorer.score(images, prompts, None)
    assert (before != after).tolist() == [False, True, True, False]
    order = [2, 0, 3, 1]
    shuffled = scorer.score(images[order], [prompts[k] for k in order], None)
    assert torch.allclose(shuffled, after[order], atol=1e-5) and shuffled.std() > 1e-3


def test_half_precision_scores_are_near_and_float32(clip):
    full, half = (scorers.make("clipscore", model=str(clip), dtype=dtype) for dtype in ("float32", "bfloat16"))
    scores = half.score(pictures(4), PROMPTS, None)
    assert scores.dtype == torch.float32
    assert 0 < (scores - full.score(pictures(4), PROMPTS, None)).abs().max() < 0.2


def test_clip_crops_a_wide_picture_and_hps_does_not(clip):
    wide = pictures(2, 40, 80)
    wide[1] = wide[0]
    wide[1, :, :, :8] = 0  # the left edge, beyond the square in the middle
    prompts = [PROMPTS[0]] * 2
    cropped = scorers.make("clipscore", model=str(clip)).score(wide, prompts, None)
    padded = scorers.make("hps", model=str(clip)).score(wide, prompts, None)
    assert cropped[0] == cropped[1] and padded[0] != padded[1]
    square = F.pad(wide, (0, 0, 20, 20))
    assert torch.equal(padded, scorers.make("hps", model=str(clip)).score(square, prompts, None))


def head_state(width, prefix="", seed=3):
    rng, sizes = torch.Generator().manual_seed(seed), (width, 1024, 128, 64, 16, 1)
    state = {}
    for place, rows, columns in zip((0, 2, 4, 6, 7), sizes[1:], sizes, strict=False):
        state[f"{prefix}{place}.weight"] = torch.randn(rows, columns, generator=rng) / columns**0.5
        state[f"{prefix}{place}.bias"] = torch.randn(rows, generator=rng)
    return state


def head_by_hand(state, x, prefix=""):
    for place in (0, 2, 4, 6, 7):
        x = x @ state[f"{prefix}{place}.weight"].T + state[f"{prefix}{place}.bias"]
    return x[:, 0]


def test_aesthetic_is_the_published_linear_head_on_unit_image_features(clip, tmp_path):
    from transformers import CLIPImageProcessorPil, CLIPModel

    state, images = head_state(12, "layers."), pictures(3)
    torch.save(state, tmp_path / "head.pth")
    folder = convert.convert("aesthetic", tmp_path / "head.pth", tmp_path / "head")
    scores = scorers.make("aesthetic", model=str(clip), head=str(folder), batch=2).score(images, PROMPTS[:3], None)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(images, return_tensors="pt", do_rescale=False)
    with torch.no_grad():
        features = CLIPModel.from_pretrained(clip).eval().get_image_features(**pixels).pooler_output
    expected = head_by_hand(state, features / features.norm(dim=1, keepdim=True), "layers.")
    assert torch.allclose(scores, expected, atol=1e-2) and scores.std() > 0.02  # 8 bits on one side only
    with pytest.raises(RewardError, match="no head for 12 features .*convert.convert"):
        safetensors.torch.save_file(head_state(13), folder / "head.safetensors")
        scorers.aesthetic(model=str(clip), head=str(folder))


# --------------------------------------------------------------------------------------- hps: open_clip's own names
def open_clip_state(seed=1):
    """The tiny CLIP of `save_clip` as open_clip would have saved it."""
    rng, state = torch.Generator().manual_seed(seed), {}

    def add(name, *shape, shift=0.0):
        state[name] = torch.randn(*shape, generator=rng) / max(1, math.prod(shape[1:])) ** 0.5 + shift

    for side, width, inner, layers in (("visual.", 32, 36, 3), ("", 20, 28, 2)):
        norms = ("ln_pre", "ln_post") if side else ("ln_final",)
        blocks = [f"{side}transformer.resblocks.{n}." for n in range(layers)]
        for norm in [f"{side}{n}" for n in norms] + [f"{b}{n}" for b in blocks for n in ("ln_1", "ln_2")]:
            add(f"{norm}.weight", width, shift=1.0)
            add(f"{norm}.bias", width)
        for block in blocks:
            for name, rows, columns in (("attn.in_proj_", 3 * width, width), ("attn.out_proj.", width, width),
                                        ("mlp.c_fc.", inner, width), ("mlp.c_proj.", width, inner)):  # fmt: skip
                add(f"{block}{name}weight", rows, columns)
                add(f"{block}{name}bias", rows)
    add("visual.conv1.weight", 32, 3, 8, 8)
    add("visual.class_embedding", 32)
    add("visual.positional_embedding", 10, 32)
    add("visual.proj", 32, 12)
    add("token_embedding.weight", len(_clip_vocabulary()), 20)
    add("positional_embedding", 30, 20)
    add("text_projection", 20, 12)
    return state | {"logit_scale": torch.tensor(2.0)}


def open_clip_features(state, pixels, tokens):
    """Unit features by open_clip's architecture, straight from its names."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def run(x, side, layers, mask=None):
        for n in range(layers):
            block = f"{side}transformer.resblocks.{n}."
            attention = torch.nn.MultiheadAttention(x.shape[-1], HEADS, batch_first=True)
            own = f"{block}attn."
            attention.load_state_dict({k[len(own) :]: v for k, v in state.items() if k.startswith(own)})
            h = norm(x, f"{block}ln_1")
            x = x + attention(h, h, h, attn_mask=mask, need_weights=False)[0]
            inner = F.linear(norm(x, f"{block}ln_2"), state[f"{block}mlp.c_fc.weight"], state[f"{block}mlp.c_fc.bias"])
            x = x + F.linear(F.gelu(inner), state[f"{block}mlp.c_proj.weight"], state[f"{block}mlp.c_proj.bias"])
        return x

    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    image = norm(run(norm(x, "visual.ln_pre"), "visual.", 3)[:, 0], "visual.ln_post") @ state["visual.proj"]
    length = tokens.shape[1]
    y = state["token_embedding.weight"][tokens] + state["positional_embedding"][:length]
    y = norm(run(y, "", 2, torch.full((length, length), -math.inf).triu(1)), "ln_final")
    text = y[torch.arange(len(y)), tokens.argmax(1)] @ state["text_projection"]  # the end token is the largest
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def test_hps_from_an_open_clip_file_is_open_clips_cosine(clip, tmp_path):
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    state = open_clip_state()
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "HPS.pt")
    folder = convert.convert("hps", tmp_path / "HPS.pt", tmp_path / "hps", like=str(clip))
    images = pictures(4)
    scores = scorers.make("hps", model=str(folder)).score(images, PROMPTS, None)
    arrays = list((images * 255).round().byte().permute(0, 2, 3, 1).numpy())
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(arrays, return_tensors="pt")["pixel_values"]
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    tokens = tokenizer(TEXTS, padding="max_length", max_length=30, return_tensors="pt").input_ids
    with torch.no_grad():
        image, text = open_clip_features(state, pixels, tokens)
    expected = (image * text).sum(1)
    assert torch.allclose(scores, expected, atol=1e-5) and scores.std() > 0.01


# ------------------------------------------------------------------------------------- imagereward: BLIP's own names
def blip_state(seed=2):
    """A tiny ImageReward.pt: BLIP's vision transformer (128 wide, 2 heads) and text half (64 wide, 1 head)."""
    rng, state = torch.Generator().manual_seed(seed), {}

    def linear(name, rows, columns):
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=rng) / columns**0.5
        state[f"{name}.bias"] = 0.3 * torch.randn(rows, generator=rng)

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=rng)
        state[f"{name}.bias"] = 0.3 * torch.randn(width, generator=rng)

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    state[f"{v}cls_token"], state[f"{v}pos_embed"] = (torch.randn(1, n, 128, generator=rng) for n in (1, 10))
    state[f"{v}patch_embed.proj.weight"] = torch.randn(128, 3, 8, 8, generator=rng) / 14
    state[f"{v}patch_embed.proj.bias"] = torch.randn(128, generator=rng)
    norm(f"{v}norm", 128)
    for n in range(2):
        block = f"{v}blocks.{n}."
        for name in ("norm1", "norm2"):
            norm(block + name, 128)
        for name, rows, columns in (("attn.qkv", 384, 128), ("attn.proj", 128, 128), ("mlp.fc1", 100, 128),
                                    ("mlp.fc2", 128, 100)):  # fmt: skip
            linear(block + name, rows, columns)
    for name, rows in (("word", 40), ("position", 50)):
        state[f"{t}embeddings.{name}_embeddings.weight"] = torch.randn(rows, 64, generator=rng)
    state[f"{t}embeddings.position_ids"] = torch.arange(50)[None]
    norm(f"{t}embeddings.LayerNorm", 64)
    for n in range(3):
        layer = f"{t}encoder.layer.{n}."
        for kind, source in (("attention", 64), ("crossattention", 128)):
            for name, columns in (("query", 64), ("key", source), ("value", source)):
                linear(f"{layer}{kind}.self.{name}", 64, columns)
            linear(f"{layer}{kind}.output.dense", 64, 64)
            norm(f"{layer}{kind}.output.LayerNorm", 64)
        linear(f"{layer}intermediate.dense", 72, 64)
        linear(f"{layer}output.dense", 64, 72)
        norm(f"{layer}output.LayerNorm", 64)
    for name, width in (("vision_proj", 128), ("text_proj", 64)):  # BLIP's contrastive heads, which rate nothing
        linear(f"blip.{name}", 7, width)
    return state | head_state(64, "mlp.layers.")


def blip_by_hand(state, pixels, tokens, mask):
    """ImageReward's rating before it is standardised, straight from BLIP's names."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    x = F.conv2d(pixels, state[f"{v}patch_embed.proj.weight"], state[f"{v}patch_embed.proj.bias"], stride=8)
    x = torch.cat([state[f"{v}cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + state[f"{v}pos_embed"]
    for n in range(2):
        block = f"{v}blocks.{n}."
        qkv = linear(norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").unflatten(-1, (3, 2, 64))
        qkv = qkv.permute(2, 0, 3, 1, 4)
        x = x + linear(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2), f"{block}attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1")), f"{block}mlp.fc2")
    seen = norm(x, f"{v}norm", 1e-6)
    words, places = (state[f"{t}embeddings.{name}_embeddings.weight"] for name in ("word", "position"))
    y = norm(words[tokens] + places[: tokens.shape[1]], f"{t}embeddings.LayerNorm", 1e-12)
    for n in range(3):
        layer = f"{t}encoder.layer.{n}."
        for kind, source, keep in (("attention", None, mask[:, None, :].bool()), ("crossattention", seen, None)):
            source = y if source is None else source
            q, k, w = (linear(s, f"{layer}{kind}.self.{name}") for s, name in
                       ((y, "query"), (source, "key"), (source, "value")))  # fmt: skip
            out = linear(F.scaled_dot_product_attention(q, k, w, attn_mask=keep), f"{layer}{kind}.output.dense")
            y = norm(y + out, f"{layer}{kind}.output.LayerNorm", 1e-12)
        out = linear(F.gelu(linear(y, f"{layer}intermediate.dense")), f"{layer}output.dense")
        y = norm(y + out, f"{layer}output.LayerNorm", 1e-12)
    return head_by_hand(state, y[:, 0], "mlp.layers.")


@pytest.fixture(scope="module")
def imagereward(tmp_path_factory):
    from transformers import BertTokenizer

    root = tmp_path_factory.mktemp("imagereward")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters[:10], *(f"##{c}" for c in letters[:20])]
    BertTokenizer(vocab={token: k for k, token in enumerate(vocabulary)}).save_pretrained(root / "bert")
    state = blip_state()
    torch.save(state, root / "ImageReward.pt")
    folder = convert.convert("imagereward", root / "ImageReward.pt", root / "folder", like=str(root / "bert"))
    return SimpleNamespace(folder=folder, state=state, file=root / "ImageReward.pt", bert=root / "bert")


def test_imagereward_from_its_file_is_blip_and_the_head_written_out_by_hand(imagereward):
    from transformers import BertTokenizer, CLIPImageProcessorPil

    prompts = [prompt(text) for text in ("abc", "a bad cab " * 20, "", "cab")]
    images = pictures(4)
    scores = scorers.make("imagereward", model=str(imagereward.folder), batch=3).score(images, prompts, None)
    tokenizer = BertTokenizer.from_pretrained(imagereward.bert)
    padding = {"padding": "max_length", "truncation": True, "max_length": 35}
    tokens = tokenizer([p.text for p in prompts], return_tensors="pt", **padding)
    assert tokens.input_ids[0, 0] == 2 and 0 < tokens.attention_mask.float().mean() < 1
    arrays = list((images * 255).round().byte().permute(0, 2, 3, 1).numpy())
    prepare = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = prepare(arrays, return_tensors="pt")["pixel_values"]
    raw = blip_by_hand(imagereward.state, pixels, tokens.input_ids, tokens.attention_mask)
    assert torch.allclose(scores, (raw - 0.16717362830052426) / 1.0333394966054072, atol=1e-4) and scores.std() > 0.05


def test_imagereward_keeps_its_samples_apart(imagereward):
    scorer, images = scorers.imagereward(model=str(imagereward.folder)), pictures(3)
    prompts = [prompt("abc"), prompt("bad"), prompt("cab")]
    before = scorer.score(images, prompts, None)
    after = scorer.score(torch.cat([images[:1], 1 - images[1:2], images[2:]]), prompts, None)
    assert (before != after).tolist() == [False, True, False]


# ----------------------------------------------------------------------------------------- pickles and broken files
class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_converting_runs_no_code_that_a_pickle_brings_along(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Payload(tmp_path / "was-here")}, protocol=2))
    with pytest.raises(RewardError, match="evil.pt: not a readable file of weights"):
        convert.convert("hps", tmp_path / "evil.pt", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["evil.pt"]
    pickle.loads((tmp_path / "evil.pt").read_bytes())
    assert (tmp_path / "was-here").exists()  # the payload is a real one


@pytest.mark.parametrize("change", ["remove", "add", "shape"])
def test_a_weight_too_many_too_few_or_of_another_shape_is_no_conversion(clip, imagereward, tmp_path, change):
    dense = "blip.text_encoder.encoder.layer.1.output.dense.weight"
    cases = {
        "hps": (open_clip_state(), "visual.transformer.resblocks.1.mlp.c_fc.weight", clip),
        "imagereward": (dict(imagereward.state), dense, imagereward.bert),
        "aesthetic": (head_state(12, "layers."), "layers.4.weight", ""),
    }
    for kind, (state, key, like) in cases.items():
        if change == "remove":
            del state[key]
        elif change == "add":
            state[key.replace("weight", "wait")] = torch.zeros(2)
        else:
            state[key] = torch.zeros(2, 5)
        torch.save(state, tmp_path / "x.pt")
        with pytest.raises(RewardError, match=f"x.pt: not the weights of {kind}, ") as caught:
            convert.convert(kind, tmp_path / "x.pt", tmp_path / "out", like=str(like))
        assert "\n" not in str(caught.value)
        assert os.listdir(tmp_path) == ["x.pt"]


def test_converting_never_overwrites_and_knows_its_kinds(tmp_path):
    with pytest.raises(RewardError, match="exists already; give a new folder"):
        convert.convert("aesthetic", "head.pth", tmp_path)
    with pytest.raises(RewardError, match="nothing to convert for 'hsp'; did you mean 'hps'"):
        convert.convert("hsp", "head.pth", tmp_path / "new")


@pytest.mark.parametrize("kind", ["hps", "imagereward", "aesthetic"])
def test_what_is_published_as_a_pickle_is_asked_for_with_the_way_to_convert_it(kind, tmp_path):
    with pytest.raises(RewardError, match=rf"'{kind}': its weights .*run convert.convert\('{kind}', FILE, FOLDER\)"):
        scorers.make(kind)
    (tmp_path / "model.pt").touch()
    options = {"head" if kind == "aesthetic" else "model": str(tmp_path)}
    with pytest.raises(RewardError, match=r"pickles only \(model.pt\).*convert.convert"):
        scorers.make(kind, **options)


def test_a_checkpoint_that_lacks_weights_is_refused_where_transformers_would_draw_them(clip, tmp_path):
    state = safetensors.torch.load_file(clip / "model.safetensors")
    for file in clip.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RewardError, match="'clipscore': .*no readable CLIPModel") as caught:
        scorers.clipscore(model=str(tmp_path))
    assert "\n" not in str(caught.value)
    del state["visual_projection.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match="has no visual_projection.weight, one of 1 weights that CLIPModel needs"):
        scorers.clipscore(model=str(tmp_path))
    with pytest.raises(ValueError, match="no such file or folder"):
        scorers.clipscore(model="./nowhere")
    (clip / "preprocessor_config.json").rename(tmp_path / "kept.json")
    try:
        with pytest.raises(RewardError, match="no readable CLIPImageProcessorPil"):
            scorers.clipscore(model=str(clip))
    finally:
        (tmp_path / "kept.json").rename(clip / "preprocessor_config.json")


# ------------------------------------------------------------------------------------------------------------ OCR
def test_ocr_scores_what_the_engine_reads_and_leaves_out_lines_it_did_not():
    lines = {10: [("GRAND", 0.9), ("opening", 0.2)], 20: [("GRAND", 0.9), ("opening", 0.0)], 30: []}
    scorer = scorers.ocr(engine=lambda picture: lines[int(picture[0, 0, 0])])
    images = torch.tensor([30, 10, 20])[:, None, None, None].expand(3, 3, 4, 6) / 255
    scores = scorer.score(images, [prompt('a banner "Grand Opening"')] * 3, None)
    # "GRAND" against "grandopening", 12 letters: 7 are missing
    assert scores.tolist() == pytest.approx([0.0, 1.0, 5 / 12])
    with pytest.raises(RewardError, match=r"scorer 'ocr': no target text.*for the prompt 'no words'"):
        scorer.score(images[:2], [prompt('a "b"'), prompt("no words")], None)


def test_ocr_without_its_engine_names_the_extra(monkeypatch):
    monkeypatch.setattr(scorers, "find_spec", lambda name: None)
    with pytest.raises(RewardError, match=r"needs the extra 'ocr': pip install 'minopd\[ocr\]'"):
        scorers.make("ocr", device="cpu")


def best_font(size):
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def sign(*lines, paper=(240, 235, 220), ink=(20, 30, 120)):
    picture = Image.new("RGB", (384, 256), paper)
    for row, line in enumerate(lines):
        ImageDraw.Draw(picture).text((192, 70 + 90 * row), line, ink, best_font(44), anchor="mm")
    return scorers._tensor(picture)


@pytest.mark.skipif(any(find_spec(m) is None for m in ("rapidocr", "onnxruntime", "cv2")), reason="extra ocr")
def test_the_real_engine_reads_rendered_words():
    scorer = scorers.make("ocr")
    images = torch.stack([sign("minOPD 2026"), sign("Grand", "Opening"), sign("Open"), sign()])
    texts = ['a sign "minOPD 2026"', 'a banner "Grand Opening"', 'a door "Closed"', 'a wall "Grand Opening"']
    scores = scorer.score(images, [prompt(text) for text in texts], None).tolist()
    # "open" for "closed", 6 letters: c and l are missing, p should be s, n should be d
    assert scores == pytest.approx([1, 1, 1 - 4 / 6, 0])
    assert scorers.self_test(scorer)


# ----------------------------------------------------------------------------------------------------------- jpeg
def test_jpeg_is_the_rule_of_rewards_on_the_same_bytes():
    images, scorer = pictures(3, 32, 48), scorers.make("jpeg", device="cuda", dtype="bfloat16")
    images[1] = 0.5
    scores = scorer.score(images, PROMPTS[:3], None)
    assert torch.equal(scores, torch.tensor(rewards.score_jpeg(images, PROMPTS[:3]))) and scores[1] > scores[0] + 0.3
    assert scorers.self_test(scorer) is True


# -------------------------------------------------------------------------------------------------------- GenEval
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
    found = scorers.instances(classes, masks, (4, 6), NAMES)
    sigmoid = {x: 1 / (1 + math.exp(-x)) for x in (4.0, 0.5, 2.0)}
    assert found[0]["class"] == "dog" and found[0]["box"] == (2, 1, 5, 3)
    assert {(f["class"], f["box"]) for f in found[1:]} == {("cat", (0, 0, 1, 1)), ("cow", (0, 0, 1, 1))}
    expected = [(sigmoid[4.0] + sigmoid[0.5]) / 2, sigmoid[2.0] / 2, sigmoid[2.0] / 2]
    assert [f["score"] for f in found] == pytest.approx(expected, rel=1e-5)
    assert found[0]["mask"].shape == (4, 6) and found[0]["mask"].sum() == 6


def test_only_as_many_detections_as_queries_and_none_below_the_threshold():
    classes = torch.log(torch.tensor([[0.33, 0.33, 0.33, 0.01], [0.31, 0.29, 0.2, 0.2]]))
    masks = torch.full((2, 4, 6), 40.0)
    assert len(scorers.instances(classes, masks, (4, 6), NAMES)) == 2  # the third 0.33 and the 0.31 come too late
    classes[0] = torch.log(torch.tensor([0.299, 0.299, 0.299, 0.103]))
    assert [f["score"] for f in scorers.instances(classes, masks, (4, 6), NAMES)] == pytest.approx([0.31])
    masks[:] = 1.0  # sigmoid 0.73: 0.31 becomes 0.23
    assert scorers.instances(classes, masks, (4, 6), NAMES) == []


def test_boxes_and_scores_agree_with_transformers_own_post_processing():
    from transformers import Mask2FormerImageProcessorPil

    rng = torch.Generator().manual_seed(0)
    classes = 6 * torch.randn(2, 9, 4, generator=rng)
    masks = F.interpolate(4 * torch.randn(2, 9, 4, 4, generator=rng), (24, 24), mode="bicubic")
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        outputs, threshold=0.3, target_sizes=[(96, 120)] * 2, return_binary_maps=True
    )
    count = 0
    for k in range(2):
        ours = scorers.instances(classes[k], masks[k], (96, 120), NAMES)
        order = sorted(range(len(ours)), key=lambda i: -ours[i]["score"])
        infos, maps = theirs[k]["segments_info"], theirs[k]["segmentation"]
        their_order = sorted(range(len(infos)), key=lambda i: -infos[i]["score"])
        assert len(order) == len(their_order)
        for mine, other in zip(order, their_order, strict=True):
            assert ours[mine]["class"] == NAMES[infos[other]["label_id"]]
            assert ours[mine]["score"] == pytest.approx(infos[other]["score"], abs=1e-2)
            ours_mask, their_mask = torch.from_numpy(ours[mine]["mask"]), maps[other].bool()
            assert (ours_mask ^ their_mask).sum() < 0.05 * their_mask.sum() + 30
            count += 1
    assert count > 8


def test_an_object_is_cut_out_on_grey():
    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    mask = np.zeros((5, 7), bool)
    mask[1, 2] = mask[3, 4] = True
    crop = scorers.isolated(picture, {"box": (2, 1, 5, 4), "mask": mask})
    assert crop.shape == (3, 3, 3)
    assert (crop[0, 0] == picture[1, 2]).all() and (crop[2, 2] == picture[3, 4]).all()
    assert (crop.reshape(9, 3)[1:8] == 0x99).all()


def test_a_sliver_keeps_its_middle_only():
    picture = np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 3, 3))
    crop = scorers.isolated(picture, {"box": (0, 0, 2, 200), "mask": np.ones((200, 3), bool)})
    assert crop.shape == (16, 2, 3) and crop[0, 0, 0] == 92 and crop[-1, 0, 0] == 107
    whole = scorers.isolated(picture, {"box": (0, 0, 3, 24), "mask": np.ones((200, 3), bool)})
    assert whole.shape == (24, 3, 3)


def test_a_checklist_that_nothing_can_tick_is_refused():
    scorers.check_checklist({"include": [{"class": "tv remote", "count": 1, "color": "pink"}]})
    with pytest.raises(RewardError, match="no class 'remote'; did you mean 'tv remote'"):
        cat, remote = {"class": "cat", "count": 1}, {"class": "remote", "count": 2}
        scorers.check_checklist({"include": [cat], "exclude": [remote]})
    with pytest.raises(RewardError, match="no color 'grey'; did you mean 'green'"):
        scorers.check_checklist({"include": [{"class": "cat", "count": 1, "color": "grey"}]})


def test_the_report_by_tag_wants_verdicts():
    prompts = [prompt("", tag=tag) for tag in ("counting", "colors", "counting")]
    assert scorers.tag_report(torch.tensor([1.0, 1.0, 0.0]), prompts) == {"counting": 0.5, "colors": 1.0}
    with pytest.raises(ValueError, match=r"geneval\(strict=True\)"):
        scorers.tag_report([1.0, 0.5, 0.0], prompts)


def test_geneval_without_scipy_names_the_extra(monkeypatch):
    monkeypatch.setattr(scorers, "find_spec", lambda name: None)
    with pytest.raises(RewardError, match=r"needs the extra 'geneval': pip install 'minopd\[geneval\]'"):
        scorers.make("geneval")


needs_scipy = pytest.mark.skipif(find_spec("scipy") is None, reason="extra geneval")


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("sure"), sure_of="sofa")


def couch(count=1, **more):
    return prompt("", tag="colors", include=[{"class": "couch", "count": count, **more}])


@needs_scipy
def test_geneval_counts_what_the_detector_finds_under_genevals_names(clip, sure):
    images, options = pictures(3, 40, 56), {"detector": str(sure), "clip": str(clip), "short_side": 64, "batch": 2}
    network = scorers._detector(str(sure), "cpu", torch.float32, 64)
    with torch.no_grad():
        found = network(scorers._pixels(images))
    assert {each["class"] for row in found for each in row} == {"couch"}
    counts = [len(row) for row in found]
    assert min(counts) >= 1 and all(each["mask"].shape == (40, 56) for row in found for each in row)
    prompts = [couch(count) for count in counts]
    assert scorers.make("geneval", **options).score(images, prompts, None).tolist() == [1, 1, 1]
    more = [couch(count + 1) for count in counts]
    graded = scorers.make("geneval", **options).score(images, more, None)
    assert graded.tolist() == pytest.approx([1 - 1 / (count + 1) for count in counts])
    verdicts = scorers.make("geneval", strict=True, **options).score(images, [more[0], *prompts[1:]], None)
    assert verdicts.tolist() == [0, 1, 1]
    with pytest.raises(RewardError, match="'geneval': GenEval knows no class 'coach'; did you mean 'couch'"):
        bad = prompt("a coach", include=[{"class": "coach", "count": 1}])
        scorers.make("geneval", **options).score(images[:1], [bad], None)
    with pytest.raises(RewardError, match="'geneval': .*non-empty 'include'.*for the prompt 'a cat'"):
        scorers.make("geneval", **options).score(images[:1], PROMPTS[:1], None)


@needs_scipy
def test_a_sample_of_genevals_batch_does_not_touch_its_neighbours(clip, tmp_path):
    detector = save_detector(tmp_path, sure_of="sofa", seed=4)
    network, images = scorers._detector(str(detector), "cpu", torch.float32, 64), pictures(3)
    with torch.no_grad():
        before = network(scorers._pixels(images))
        images[1] = 1 - images[1]
        after = network(scorers._pixels(images))
    told = [[[(f["class"], f["score"], f["box"]) for f in row] for row in rows] for rows in (before, after)]
    assert [a == b for a, b in zip(*told, strict=True)] == [True, False, True]


def test_the_colour_is_the_nearest_of_the_ten_by_clips_logits(clip):
    """Against CLIPModel's features of each crop and text on its own, averaged as GenEval does."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    name_color = scorers._color_classifier(str(clip), "cpu", torch.float32)
    picture, detections = scorers._pixels(pictures(1, 60, 60))[0], []
    for k, name in enumerate(("cat", "couch", "cat", "bus", "tv", "couch")):
        mask = np.zeros((60, 60), bool)
        mask[5 * k : 5 * k + 20, 3 * k : 3 * k + 30] = True
        detections.append({"class": name, "box": (3 * k, 5 * k, 3 * k + 30, 5 * k + 20), "mask": mask})
    with torch.no_grad():
        name_color(picture, detections)
        for found in detections:
            crop = Image.fromarray(scorers.isolated(picture, found))
            image = model.get_image_features(**CLIPImageProcessorPil.from_pretrained(clip)(crop, return_tensors="pt"))
            similar = []
            for color in scorers.COLORS:
                name = found["class"]
                lines = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}",
                         f"a photo of a {color} object"]  # fmt: skip
                unit = [F.normalize(model.get_text_features(**tokenizer(line, truncation=True, max_length=30,
                        return_tensors="pt")).pooler_output, dim=-1) for line in lines]  # fmt: skip
                similar.append(F.cosine_similarity(image.pooler_output, sum(unit)).item())
            assert found["color"] == scorers.COLORS[int(np.argmax(similar))]
    assert len({found["color"] for found in detections}) > 1


@needs_scipy
def test_geneval_asks_for_colours_only_where_the_prompt_does(clip, sure, monkeypatch):
    asked = []
    monkeypatch.setattr(scorers, "_color_classifier", lambda *_: lambda picture, found: [
        (asked.append(each["class"]), each.update(color="pink")) for each in found])  # fmt: skip
    scorer = scorers.make("geneval", detector=str(sure), clip=str(clip), short_side=64)
    plain = scorer.score(pictures(1), [couch()], None)
    assert asked == [] and 0 <= plain[0] <= 1
    count = 6 if plain[0] == 0 else next(n for n in range(1, 7) if scorer.score(pictures(1), [couch(n)], None) == 1)
    pink, blue = (scorer.score(pictures(1), [couch(count, color=c)], None).item() for c in ("pink", "blue"))
    assert (pink, blue) == (1.0, 0.5) and set(asked) == {"couch"}


@needs_scipy
def test_a_detector_of_other_classes_is_refused(tmp_path, clip):
    labels = [name for name in scorers.CLASSES if name != "zebra"] + ["unicorn"]
    folder = save_detector(tmp_path, labels=labels)
    with pytest.raises(RewardError, match="detects no zebra; give a detector of COCO's classes"):
        scorers.make("geneval", detector=str(folder), clip=str(clip))


# ------------------------------------------------------------------------------------------------------ self-test
def rigged(name, *scores):
    return Scorer(name, lambda images, prompts, sources: torch.tensor(scores[: len(prompts)]), -math.inf, math.inf)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("ocr", (1.0, 0.0), (0.0, 0.0)),
        ("ocr", (1.0, 0.0), (1.0, 0.2)),
        ("jpeg", (0.98, 0.2), (0.98, 0.97)),
        ("geneval", (1.0, 0.0, 0.0), (1.0, 0.0125, 0.0)),
        ("geneval", (1.0, 0.0, 0.0), (1.0, 0.0, 1.0)),
        ("pickscore", (0.8, 0.7), (0.7, 0.7)),
        ("clipscore", (0.9, 0.8), (0.8, 0.9)),
        ("hps", (0.3, 0.2), (0.2, 0.3)),
        ("imagereward", (1.0, -1.0), (-1.0, 1.0)),
        ("aesthetic", (5.0,), (40.0,)),
    ],
)
def test_a_blind_scorer_fails_its_self_test_by_name(name, good, bad):
    assert scorers.self_test(rigged(name, *good)) is True
    with pytest.raises(RewardError, match=f"scorer '{name}' failed its self-test: .*but it said {bad[0]:.4g}"):
        scorers.self_test(rigged(name, *bad))


def test_a_scorer_of_another_name_has_no_self_test():
    assert scorers.self_test(rigged("mine", 0.0)) is False
    assert scorers.KNOWN_ANSWERS.keys() == scorers.FACTORIES.keys()


def test_the_pictures_of_the_self_test_are_pictures_and_reach_the_scorer():
    for known in scorers.KNOWN_ANSWERS.values():
        images, prompts, _, _ = known()
        assert len(images) == len(prompts) and len(scorers._pixels(torch.stack(images))) == len(images)
    red, words = scorers.KNOWN_ANSWERS["hps"]()[0][0], scorers.KNOWN_ANSWERS["ocr"]()[0]
    assert red[:, 9, 9].tolist() == [1, 0, 0] and words[0].std() > 0.1 > words[1].std() == 0


@needs_scipy
def test_geneval_survives_a_drawn_picture_and_sees_nothing_on_a_blank_one(clip, sure, tmp_path):
    options = {"clip": str(clip), "short_side": 64}
    assert scorers.self_test(scorers.make("geneval", detector=str(save_detector(tmp_path)), **options)) is True
    with pytest.raises(RewardError, match="blank picture must show no object"):
        scorers.self_test(scorers.make("geneval", detector=str(sure), **options))
