"""Oracles for adapters: stock diffusers and stock PEFT draw what we draw, and what they would misread is refused."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from diffusers import (
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors import safe_open

from models import hub
from models import lora as adapters
from models.hub import ADAPTER_FILES, LORA_FILE, PEFT_FILES, ModelError
from tests.helpers import sd3
from tests.helpers.checks import edit_json, gap, parity, refusal
from tests.helpers.runs import same

ROOT = Path(__file__).resolve().parents[2]
RANK, ALPHA = 4, 12.0  # alpha / rank = 3: an adapter that loses its alpha is seen
PIPELINE = "StableDiffusion3Pipeline"


@pytest.fixture(scope="module")
def base(folders):
    return folders["sd35"]


def transformer(base):
    return SD3Transformer2DModel.from_pretrained(base / "transformer")


@pytest.fixture(scope="module")
def lora(base):
    return sd3.random_lora(transformer(base), RANK, ALPHA, seed=1)


@pytest.fixture
def saved(base, lora, tmp_path):
    """A folder with the adapter in both layouts."""
    adapters.save_adapter(tmp_path / "lora", *lora, source=str(base), fingerprint="abc", pipeline=PIPELINE)
    return tmp_path / "lora"


@torch.no_grad()
def velocity(module):
    """v of three fixed latents and texts at three times."""
    rng = torch.Generator().manual_seed(0)
    return module(
        hidden_states=torch.randn(3, 16, 8, 8, generator=rng),
        encoder_hidden_states=torch.randn(3, 5, sd3.T5_WIDTH, generator=rng),
        pooled_projections=torch.randn(3, sum(sd3.CLIP_POOLED), generator=rng),
        timestep=torch.tensor([900.0, 500.0, 100.0]),
    ).sample


def attached(base, state, config):
    """The base with an adapter put on by PEFT's own functions, no file in between."""
    module = transformer(base)
    module.add_adapter(config)
    assert not peft.set_peft_model_state_dict(module, dict(state)).unexpected_keys
    return module


def modules(base):
    return dict(transformer(base).named_modules())


def read(folder, base, source="the model", fingerprint=""):
    return adapters.read_adapter(folder, modules(base), source, fingerprint)


def only(folder, *names):
    """Leave these files in a folder and no others."""
    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()
    return folder


# ------------------------------------------------------------------------------------------- the tiny SD3.5
def test_the_targets_leave_the_second_attention_of_sd35_alone(base, lora):
    wide = [target.removeprefix("attn.") for target in adapters.TARGETS]  # planted: bare names take attn2 as well
    found = []
    for config in (lora[1], adapters.lora_config(RANK, ALPHA, wide)):
        module = transformer(base)
        module.add_adapter(config)  # PEFT's own matching of the targets
        names = dict(module.named_modules())
        found.append({name.removesuffix(".lora_A.default") for name in names if "lora_A.d" in name})
    assert found[0] == {key.rpartition(".lora_")[0] for key in lora[0]}
    assert found[1] - found[0] and all("attn2" in name for name in found[1] - found[0])


# ------------------------------------------------------------------------------- what we write, others read
def test_stock_diffusers_has_the_same_velocity_and_without_our_metadata_another(base, lora, saved):
    expected = velocity(attached(base, *lora))
    StableDiffusion3Pipeline.save_lora_weights(saved / "bare", transformer_lora_layers=dict(lora[0]))  # planted
    gaps = []
    for folder in (saved, saved / "bare"):
        pipe = StableDiffusion3Pipeline.from_pretrained(base)
        pipe.load_lora_weights(folder)
        gaps.append(gap(velocity(pipe.transformer), expected))
    assert gaps[0] == 0.0 and gaps[1] > 1e-2


def test_stock_peft_has_the_same_velocity(base, lora, saved):
    expected = velocity(attached(base, *lora))
    stock = peft.PeftModel.from_pretrained(transformer(base), saved)
    assert gap(velocity(stock), expected) == 0.0
    edit_json(saved / PEFT_FILES[0], lora_alpha=RANK)  # planted: the scale is lost
    assert gap(velocity(peft.PeftModel.from_pretrained(transformer(base), saved)), expected) > 1e-2


@pytest.mark.parametrize("names", [PEFT_FILES, (LORA_FILE,)], ids=["peft", "diffusers"])
def test_either_layout_reads_back_bitwise_with_its_scale_and_its_targets(base, lora, saved, names):
    state, config = read(only(saved, *names), base)
    assert same(state, lora[0])
    assert (config.r, config.lora_alpha, config.target_modules) == (RANK, ALPHA, set(adapters.TARGETS))


