"""Oracles for adapters: stock diffusers and stock PEFT draw what we draw, and what they would misread is refused."""

import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders import lora_conversion_utils
from safetensors import safe_open

from models import hub
from models import lora as adapters
from models.hub import ADAPTER_FILES, LORA_FILE, PEFT_FILES, ModelError
from tests.helpers import sd3
from tests.helpers.checks import edit_json, edit_tensors, gap, refusal
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
    # alpha * sqrt(r) / r and alpha / sqrt(r) may differ in the last bit; all else is the same arithmetic.
    assert gap(ours, velocity(model)) <= (1e-5 if name == "rank-stabilised" else 0.0)
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


def test_alpha_entries_are_folded_into_the_factors_as_stock_diffusers_folds_them(base, lora, tmp_path, capsys):
    """Plain names are Qwen-Image's reader's own; those with diffusers' prefix it would lose, and we do not."""
    for prefix in ("", "transformer.", "diffusion_model."):
        layers = {prefix + key: value for key, value in lora[0].items()}
        layers |= {f"{name}.alpha": torch.tensor(6.0) for name in {key.rpartition(".lora_")[0] for key in layers}}
        safetensors.torch.save_file(layers, tmp_path / LORA_FILE)
        state, config = read(tmp_path, base)
        stock = lora_conversion_utils._convert_non_diffusers_qwen_lora_to_diffusers(dict(layers))
        assert {key.replace("transformer.", ""): None for key in stock} == dict.fromkeys(state)
        assert config.lora_alpha == config.r and capsys.readouterr().err == "", "alpha was told"
        for key, value in state.items():
            assert torch.equal(value, lora[0][key] * (6.0 / RANK if "lora_A" in key else 1.0)), key


def test_names_of_other_trainers_are_read_as_stock_diffusers_reads_them(base, lora, tmp_path):
    """kohya's: the reader of Qwen-Image knows them. SD3.5's modules have the same names."""
    layers = {}
    for key, value in lora[0].items():
        name, _, factor = key.removesuffix(".weight").rpartition(".")
        flat = f"lora_unet_{name.replace('.', '_')}"
        layers[f"{flat}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = value
        layers[f"{flat}.alpha"] = torch.tensor(ALPHA)
    safetensors.torch.save_file(layers, tmp_path / LORA_FILE)
    state, config = read(tmp_path, base)
    assert state.keys() == lora[0].keys() and config.lora_alpha == config.r
    assert gap(velocity(attached(base, state, config)), velocity(attached(base, *lora))) < 1e-4


@pytest.mark.parametrize(("old", "new"), [(".weight", ".default.weight"), (adapters.PREFIX, "")])
def test_older_spellings_of_pefts_keys_are_read(base, lora, saved, old, new):
    def respell(tensors):
        for key in [*tensors]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    edit_tensors(saved / PEFT_FILES[1], respell)
    assert same(read(saved, base)[0], lora[0])


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
