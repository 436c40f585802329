"""Do the scorers of CLIP's kin hand the right pixels to the right network, and its numbers on as they should?

The networks are tiny and random, saved in the layouts of the public ones; what they should say is computed by other
routes: transformers' own forward, the published models written out by hand in the names of their files, closed forms.
"""

import math
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

from rewards import RewardError
from scorers import clip as clip_module
from scorers import convert
from scorers.clip import aesthetic, clipscore, hps, imagereward, pickscore
from scorers.common import batched
from tests.helpers.clip import HEADS, PROMPTS, SIDE, TEXTS, pictures, prompt, save_clip
from tests.helpers.sd3 import _clip_vocabulary


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


# ------------------------------------------------------------------------------------------- a batch, part by part
def mean_of(pixels, prompts):
    return [p.mean() / 255 + len(q.text) for p, q in zip(pixels, prompts, strict=True)]


def test_a_batch_is_looked_at_in_parts_and_its_order_is_kept():
    sizes = []

    def judge(pixels, prompts):
        sizes.append(len(pixels))
        return mean_of(pixels, prompts)

    images, prompts = pictures(7), [prompt("x" * n) for n in (3, 1, 4, 1, 5, 9, 2)]
    scores = batched("mean", judge, 0, 99, batch=3).score(images, prompts, None)
    assert sizes == [3, 3, 1] and scores.dtype == torch.float32 and scores.shape == (7,)
    expected = [image.mean().item() + len(p.text) for image, p in zip(images, prompts, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=2e-3)


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
        batched("mean", mean_of, 0, 99, 4).score(images, PROMPTS[:2], None)


def test_whatever_fails_in_a_model_is_one_line_with_scorer_prompt_and_cause():
    def judge(pixels, prompts):
        if prompts[0].text == "two dogs and a cat":
            raise RuntimeError("CUDA out of memory\nTried to allocate")
        return [math.nan if p.text == "" else 0.5 for p in prompts]

    scorer = batched("odd", judge, 0, 1, batch=1)
    with pytest.raises(RewardError, match="^scorer 'odd': CUDA out of memory, for the prompt 'two dogs and a cat'$"):
        scorer.score(pictures(2), PROMPTS[:2], None)
    with pytest.raises(RewardError, match="'odd': nan is not finite, for the prompt ''"):
        scorer.score(pictures(1), PROMPTS[2:3], None)
    with pytest.raises(RewardError, match="'odd': 3 images for 2 prompts"):
        scorer.score(pictures(3), PROMPTS[:2], None)
    with pytest.raises(RewardError, match="batch is 0; it must be 1 at least"):
        batched("odd", judge, 0, 1, batch=0)
    with pytest.raises(RewardError, match="2 prompts but scores of shape"):  # a (B, 1) would broadcast later
        batched("odd", lambda pixels, _: [[0.1], [0.2]], 0, 1, 4).score(pictures(2), PROMPTS[:2], None)


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
    made = {"clipscore": clipscore(model=str(clip), batch=3), "hps": hps(model=str(clip), batch=3),
            "pickscore": pickscore(model=str(clip), processor=str(clip), batch=3)}  # fmt: skip
    factors = {"pickscore": 1 / 26, "clipscore": 100 / 30 / 37, "hps": 1 / 37}
    assert logits.std() > 1
    for kind, scorer in made.items():
        assert torch.allclose(scorer.score(images, prompts, None), logits * factors[kind], atol=2e-5), kind
        assert scorer.high == pytest.approx(37 * factors[kind]) and scorer.low == -scorer.high


def test_a_sample_of_the_batch_does_not_touch_its_neighbours(clip):
    scorer, images = clipscore(model=str(clip)), pictures(4)
    before = scorer.score(images, PROMPTS, None)
    images[1], prompts = 1 - images[1], [*PROMPTS[:2], prompt("a longer text than the others have"), PROMPTS[3]]
    after = scorer.score(images, prompts, None)
    assert (before != after).tolist() == [False, True, True, False]
    order = [2, 0, 3, 1]
    shuffled = scorer.score(images[order], [prompts[k] for k in order], None)
    assert torch.allclose(shuffled, after[order], atol=1e-5) and shuffled.std() > 1e-3


def test_clip_crops_a_wide_picture_and_hps_does_not(clip):
    wide = pictures(2, 40, 80)
    wide[1] = wide[0]
    wide[1, :, :, :8] = 0  # the left edge, beyond the square in the middle
    prompts = [PROMPTS[0]] * 2
    cropped = clipscore(model=str(clip)).score(wide, prompts, None)
    padded = hps(model=str(clip)).score(wide, prompts, None)
    assert cropped[0] == cropped[1] and padded[0] != padded[1]
    square = F.pad(wide, (0, 0, 20, 20))
    assert torch.equal(padded, hps(model=str(clip)).score(square, prompts, None))


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
    scores = aesthetic(model=str(clip), head=str(folder), batch=2).score(images, PROMPTS[:3], None)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(images, return_tensors="pt", do_rescale=False)
    with torch.no_grad():
        features = CLIPModel.from_pretrained(clip).eval().get_image_features(**pixels).pooler_output
    expected = head_by_hand(state, features / features.norm(dim=1, keepdim=True), "layers.")
    assert torch.allclose(scores, expected, atol=1e-2) and scores.std() > 0.02  # 8 bits on one side only
    with pytest.raises(RewardError, match="no head for 12 features .*convert.convert"):
        safetensors.torch.save_file(head_state(13), folder / "head.safetensors")
        aesthetic(model=str(clip), head=str(folder))


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
    scores = hps(model=str(folder)).score(images, PROMPTS, None)
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
def blip(tmp_path_factory):
    from transformers import BertTokenizer

    root = tmp_path_factory.mktemp("imagereward")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters[:10], *(f"##{c}" for c in letters[:20])]
    BertTokenizer(vocab={token: k for k, token in enumerate(vocabulary)}).save_pretrained(root / "bert")
    state = blip_state()
    torch.save(state, root / "ImageReward.pt")
    folder = convert.convert("imagereward", root / "ImageReward.pt", root / "folder", like=str(root / "bert"))
    return SimpleNamespace(folder=folder, state=state, file=root / "ImageReward.pt", bert=root / "bert")