def test_the_config_file_is_the_same_every_time_and_the_config_itself_is_left_alone(lora, tmp_path):
    state, config = lora
    before = config.to_dict()
    for name in ("one", "two"):
        adapters.save_adapter(tmp_path / name, state, config, "owner/base@v1", "abc", PIPELINE)
    assert config.to_dict() == before
    one, two = ((tmp_path / name / PEFT_FILES[0]).read_bytes() for name in ("one", "two"))
    assert one == two
    written = json.loads((tmp_path / "one" / PEFT_FILES[0]).read_text())
    assert written["target_modules"] == sorted(adapters.TARGETS), "not in the order of a set"
    assert (written["base_model_name_or_path"], written["revision"]) == ("owner/base", "v1")
    with safe_open(tmp_path / "one" / PEFT_FILES[1], "pt") as file:
        assert file.metadata() == {"format": "pt", "base": "abc"}


@pytest.mark.parametrize("name", ["", "DDPMPipeline", "NoSuchPipeline"])
def test_without_a_pipeline_that_has_loras_only_pefts_layout_is_written(lora, tmp_path, name):
    adapters.save_adapter(tmp_path, *lora, pipeline=name)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(PEFT_FILES)


# ------------------------------------------------------------------------------- what others write, we read
STOCK_CONFIGS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "some modules": {"target_modules": ["attn.to_q", "attn2.to_k"]},
    "a pattern": {"target_modules": r".*blocks\.1\.attn\.(to_q|add_v_proj)"},
    "one block": {"layers_to_transform": [1], "layers_pattern": "transformer_blocks", "lora_dropout": 0.5},
    "ranks and alphas": {"rank_pattern": {"attn.to_k": 2}, "alpha_pattern": {"transformer_blocks.1.attn.to_q": 5.0}},
    "without one": {"exclude_modules": ["transformer_blocks.2.attn.to_q"]},
}


def stock_lora(base, seed=2, **changes):
    """A PeftModel with random factors, made by PEFT alone."""
    given = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(adapters.TARGETS), **changes}
    model = peft.get_peft_model(transformer(base), peft.LoraConfig(**given)).eval()
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=rng)
    return model


@pytest.mark.parametrize("name", STOCK_CONFIGS)
def test_an_adapter_saved_by_stock_peft_is_read_as_stock_peft_reads_it(base, tmp_path, name):
    model = stock_lora(base, **STOCK_CONFIGS[name])
    model.save_pretrained(tmp_path)
    state, config = read(tmp_path, base)
    ours = velocity(attached(base, state, config))
    # alpha * sqrt(r) / r and alpha / sqrt(r) may differ in the last bit, and so may a B that takes up another scale.
    assert gap(ours, velocity(model)) <= (1e-5 if name in ("rank-stabilised", "ranks and alphas") else 0.0)
    assert gap(ours, velocity(transformer(base))) > 1e-2
    module = attached(base, state, config)
    assert module.peft_config["default"].target_modules == config.target_modules
    assert set(state) == set(peft.get_peft_model_state_dict(module))


@pytest.mark.parametrize("told", [True, False], ids=["with metadata", "without"])
def test_a_lora_saved_by_stock_diffusers_is_read_as_stock_diffusers_reads_it(base, lora, tmp_path, capsys, told):
    adapters._warn_once.cache_clear()
    module = attached(base, *lora)
    layers = peft.get_peft_model_state_dict(module)
    metadata = {"transformer_lora_adapter_metadata": module.peft_config["default"].to_dict()} if told else {}
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, **metadata)
    pipe = StableDiffusion3Pipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path)
    expected = velocity(pipe.transformer)
    capsys.readouterr()
    state, config = read(tmp_path, base)
    assert gap(velocity(attached(base, state, config)), expected) == 0.0
    assert config.lora_alpha == (ALPHA if told else RANK)
    read(tmp_path, base)
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == (0 if told else 1), "said once, and only where alpha is assumed"
    assert all(str(tmp_path / LORA_FILE) in line and "alpha" in line for line in warned)


# {format: (key of a module's factor, are there .alpha entries, is there metadata, who reads it in stock diffusers)}
BOTH, QWEN = ("sd35", "plus"), ("plus",)
SPELT = {
    "diffusers": ("transformer.{name}.{factor}.weight", False, False, BOTH),
    "diffusers with metadata": ("transformer.{name}.{factor}.weight", False, True, BOTH),
    "with text encoders": ("transformer.{name}.{factor}.weight", False, True, BOTH),
    "without a prefix": ("{name}.{factor}.default.weight", True, False, QWEN),
    "another prefix": ("diffusion_model.{name}.{factor}.weight", True, False, QWEN),
    "PEFT's keys in one file": ("base_model.model.{name}.{factor}.weight", True, False, ()),
    "kohya": ("lora_unet_{flat}.{kohya}.weight", True, False, QWEN),
    "older diffusers": ("transformer.{name}.{older}.weight", False, False, ("sd35",)),
}  # fmt: skip
WORDS = {"lora_A": {"kohya": "lora_down", "older": "lora.down"}, "lora_B": {"kohya": "lora_up", "older": "lora.up"}}
STOCK = {"sd35": StableDiffusion3Pipeline, "plus": QwenImageEditPlusPipeline}
TRANSFORMER = {"sd35": SD3Transformer2DModel, "plus": QwenImageTransformer2DModel}


