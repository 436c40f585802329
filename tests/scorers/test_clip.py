"""Do the scorers of CLIP's kin hand the right pixels to the right network, and its numbers on as they should?

The networks are tiny and random. What they should say is computed by other routes: transformers' own forward, and for
the published pickles open_clip's and BLIP's architectures built from torch's modules, whose names are their files'.
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
from torch import nn

from rewards import RewardError
from scorers import clip as clip_module
from scorers import convert
from scorers.clip import aesthetic, clipscore, hps, imagereward, pickscore
from scorers.common import batched
from tests.helpers.checks import refusal
from tests.helpers.clip import HEADS, PROMPTS, SIDE, TEXTS, pictures, prompt, save_clip
from tests.helpers.sd3 import _clip_vocabulary, _randomise


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


# ------------------------------------------------------------------------------------------- a batch, part by part
def test_a_batch_is_looked_at_in_parts_and_its_order_is_kept():
    sizes = []

    def judge(pixels, prompts):
        sizes.append(len(pixels))
        return [p.mean() / 255 + len(q.text) for p, q in zip(pixels, prompts, strict=True)]

    images, prompts = pictures(7), [prompt("x" * n) for n in (3, 1, 4, 1, 5, 9, 2)]
    scores = batched("mean", judge, 0, 99, batch=3).score(images, prompts, None)
    assert sizes == [3, 3, 1] and scores.dtype == torch.float32 and scores.shape == (7,)
    expected = [image.mean().item() + len(p.text) for image, p in zip(images, prompts, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=2e-3)


def fails(pixels, prompts):
    raise RuntimeError("CUDA out of memory\nTried to allocate")


FAILURES = [
    *((lambda *_: [1, 1], images, "images") for images in (
        torch.full((2, 3, 4, 4), math.nan), pictures(2) * 255, pictures(2) * 2 - 1, pictures(2)[:, :1], pictures(3))),
    (fails, pictures(2), "CUDA out of memory, for the prompt 'a cat' or one of the 1 after it"),
    (lambda *_: [0.5, math.nan], pictures(2), "nan is not finite, for the prompt 'two dogs and a cat'"),
    (lambda *_: [[0.1], [0.2]], pictures(2), "2 prompts but scores of shape"),  # a (B, 1) would broadcast later
]  # fmt: skip


@pytest.mark.parametrize(("rate", "images", "named"), FAILURES, ids=[named[:20] for _, _, named in FAILURES])
def test_whatever_fails_is_one_line_with_scorer_prompt_and_cause(rate, images, named):
    said = refusal(batched("odd", rate, 0, 1, 4).score, images, PROMPTS[:2], None, error=RewardError)
    assert said.startswith("scorer 'odd': ") and named in said


# --------------------------------------------------------------------------------------------------- CLIP and kin
def prepared(processor, images):
    return processor(list((images * 255).round().byte().permute(0, 2, 3, 1).numpy()), return_tensors="pt")[
        "pixel_values"
    ]


def own_logits(folder, images, texts):
    """exp(logit_scale) cos by CLIPModel's forward, each pair on its own."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    prepare, logits = CLIPImageProcessorPil.from_pretrained(folder), []
    for pixels, text in zip(prepared(prepare, images), texts, strict=True):
        tokens = tokenizer(text, truncation=True, max_length=30, return_tensors="pt")  # unpadded: another route
        with torch.no_grad():
            logits.append(model(pixel_values=pixels[None], **tokens).logits_per_image.item())
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


# ---------------------------------------------------------------------------------------------- published pickles
def module(**children):
    """A torch module with these children and parameters, and no forward of its own."""
    made = nn.Module()
    for name, child in children.items():
        setattr(made, name, child)
    return made


def head(width):
    """The published linear head: its layers are numbered with the dropouts between them."""
    torch.manual_seed(3)
    drop = nn.Dropout(0.2)
    made = nn.Sequential(nn.Linear(width, 1024), drop, nn.Linear(1024, 128), drop, nn.Linear(128, 64), drop,
                         nn.Linear(64, 16), nn.Linear(16, 1))  # fmt: skip
    _randomise(made)
    return made


def test_aesthetic_is_the_published_linear_head_on_unit_image_features(clip, tmp_path):
    from transformers import CLIPImageProcessorPil, CLIPModel

    rate, images = head(12), pictures(3)
    torch.save(module(layers=rate).state_dict(), tmp_path / "head.pth")
    folder = convert.convert("aesthetic", tmp_path / "head.pth", tmp_path / "head")
    scores = aesthetic(model=str(clip), head=str(folder), batch=2).score(images, PROMPTS[:3], None)
    pixels = prepared(CLIPImageProcessorPil.from_pretrained(clip), images)
    with torch.no_grad():
        features = CLIPModel.from_pretrained(clip).eval().get_image_features(pixels).pooler_output
        expected = rate(F.normalize(features, dim=1))[:, 0]
    assert torch.allclose(scores, expected, atol=1e-4) and scores.std() > 0.02
    safetensors.torch.save_file(head(13).state_dict(), folder / "head.safetensors")
    with pytest.raises(RewardError, match="no head for 12 features"):
        aesthetic(model=str(clip), head=str(folder))