def test_imagereward_from_its_file_is_blip_and_the_head_written_out_by_hand(blip):
    from transformers import BertTokenizer, CLIPImageProcessorPil

    prompts = [prompt(text) for text in ("abc", "a bad cab " * 20, "", "cab")]
    images = pictures(4)
    scores = imagereward(model=str(blip.folder), batch=3).score(images, prompts, None)
    tokenizer = BertTokenizer.from_pretrained(blip.bert)
    padding = {"padding": "max_length", "truncation": True, "max_length": 35}
    tokens = tokenizer([p.text for p in prompts], return_tensors="pt", **padding)
    assert tokens.input_ids[0, 0] == 2 and 0 < tokens.attention_mask.float().mean() < 1
    arrays = list((images * 255).round().byte().permute(0, 2, 3, 1).numpy())
    prepare = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = prepare(arrays, return_tensors="pt")["pixel_values"]
    raw = blip_by_hand(blip.state, pixels, tokens.input_ids, tokens.attention_mask)
    assert torch.allclose(scores, (raw - 0.16717362830052426) / 1.0333394966054072, atol=1e-4) and scores.std() > 0.05


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
def test_a_weight_too_many_too_few_or_of_another_shape_is_no_conversion(clip, blip, tmp_path, change):
    dense = "blip.text_encoder.encoder.layer.1.output.dense.weight"
    cases = {
        "hps": (open_clip_state(), "visual.transformer.resblocks.1.mlp.c_fc.weight", clip),
        "imagereward": (dict(blip.state), dense, blip.bert),
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


@pytest.mark.parametrize("kind", ["hps", "imagereward", "aesthetic"])
def test_what_is_published_as_a_pickle_is_asked_for_with_the_way_to_convert_it(kind, tmp_path):
    factory = getattr(clip_module, kind)
    with pytest.raises(RewardError, match=f"'{kind}': .*convert"):
        factory()
    (tmp_path / "model.pt").touch()
    options = {"head" if kind == "aesthetic" else "model": str(tmp_path)}
    with pytest.raises(RewardError, match=r"model.pt.*convert"):
        factory(**options)


def test_a_checkpoint_that_lacks_weights_is_refused_where_transformers_would_draw_them(clip, tmp_path):
    state = safetensors.torch.load_file(clip / "model.safetensors")
    for file in clip.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RewardError, match="'clipscore'") as caught:
        clipscore(model=str(tmp_path))
    assert "\n" not in str(caught.value)
    del state["visual_projection.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match="visual_projection.weight"):
        clipscore(model=str(tmp_path))
    with pytest.raises(ValueError, match="nowhere"):
        clipscore(model="./nowhere")