def mixed(module):
    """Random factors of two ranks and two alphas: ({MODULE: (A, B, alpha)}, a config that tells them)."""
    state, config = sd3.random_lora(module, RANK, ALPHA, seed=3)
    found = {}
    for name in sorted({key.rpartition(".lora_")[0] for key in state}):
        rank, alpha = (RANK - 1 if "to_k" in name else RANK), (5.0 if "blocks.1.attn.to_q" in name else ALPHA)
        found[name] = state[f"{name}.lora_A.weight"][:rank], state[f"{name}.lora_B.weight"][:, :rank], alpha
    config.rank_pattern, config.alpha_pattern = {"attn.to_k": RANK - 1}, {"transformer_blocks.1.attn.to_q": 5.0}
    return found, config


def write(file, factors, config, spelling):
    """A LoRA file as a trainer writes it."""
    pattern, entries, metadata, _ = SPELT[spelling]
    tensors, prefix = {}, pattern.partition("{name}")[0].partition("{kohya}")[0]
    for name, (a, b, alpha) in factors.items():
        flat = name.replace(".", "_")
        for factor, value in (("lora_A", a), ("lora_B", b)):
            key = pattern.format(name=name, flat=flat, factor=factor, **WORDS[factor])
            tensors[key] = value.contiguous()
        if entries:
            tensors[f"lora_unet_{flat}.alpha" if spelling == "kohya" else f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    if spelling == "with text encoders":
        tensors["text_encoder.q_proj.lora_A.weight"] = tensors["text_encoder.q_proj.lora_B.weight"] = torch.ones(4, 4)
    told = {f"transformer.{key}": value for key, value in config.to_dict().items()}
    about = {"lora_adapter_metadata": json.dumps(told, default=sorted)} if metadata else None
    file.parent.mkdir()
    safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()}, file, metadata=about)


@torch.no_grad()
def output(module):
    """What a transformer of SD3.5 or Qwen-Image makes of fixed inputs."""
    if isinstance(module, SD3Transformer2DModel):
        return velocity(module)
    rng, width = torch.Generator().manual_seed(0), module.config.joint_attention_dim
    x, texts = torch.randn(2, 16, 64, generator=rng), torch.randn(2, 5, width, generator=rng)
    given = {"hidden_states": x, "encoder_hidden_states": texts, "timestep": torch.tensor([0.9, 0.3])}
    mask = torch.ones(2, 5, dtype=torch.long)
    return module(**given, encoder_hidden_states_mask=mask, img_shapes=[[(1, 4, 4)]] * 2).sample


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("spelling", SPELT)
def test_a_lora_file_of_any_name_and_trainer_has_the_update_that_its_factors_say(
    folders, tmp_path, capsys, model, spelling
):
    """Of two ranks and two alphas. The factors' product added to the weights, and stock diffusers where it reads it."""
    adapters._warn_once.cache_clear()

    def new():
        return TRANSFORMER[model].from_pretrained(folders[model] / "transformer")

    factors, config = mixed(new())
    file = tmp_path / "d" / "my_style_000001500.safetensors"
    write(file, factors, config, spelling)
    _, entries, metadata, readers = SPELT[spelling]
    expected = new()
    for name, (a, b, alpha) in factors.items():
        scale = alpha / len(a) if entries or metadata else 1.0
        expected.get_submodule(name).weight.data += scale * b @ a
    expected = output(expected)
    if model in readers:
        state, told = STOCK[model].lora_state_dict(file.parent, weight_name=file.name, return_lora_metadata=True)
        stock = new()
        STOCK[model].load_lora_into_transformer(state, transformer=stock, metadata=told)
        parity("stock", output(stock), expected)
    for where in (file, file.parent):
        place = hub.locate(where)
        assert hub.kind(place) == "file"
        state, found = adapters.read_adapter(place, dict(new().named_modules()), "the model")
        ours = new()
        adapters.add(ours, "default", found, state)
        parity(spelling, output(ours), expected)
    assert gap(output(ours), output(new())) > 1e-2
    said = capsys.readouterr().err
    assert ("alpha" in said) == (not entries and not metadata)
    assert ("text encoder" in said) == (spelling == "with text encoders")