# torch's names of what stands in a block, and those of the published files
OPEN_CLIP = (("self_attn", "attn"), ("norm", "ln_"), ("linear1", "mlp.c_fc"), ("linear2", "mlp.c_proj"))
BLIP = (("self_attn.in_proj_", "attn.qkv."), ("self_attn.out_proj", "attn.proj"), ("linear", "mlp.fc"))


def blocks(count, width, inner, eps=1e-5):
    """Transformer blocks that normalise first, as both have them."""
    options = {"batch_first": True, "norm_first": True}
    return nn.ModuleList(
        nn.TransformerEncoderLayer(width, HEADS, inner, 0, F.gelu, eps, **options) for _ in range(count)
    )


def published(model, inside, names):
    """The weights of a model under the names of its file."""
    state = {}
    for key, value in model.state_dict().items():
        for old, new in names if inside in key else ():
            key = key.replace(old, new)
        state[key] = value
    return state


def open_clip():
    """The tiny CLIP of `save_clip` in open_clip's architecture and names."""
    empty = {name: nn.Parameter(torch.zeros(shape)) for name, shape in (("proj", (32, 12)), ("place", (10, 32)))}
    visual = module(conv1=nn.Conv2d(3, 32, 8, 8, bias=False), class_embedding=nn.Parameter(torch.zeros(32)),
                    positional_embedding=empty["place"], proj=empty["proj"], ln_pre=nn.LayerNorm(32),
                    ln_post=nn.LayerNorm(32), transformer=module(resblocks=blocks(3, 32, 36)))  # fmt: skip
    model = module(visual=visual, token_embedding=nn.Embedding(len(_clip_vocabulary()), 20), ln_final=nn.LayerNorm(20),
                   positional_embedding=nn.Parameter(torch.zeros(30, 20)), transformer=module(resblocks=blocks(2, 20,
                   28)),
                   text_projection=nn.Parameter(torch.zeros(20, 12)))  # fmt: skip
    torch.manual_seed(1)
    _randomise(model)
    model.logit_scale = nn.Parameter(torch.tensor(2.0))
    return model


@torch.no_grad()
def open_clip_cosine(model, pixels, tokens):
    see, length = model.visual, tokens.shape[1]
    x = see.conv1(pixels).flatten(2).mT
    x = see.ln_pre(torch.cat([see.class_embedding.expand(len(x), 1, -1), x], 1) + see.positional_embedding)
    for block in see.transformer.resblocks:
        x = block(x)
    y = model.token_embedding(tokens) + model.positional_embedding[:length]
    for block in model.transformer.resblocks:
        y = block(y, torch.full((length, length), -math.inf).triu(1))
    end = model.ln_final(y)[torch.arange(len(y)), tokens.argmax(1)]  # the end token is the largest
    return F.cosine_similarity(see.ln_post(x[:, 0]) @ see.proj, end @ model.text_projection)


def test_hps_from_an_open_clip_file_is_open_clips_cosine(clip, tmp_path):
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    model, images = open_clip(), pictures(4)
    torch.save({"epoch": 3, "state_dict": published(model, "resblocks", OPEN_CLIP)}, tmp_path / "HPS.pt")
    folder = convert.convert("hps", tmp_path / "HPS.pt", tmp_path / "hps", like=str(clip))
    scores = hps(model=str(folder)).score(images, PROMPTS, None)
    pixels = prepared(CLIPImageProcessorPil.from_pretrained(clip), images)
    tokens = CLIPTokenizer.from_pretrained(clip)(TEXTS, padding="max_length", max_length=30, return_tensors="pt")
    expected = open_clip_cosine(model, pixels, tokens.input_ids)
    assert torch.allclose(scores, expected, atol=1e-5) and scores.std() > 0.01


def image_reward():
    """A tiny ImageReward in its file's names: BLIP's text half is BERT (64 wide, 1 head) with cross-attention."""
    from transformers import BertConfig, BertModel

    places = {name: nn.Parameter(torch.zeros(1, n, 128)) for name, n in (("cls_token", 1), ("pos_embed", 10))}
    eye = module(**places, patch_embed=module(proj=nn.Conv2d(3, 128, 8, 8)), norm=nn.LayerNorm(128, 1e-6),
                 blocks=blocks(2, 128, 100, 1e-6))  # fmt: skip
    config = BertConfig(vocab_size=40, hidden_size=64, intermediate_size=72, num_hidden_layers=3, num_attention_heads=1,
                        max_position_embeddings=50, is_decoder=True, add_cross_attention=True)  # fmt: skip
    text = BertModel(config, add_pooling_layer=False)
    text.config.is_decoder = False  # every word sees every other one
    for layer in text.encoder.layer:
        layer.attention.self.is_causal = False
        for name in ("key", "value"):  # the picture is wider than the text
            setattr(layer.crossattention.self, name, nn.Linear(128, 64))
    del text.embeddings.token_type_embeddings  # BLIP has none
    contrast = {"vision_proj": nn.Linear(128, 7), "text_proj": nn.Linear(64, 7)}  # these rate nothing
    model = module(blip=module(visual_encoder=eye, text_encoder=text, **contrast), mlp=module(layers=head(64)))
    torch.manual_seed(2)
    _randomise(model)
    text.embeddings.token_type_embeddings = lambda types: 0.0
    return model