FOREIGN = {
    "FLUX": "transformer.single_transformer_blocks.{}.attn.to_q.lora_A.weight",
    "SD3 under its original names": "diffusion_model.joint_blocks.{}.x_block.attn.qkv.lora_A.weight",
    "its original names (ComfyUI)": "lora_unet_joint_blocks_{}_context_block_attn_qkv.lora_down.weight",
    "SDXL": "lora_unet_down_blocks_{}_attentions_0_proj_in.lora_down.weight",
    "Qwen-Image": "transformer_blocks.{}.img_mlp.net.2.lora_A.default.weight",
    "LoKr": "lora_unet_transformer_blocks_{}_attn_to_q.lokr_w1",
    "DoRA": "transformer.transformer_blocks.{}.attn.to_q.lora_magnitude_vector",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_without_a_place_in_the_model_is_refused_with_three_names_and_its_format(base, tmp_path, what):
    keys = [FOREIGN[what].format(number) for number in range(4)]
    safetensors.torch.save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "any.safetensors")
    said = refusal(read, tmp_path / "any.safetensors", base)
    assert what in said and all(key in said for key in keys[:3]) and keys[3] not in said


def test_what_is_not_a_folder_of_whole_files_is_refused_with_the_command_that_makes_one(base, tmp_path):
    copy = shutil.copytree(base / "transformer", tmp_path / "half")
    (weights,) = copy.glob("*.safetensors")
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    said = refusal(hub.read_transformer, copy, torch.float32)
    exec(said.partition('python -c "')[2].partition('"')[0], {})  # the command works
    made = hub.read_transformer(tmp_path / "half-full", torch.float32)
    assert same(made.state_dict(), transformer(base).state_dict())
    single, prefix = tmp_path / "sd3.5.safetensors", "model.diffusion_model.joint_blocks.0.x_block."
    safetensors.torch.save_file({f"{prefix}attn.qkv.weight": torch.ones(2, 2)}, single)
    for said in (refusal(hub.locate, single, ("model_index.json",)), refusal(hub.kind, hub.locate(single))):
        assert "from_single_file" in said and said.startswith(f"{single}: ")


# ---------------------------------------------------------------------------------------------------- on a module
def test_a_state_that_does_not_fill_the_adapter_is_refused(base, lora):
    """PEFT only warns of both."""
    state, config = lora
    key = next(iter(state))
    for wrong in ({k: v for k, v in state.items() if k != key}, {**state, "proj_out.lora_A.weight": torch.ones(4, 32)}):
        with pytest.raises(ModelError):
            adapters.add(transformer(base), "a", config, wrong)


# --------------------------------------------------------------------------------------------------------- refusals
def test_an_adapter_of_another_base_is_refused_by_fingerprint_or_else_by_name(base, lora, saved, tmp_path, monkeypatch):
    assert read(saved, base, fingerprint="abc") and read(saved, base, fingerprint="")
    assert "another base" in refusal(read, saved, base, "mine", "def")
    adapters.save_adapter(tmp_path / "named", *lora, source="owner/one-3.5", fingerprint="abc", pipeline=PIPELINE)
    assert read(tmp_path / "named", base, "owner/mirror", "abc"), "equal weights, whatever they are called"
    monkeypatch.chdir(tmp_path)
    for names in (ADAPTER_FILES, (LORA_FILE,)):
        folder = only(tmp_path / "named", *names)
        assert "owner/one-3.5" in refusal(read, folder, base, "owner/two@main")
        for alike in ("owner/one-3.5", "Owner/One-3.5@v2", str(base), ""):
            assert read(folder, base, alike)
    Path("owner/one-3.5").mkdir(parents=True)  # now a path, which may hold any model
    assert read(folder, base, "other/two")


# ---------------------------------------------------------------------------------------- the shipped teachers
ASSETS = ROOT / "assets" / "tiny"


@pytest.mark.parametrize("folder", sorted(ASSETS.glob("teacher-*")), ids=lambda folder: folder.name)
def test_the_shipped_teachers_read_on_the_shipped_base_and_on_no_other(folder):
    config = json.loads((ASSETS / "base/transformer/config.json").read_text())
    tiny = dict(SD3Transformer2DModel.from_config(config).named_modules())
    state, lora = adapters.read_adapter(
        folder, tiny, str(ASSETS / "base"), hub.fingerprint(ASSETS / "base/transformer")
    )
    assert (lora.r, lora.lora_alpha) == (16, 32.0) and len(state) == 2 * (8 + 8 + 7)
    raw = safetensors.torch.load_file(folder / PEFT_FILES[1])
    assert all(torch.equal(state[key.removeprefix(adapters.PREFIX)], value) for key, value in raw.items())
    assert "trained on another base" in refusal(adapters.read_adapter, folder, tiny, "another", "0" * 16)