@torch.no_grad()
def blip_rating(model, pixels, tokens):
    """ImageReward's rating before it is standardised."""
    see = model.blip.visual_encoder
    x = see.patch_embed.proj(pixels).flatten(2).mT
    x = torch.cat([see.cls_token.expand(len(x), -1, -1), x], 1) + see.pos_embed
    for block in see.blocks:
        x = block(x)
    read = model.blip.text_encoder(**tokens, encoder_hidden_states=see.norm(x)).last_hidden_state
    return model.mlp.layers(read[:, 0])[:, 0]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    from transformers import BertTokenizer

    root, model = tmp_path_factory.mktemp("imagereward"), image_reward()
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters[:10], *(f"##{c}" for c in letters[:20])]
    BertTokenizer(vocab={token: k for k, token in enumerate(vocabulary)}).save_pretrained(root / "bert")
    state = {
        **published(model, "visual_encoder", BLIP),
        "blip.text_encoder.embeddings.position_ids": torch.arange(50)[None],
    }
    torch.save(state, root / "ImageReward.pt")
    folder = convert.convert("imagereward", root / "ImageReward.pt", root / "folder", like=str(root / "bert"))
    return SimpleNamespace(folder=folder, model=model, state=state, bert=root / "bert")


def test_imagereward_from_its_file_is_blip_and_its_head(blip):
    from transformers import BertTokenizer, CLIPImageProcessorPil

    prompts, images = [prompt(text) for text in ("abc", "a bad cab " * 20, "", "cab")], pictures(4)
    scores = imagereward(model=str(blip.folder), batch=3).score(images, prompts, None)
    padding = {"padding": "max_length", "truncation": True, "max_length": 35, "return_token_type_ids": False}
    tokens = BertTokenizer.from_pretrained(blip.bert)([p.text for p in prompts], return_tensors="pt", **padding)
    assert tokens.input_ids[0, 0] == 2 and 0 < tokens.attention_mask.float().mean() < 1
    prepare = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    raw = blip_rating(blip.model, prepared(prepare, images), tokens)
    assert torch.allclose(scores, (raw - 0.16717362830052426) / 1.0333394966054072, atol=1e-4) and scores.std() > 0.05


# ----------------------------------------------------------------------------------------- pickles and broken files
class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_converting_runs_no_code_that_a_pickle_brings_along(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Payload(tmp_path / "was-here")}, protocol=2))
    with pytest.raises(RewardError, match="evil.pt: "):
        convert.convert("hps", tmp_path / "evil.pt", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["evil.pt"]
    pickle.loads((tmp_path / "evil.pt").read_bytes())
    assert (tmp_path / "was-here").exists()  # the payload is a real one


@pytest.mark.parametrize("change", ["remove", "add", "shape"])
def test_a_weight_too_many_too_few_or_of_another_shape_is_no_conversion(clip, blip, tmp_path, change):
    dense = "blip.text_encoder.encoder.layer.1.output.dense.weight"
    cases = {
        "hps": (published(open_clip(), "resblocks", OPEN_CLIP), "visual.transformer.resblocks.1.mlp.c_fc.weight", clip),
        "imagereward": (dict(blip.state), dense, blip.bert),
        "aesthetic": (module(layers=head(12)).state_dict(), "layers.4.weight", ""),
    }
    for kind, (state, key, like) in cases.items():
        if change == "remove":
            del state[key]
        else:
            state[key if change == "shape" else key.replace("weight", "wait")] = torch.zeros(2, 5)
        torch.save(state, tmp_path / "x.pt")
        message = refusal(convert.convert, kind, tmp_path / "x.pt", tmp_path / "out", str(like), error=RewardError)
        assert f"x.pt: not the weights of {kind}, " in message and os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("kind", ["hps", "imagereward", "aesthetic"])
def test_what_is_published_as_a_pickle_is_asked_for_with_the_way_to_convert_it(kind, tmp_path):
    (tmp_path / "model.pt").touch()
    for options in ({}, {"head" if kind == "aesthetic" else "model": str(tmp_path)}):
        with pytest.raises(RewardError, match=f"'{kind}': .*convert"):
            getattr(clip_module, kind)(**options)


def test_a_checkpoint_that_lacks_weights_is_refused_where_transformers_would_draw_them(clip, tmp_path):
    state = safetensors.torch.load_file(clip / "model.safetensors")
    for file in clip.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "'clipscore'" in refusal(clipscore, model=str(tmp_path), error=RewardError)
    del state["visual_projection.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert "visual_projection.weight" in refusal(clipscore, model=str(tmp_path), error=RewardError)
