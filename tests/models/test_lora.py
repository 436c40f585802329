"""Oracles for adapters: stock diffusers and stock PEFT draw what we draw, and what they would misread is refused."""

import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import peft
import pytest
import safetensors.torch
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders import lora_conversion_utils
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import errors
from safetensors import safe_open

from models import lora as adapters
from models.lora import ADAPTER_FILES, LORA_FILE, PEFT_FILES, TRANSFORMER_FILES, ModelError
from tests.helpers import sd3

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
RANK, ALPHA = 4, 12.0  # alpha / rank = 3: an adapter that loses its alpha is seen
PIPELINE = "StableDiffusion3Pipeline"


@pytest.fixture(scope="module", autouse=True)
def one_quiet_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    diffusers_logging.disable_progress_bar()
    yield
    diffusers_logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return sd3.build_sd35(tmp_path_factory.mktemp("sd35"))


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


def pipeline(base, module=None):
    pipe = StableDiffusion3Pipeline.from_pretrained(base, **({"transformer": module} if module else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe, prompts=('a sign that says "CAT"', "a photo of two dogs")):
    rng = torch.Generator().manual_seed(0)
    return torch.tensor(pipe(list(prompts), num_inference_steps=2, generator=rng, output_type="np").images)


def modules(base):
    return dict(transformer(base).named_modules())


def read(folder, base, source="the model", fingerprint=""):
    return adapters.read_adapter(folder, modules(base), source, fingerprint)


def refusal(call, *arguments):
    """The message of the ModelError that a call gives; it is one line."""
    with pytest.raises(ModelError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def only(folder, *names):
    """Leave these files in a folder and no others."""
    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()
    return folder


def edit_tensors(folder, change, name=PEFT_FILES[1]):
    """Rewrite a weight file: `change` edits {key: tensor} in place; the metadata stays."""
    with safe_open(folder / name, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(folder / name)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / name, metadata=metadata)


def edit_config(folder, **changes):
    """Rewrite adapter_config.json; a value of ... removes its key."""
    config = json.loads((folder / PEFT_FILES[0]).read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / PEFT_FILES[0]).write_text(json.dumps(config))


def gap(a, b):
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------------------- the tiny SD3.5
def test_the_tiny_pipeline_is_small_a_function_of_its_seed_and_leaves_the_global_generator_alone(base, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again, other = sd3.build_sd35(tmp_path / "again"), sd3.build_sd35(tmp_path / "other", seed=1, num_layers=2)
    assert torch.equal(torch.rand(1), expected)
    assert sum(file.stat().st_size for file in base.rglob("*")) < 3e6
    weights = [(folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes() for folder in (base, again)]
    assert weights[0] == weights[1]
    assert gap(velocity(transformer(other)), velocity(transformer(base))) > 0.1
    assert len(transformer(other).transformer_blocks) == 2


def test_the_tiny_pipeline_has_what_makes_sd35_medium_special(base):
    pipe = pipeline(base)
    config = pipe.transformer.config
    assert config.qk_norm == "rms_norm" and list(config.dual_attention_layers) == [0]
    assert "transformer_blocks.0.attn2.to_q" in dict(pipe.transformer.named_modules())
    assert config.joint_attention_dim == pipe.text_encoder_3.config.d_model > sum(sd3.CLIP_WIDTHS)
    assert pipe.scheduler.config.shift == 3.0 and pipe.vae_scale_factor == 8
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (1.5305, 0.0609)
    one, two = pictures(pipe), pictures(pipe, ['a sign that says "CAB"', "a photo of two dogs"])
    assert one.shape == (2, 64, 64, 3) and torch.equal(one[1], two[1])
    assert gap(one[0], two[0]) > 1e-3, "one letter of the prompt matters"
    assert ((one <= 0) | (one >= 1)).float().mean() < 0.05, "pictures are not clipped away"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the users' prompt files are not here")
def test_the_tiny_tokenizers_encode_every_prompt_of_the_users_files(base):
    pipe = pipeline(base)
    prompts = (SHARED / "ocr_test.txt").read_text().splitlines()
    for name in ("geneval_test_metadata.jsonl", "counting_edit_test_metadata.jsonl"):
        prompts += [json.loads(line)["prompt"] for line in (SHARED / name).read_text().splitlines()]
    rows = pipe.tokenizer_3(prompts).input_ids
    assert not any(pipe.tokenizer_3.unk_token_id in row for row in rows)
    rows = pipe.tokenizer(prompts, truncation=False).input_ids
    plain = ["".join(prompt.lower().split()) for prompt in prompts]
    assert [pipe.tokenizer.decode(row[1:-1]).replace(" ", "") for row in rows] == plain


def test_every_target_changes_the_velocity_but_the_text_query_that_sd3_drops(base, lora):
    state, config = lora
    module = attached(base, state, config)
    whole, silent = velocity(module), set()
    for name, layer in module.named_modules():
        if name.endswith(".lora_B.default"):
            kept, layer.weight.data = layer.weight.data, torch.zeros_like(layer.weight)
            if gap(velocity(module), whole) < 1e-3:
                silent.add(name.removesuffix(".lora_B.default"))
            layer.weight.data = kept
    assert silent == {"transformer_blocks.2.attn.add_q_proj"} and len(state) == 2 * (8 + 8 + 7)


def test_the_targets_leave_the_second_attention_of_sd35_alone(base, lora):
    adapted = {key.rpartition(".lora_")[0] for key in lora[0]}
    assert not any("attn2" in name for name in adapted)
    module = transformer(base)
    module.add_adapter(lora[1])  # PEFT's own matching of the targets
    found = {name.removesuffix(".lora_A.default") for name in dict(module.named_modules()) if "lora_A.d" in name}
    assert found == adapted
    wide = [target.removeprefix("attn.") for target in adapters.TARGETS]  # planted: bare names take attn2 as well
    module = transformer(base)
    module.add_adapter(adapters.lora_config(RANK, ALPHA, wide))
    assert "transformer_blocks.0.attn2.to_q.lora_A.default" in dict(module.named_modules())


# ------------------------------------------------------------------------------- what we write, others read
def test_stock_diffusers_draws_the_same_pictures_and_without_our_metadata_others(base, lora, saved):
    state, config = lora
    expected, plain = pictures(pipeline(base, attached(base, state, config))), pictures(pipeline(base))
    pipe = pipeline(base)
    pipe.load_lora_weights(saved)
    assert gap(pictures(pipe), expected) == 0.0 and gap(plain, expected) > 1e-2
    StableDiffusion3Pipeline.save_lora_weights(saved / "bare", transformer_lora_layers=dict(state))  # planted
    pipe = pipeline(base)
    pipe.load_lora_weights(saved / "bare")
    assert gap(pictures(pipe), expected) > 1e-2


def test_stock_peft_has_the_same_velocity(base, lora, saved):
    expected = velocity(attached(base, *lora))
    stock = peft.PeftModel.from_pretrained(transformer(base), saved)
    assert gap(velocity(stock), expected) == 0.0
    edit_config(saved, lora_alpha=RANK)  # planted: the scale is lost
    assert gap(velocity(peft.PeftModel.from_pretrained(transformer(base), saved)), expected) > 1e-2


def test_an_adapter_adds_alpha_over_rank_times_b_a(base, lora, saved):
    state, config = read(saved, base)
    merged = transformer(base)
    with torch.no_grad():
        for name in {key.rpartition(".lora_")[0] for key in state}:
            a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
            merged.get_submodule(name).weight += 3.0 * b @ a  # 12 / 4
    torch.testing.assert_close(velocity(merged), velocity(attached(base, *lora)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("names", [PEFT_FILES, (LORA_FILE,)], ids=["peft", "diffusers"])
def test_either_layout_reads_back_bitwise_with_its_scale_and_its_targets(base, lora, saved, names):
    state, config = read(only(saved, *names), base)
    assert state.keys() == lora[0].keys() and all(torch.equal(state[key], lora[0][key]) for key in state)
    assert (config.r, config.lora_alpha, config.target_modules) == (RANK, ALPHA, set(adapters.TARGETS))


def test_half_precision_factors_are_stored_and_read_as_float32(base, lora, tmp_path):
    half = {key: value.bfloat16() for key, value in lora[0].items()}
    adapters.save_adapter(tmp_path, half, lora[1])
    raw = safetensors.torch.load_file(tmp_path / PEFT_FILES[1])
    assert {value.dtype for value in raw.values()} == {torch.float32}
    edit_tensors(tmp_path, lambda t: t.update({key: value.half() for key, value in t.items()}))
    state, _ = read(tmp_path, base)
    assert all(torch.equal(state[key], half[key].half().float()) for key in half)


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
    added = attached(base, state, config).peft_config["default"].target_modules
    assert added == config.target_modules and set(state) == set(
        peft.get_peft_model_state_dict(attached(base, state, config))
    )


def test_the_rank_stabilised_scale_is_alpha_over_the_root_of_the_rank(base, saved):
    edit_config(saved, use_rslora=True)
    _, config = read(saved, base)
    assert config.lora_alpha / config.r == 6.0 and not config.use_rslora  # 12 / sqrt(4)


@pytest.mark.parametrize("told", [True, False], ids=["with metadata", "without"])
def test_a_lora_saved_by_stock_diffusers_is_read_as_stock_diffusers_reads_it(base, lora, tmp_path, capsys, told):
    adapters._warn_once.cache_clear()
    module = attached(base, *lora)
    layers = peft.get_peft_model_state_dict(module)
    metadata = {"transformer_lora_adapter_metadata": module.peft_config["default"].to_dict()} if told else {}
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, **metadata)
    pipe = pipeline(base)
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


def test_alpha_entries_in_a_diffusers_file_are_its_alpha_as_stock_diffusers_folds_them(base, lora, tmp_path, capsys):
    layers = {f"transformer.{key}": value for key, value in lora[0].items()}
    names = {key.rpartition(".lora_")[0] for key in layers}
    layers |= {f"{name}.alpha": torch.tensor(6.0) for name in names}
    safetensors.torch.save_file(layers, tmp_path / LORA_FILE)
    state, config = read(tmp_path, base)
    assert config.lora_alpha == 6.0 and state.keys() == lora[0].keys() and capsys.readouterr().err == ""
    folded = lora_conversion_utils._convert_non_diffusers_qwen_lora_to_diffusers(dict(layers))
    for name in names:
        key = name.removeprefix("transformer.")
        a, b = state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"]
        stock = [value for stock_key, value in folded.items() if f".{key}." in f".{stock_key}"]
        stock_a, stock_b = sorted(stock, key=lambda value: value.shape[0] != RANK)
        torch.testing.assert_close(6.0 / RANK * b @ a, stock_b @ stock_a)


def test_older_spellings_of_pefts_keys_are_read(base, lora, saved):
    def old(tensors):
        for key in [*tensors]:
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    def bare(tensors):
        for key in [*tensors]:
            tensors[key.removeprefix(adapters.PREFIX)] = tensors.pop(key)

    for change in (old, bare):
        edit_tensors(saved, change)
        state, _ = read(saved, base)
        assert state.keys() == lora[0].keys() and all(torch.equal(state[key], lora[0][key]) for key in state)


def test_a_missing_rank_is_taken_from_the_factors_and_patterns_that_say_nothing_pass(base, saved):
    edit_config(saved, r=..., rank_pattern=..., alpha_pattern={"to_q": ALPHA})
    assert read(saved, base)[1].r == RANK
    edit_config(saved, r=RANK, rank_pattern={"to_q": RANK})
    assert read(saved, base)[1].r == RANK


def test_adapters_read_on_a_model_that_carries_adapters_already(base, lora, saved):
    module = attached(base, *lora)
    state, config = adapters.read_adapter(saved, dict(module.named_modules()), "the model")
    assert state.keys() == lora[0].keys() and config.target_modules == set(adapters.TARGETS)


# -------------------------------------------------------------------------------------------------- refusals
Q = f"{adapters.PREFIX}transformer_blocks.1.attn.to_q."


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


TENSOR_FAULTS = {
    "nothing": (lambda t: t.clear(), "holds no tensor at all"),
    "no B": (lambda t: t.pop(Q + "lora_B.weight"), r"to_q\.lora_A\.weight has no partner .*to_q\.lora_B\.weight"),
    "no A": (lambda t: t.pop(Q + "lora_A.weight"), r"to_q\.lora_B\.weight has no partner .*to_q\.lora_A\.weight"),
    "nan": (lambda t: t[Q + "lora_A.weight"].__setitem__((2, 3), float("nan")), "to_q.lora_A.* not finite"),
    "inf": (lambda t: t[Q + "lora_B.weight"].__setitem__((9, 1), float("-inf")), "to_q.lora_B.* not finite"),
    "dora": (lambda t: t.update({Q + "lora_magnitude_vector": torch.ones(32)}), "lora_magnitude_vector is no plain"),
    "bias": (lambda t: t.update({Q + "lora_B.bias": torch.ones(32)}), r"to_q\.lora_B\.bias is no plain LoRA factor"),
    "saved module": (lambda t: t.update({"proj_out.weight": torch.ones(64, 32)}), r"proj_out\.weight is no plain"),
    "alpha": (lambda t: t.update({Q + "alpha": torch.tensor(3.0)}), r"to_q\.alpha is no plain LoRA factor"),
    "width": (
        lambda t: t.update({Q + "lora_A.weight": torch.ones(RANK, 31)}),
        r"to_q\.lora_A\.weight is \(4, 31\), and an adapter of rank 4 for the model needs \(4, 32\)",
    ),
    "rank": (
        lambda t: t.update({Q + "lora_A.weight": torch.ones(3, 32), Q + "lora_B.weight": torch.ones(32, 3)}),
        r"to_q\.lora_A\.weight is \(3, 32\), and an adapter of rank 4 for the model needs \(4, 32\)",
    ),
    "scalar": (lambda t: t.update({Q + "lora_B.weight": torch.tensor(1.0)}), r"to_q\.lora_B\.weight is \(\), and"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_broken_weights_are_refused_by_file_and_key(base, saved, fault):
    change, message = TENSOR_FAULTS[fault]
    edit_tensors(saved, change)
    said = refusal(read, saved, base)
    assert said.startswith(f"{saved / PEFT_FILES[1]}: ") and re.search(message, said)


def test_another_architecture_is_refused_by_its_first_foreign_module(base, saved):
    for old, new in (("blocks.1", "blocks.7"), ("attn.to_q", "norm1")):

        def move(tensors, old=old, new=new):
            for factor in ("lora_A.weight", "lora_B.weight"):
                rename(
                    tensors,
                    Q + factor,
                    (Q + factor).replace("blocks.1.attn.to_q", "blocks.1.attn.to_q".replace(old, new)),
                )

        edit_tensors(saved, move)
        name = "transformer_blocks.1.attn.to_q".replace(old, new)
        assert f"{PEFT_FILES[1]}: adapts {name}, which is no linear layer of the model" in refusal(read, saved, base)
        adapters.save_adapter(saved, *sd3.random_lora(transformer(base), RANK, ALPHA, seed=1))


CONFIG_FAULTS = {
    "use_dora = True": {"use_dora": True},
    "use_qalora = True": {"use_qalora": True},
    "lora_bias = True": {"lora_bias": True},
    "bias = all": {"bias": "all"},
    r"modules_to_save = \['proj_out'\]": {"modules_to_save": ["proj_out"]},
    "rank_pattern = to_q=2": {"rank_pattern": {"to_q": 2}},
    "alpha_pattern = to_q=6": {"alpha_pattern": {"to_q": 6.0}},
    r"rank_pattern = \[2\]": {"rank_pattern": [2]},
    "init_lora_weights = pissa": {"init_lora_weights": "pissa"},
    "peft_type = LOKR": {"peft_type": "LOKR"},
    r"layer_replication = \[\[0, 1\]\]": {"layer_replication": [[0, 1]]},
    "lora_alpha is None; it must be a finite number": {"lora_alpha": ...},
    "lora_alpha is nan; it must be a finite number": {"lora_alpha": float("nan")},
    "lora_alpha is 12; it must be a finite number": {"lora_alpha": "12"},
    "r is 0; it must be a positive whole number": {"r": 0},
    "r is 4.5; it must be a positive whole number": {"r": 4.5},
}


@pytest.mark.parametrize("message", CONFIG_FAULTS)
def test_configs_that_a_plain_lora_cannot_follow_are_refused_by_file_and_name(base, saved, message):
    edit_config(saved, **CONFIG_FAULTS[message])
    said = refusal(read, saved, base)
    assert said.startswith(f"{saved / PEFT_FILES[0]}: ") and re.search(message, said)


def test_the_refused_variants_do_change_what_stock_peft_computes(base, lora, saved):
    expected = velocity(attached(base, *lora))
    for change in ({"alpha_pattern": {"to_q": 6.0}}, {"use_rslora": True}, {"init_lora_weights": "pissa"}):
        shutil.copy(saved / PEFT_FILES[0], saved / "kept")
        edit_config(saved, **change)
        assert gap(velocity(peft.PeftModel.from_pretrained(transformer(base), saved)), expected) > 1e-3, change
        shutil.move(saved / "kept", saved / PEFT_FILES[0])


def test_a_rank_that_the_config_contradicts_is_refused(base, saved):
    edit_config(saved, r=8)
    assert re.search(r"lora_A\.weight is \(4, \d+\), and an adapter of rank 8 for", refusal(read, saved, base))


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_a_truncated_file_is_refused_by_name(base, saved, name):
    only(saved, *(PEFT_FILES if name in PEFT_FILES else [LORA_FILE]))
    file = saved / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert refusal(read, saved, base).startswith(f"{file}: not ")
    if name == PEFT_FILES[0]:
        file.write_text("[1]")
        assert refusal(read, saved, base).startswith(f"{file}: must hold one JSON object")


def diffusers_file(folder, state, metadata=None, **extra):
    folder.mkdir(exist_ok=True)
    tensors = {f"transformer.{key}": value for key, value in state.items()} | extra
    metadata = {} if metadata is None else {"lora_adapter_metadata": metadata}
    safetensors.torch.save_file(tensors, folder / LORA_FILE, metadata={"format": "pt", **metadata})
    return folder


def test_broken_diffusers_files_are_refused(base, lora, tmp_path):
    state = lora[0]
    one, two = (f"transformer.transformer_blocks.{block}.attn.to_q.alpha" for block in (0, 1))
    six = torch.tensor(6.0)
    text = {"text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(RANK, 16)}
    told = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA})
    cases = [
        (diffusers_file(tmp_path / "a", state, "{"), "lora_adapter_metadata is not a JSON object"),
        (diffusers_file(tmp_path / "b", state, "[1]"), "lora_adapter_metadata is not a JSON object"),
        (diffusers_file(tmp_path / "c", state, '{"text_encoder.r": 4}'), "lora_alpha is None"),
        (diffusers_file(tmp_path / "d", state, '{"transformer.use_dora": true}'), "use_dora = True"),
        (diffusers_file(tmp_path / "e", state, told, **{one: six}), r"tells alpha twice, .*0\.attn\.to_q\.alpha"),
        (diffusers_file(tmp_path / "f", state, **{one: six}), "one alpha for all is needed"),
        (diffusers_file(tmp_path / "g", state, **{one: six, two: six + 1}), "one alpha for all is needed"),
        (diffusers_file(tmp_path / "h", state, told, **text), r"text_encoder\.layers\.0\.q_proj\.lora_A\.weight is no"),
        (diffusers_file(tmp_path / "i", {}, told, **state), "is no plain LoRA factor of a transformer"),
        (diffusers_file(tmp_path / "j", {}, told), "holds no tensor at all"),
    ]  # fmt: skip
    for folder, message in cases:
        said = refusal(read, folder, base)
        assert said.startswith(f"{folder / LORA_FILE}: ") and re.search(message, said), said
    assert read(diffusers_file(tmp_path / "k", state, told), base)[1].lora_alpha == ALPHA, "the frame itself is sound"


def test_an_adapter_of_another_base_is_refused_by_fingerprint(base, saved):
    assert read(saved, base, fingerprint="abc") and read(saved, base, fingerprint="")
    said = refusal(read, saved, base, "mine", "def")
    assert said == f"{saved / PEFT_FILES[1]}: trained on another base (abc) than mine (def)"


@pytest.mark.parametrize("names", [PEFT_FILES, (LORA_FILE,)], ids=["peft", "diffusers"])
def test_an_adapter_of_another_hub_base_is_refused_by_name(base, lora, tmp_path, monkeypatch, names):
    adapters.save_adapter(tmp_path / "lora", *lora, source="owner/one-3.5", pipeline=PIPELINE)
    folder = only(tmp_path / "lora", *names)
    said = refusal(read, folder, base, "owner/two@main")
    assert said.startswith(f"{folder / names[-1]}: trained on another base (owner/one-3.5) than owner/two;")
    for same in ("owner/one-3.5", "Owner/One-3.5@v2", str(base), ""):
        assert read(folder, base, same)
    monkeypatch.chdir(tmp_path)
    Path("owner/one-3.5").mkdir(parents=True)  # now a path, which may hold any model
    assert read(folder, base, "other/two")


def test_equal_fingerprints_outweigh_different_names(base, lora, tmp_path):
    adapters.save_adapter(tmp_path, *lora, source="owner/one", fingerprint="abc")
    assert read(tmp_path, base, "owner/mirror", "abc")
    assert "trained on another base (owner/one)" in refusal(read, tmp_path, base, "owner/mirror", "")


# ------------------------------------------------------------------------------------------- kinds of folders
def test_folders_are_told_apart_by_what_they_hold_and_pefts_layout_comes_first(base, saved):
    assert adapters.kind(saved) == adapters.kind(str(saved)) == "peft"
    assert adapters.kind(only(saved, PEFT_FILES[1], LORA_FILE)) == "diffusers", "half a PEFT adapter does not count"
    assert adapters.kind(base) == adapters.kind(base / "transformer") == "full"
    assert "a full checkpoint, and an adapter is needed here" in refusal(read, base, base)


def test_folders_that_hold_nothing_usable_are_refused_with_what_is_expected(base, saved, tmp_path):
    said = refusal(adapters.kind, tmp_path / "none")
    assert said.startswith(f"{tmp_path / 'none'}: neither an adapter nor a model") and all(
        n in said for n in ADAPTER_FILES
    )
    assert refusal(adapters.kind, base / "vae").startswith(f"{base / 'vae'}: neither an adapter nor a model")
    for name in PEFT_FILES:
        folder = shutil.copytree(saved, tmp_path / f"without {name}")
        only(folder, *(set(PEFT_FILES) - {name}))
        assert refusal(adapters.kind, folder).startswith(f"{folder / name}: missing beside ")


def test_pickles_are_refused_because_unpickling_runs_code(saved):
    only(saved, PEFT_FILES[0])
    for name in ("adapter_model.bin", "lora.pt"):
        (saved / name).write_bytes(b"")
        assert re.search(
            rf"pickles \(.*{name}.*\), refused because unpickling runs code", refusal(adapters.kind, saved)
        )
        (saved / name).unlink()


# ----------------------------------------------------------------------------------------------------- locate
@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that writes down what is asked of it, and answers with `hub.answer`, a folder or an exception."""
    calls = []
    hub = SimpleNamespace(calls=calls, answer=AssertionError("nothing may be fetched here"))

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        if isinstance(hub.answer, Exception):
            raise hub.answer
        return str(hub.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


def test_folders_files_and_home_paths_are_themselves(hub, saved, base, tmp_path, monkeypatch):
    assert adapters.locate(str(saved)) == adapters.locate(saved) == saved
    assert adapters.locate("lora") == Path("lora"), "relative, and it exists"
    for name in ADAPTER_FILES:
        assert adapters.locate(str(saved / name)) == saved
    monkeypatch.setenv("HOME", str(tmp_path))
    assert adapters.locate("~/lora") == saved
    (tmp_path / "notes.txt").write_text("")
    assert "neither a folder nor one of" in refusal(adapters.locate, str(tmp_path / "notes.txt"))
    assert hub.calls == []


def test_a_run_stands_for_its_last_complete_checkpoint(hub, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    assert adapters.last_checkpoint(tmp_path / "run") is None and adapters.last_checkpoint(tmp_path / "none") is None
    assert "the run has no complete checkpoint yet" in refusal(adapters.locate, "run")
    (checkpoints / ".step-000003").mkdir()
    assert adapters.last_checkpoint(tmp_path / "run") is None, "it is being written"
    for name in ("step-000002", "step-000010", "step-000010.old"):
        (checkpoints / name).mkdir()
    assert adapters.locate(str(tmp_path / "run")) == checkpoints / "step-000010"
    for name in ("step-999999", "step-1000000"):
        (checkpoints / name).mkdir()
    assert adapters.locate("run") == Path("run/checkpoints/step-1000000"), "by number, not by letter"
    assert adapters.locate("run/checkpoints/step-000002") == Path("run/checkpoints/step-000002")


LOCAL = [
    "./a/b",
    "../a/b",
    "~/a/b",
    "/a/b",
    "a/b.safetensors",
    "a/b.bin",
    "here/b",
    "single",
    "",
    "a//b",
    "a/../b",
    "a b/c",
]


@pytest.mark.parametrize("where", LOCAL)
def test_a_missing_path_is_an_error_and_never_a_download(hub, tmp_path, where):
    (tmp_path / "here").mkdir()
    assert "no such file or folder; give a path or a Hub id" in refusal(adapters.locate, where)
    assert hub.calls == []


IDS = {
    "jieliu/SD3.5M-FlowGRPO-GenEval": ("jieliu/SD3.5M-FlowGRPO-GenEval", "", None),
    "stabilityai/stable-diffusion-3.5-medium@v1.0": ("stabilityai/stable-diffusion-3.5-medium", "", "v1.0"),
    "CostaliyA/Flow-OPD/a/b.2": ("CostaliyA/Flow-OPD", "a/b.2/", None),
    "owner/name/sub@refs/pr/1": ("owner/name", "sub/", "refs/pr/1"),
}


@pytest.mark.parametrize("where", IDS)
def test_a_hub_id_is_fetched_with_what_an_expert_may_be_and_no_pickles(hub, saved, where):
    repo, inside, revision = IDS[where]
    hub.answer = saved.parent / "snapshot"
    shutil.copytree(saved, hub.answer / inside)
    assert adapters.locate(where) == hub.answer / inside
    ((asked, options),) = hub.calls
    assert asked == repo and options["revision"] == revision
    assert options["allow_patterns"] == [inside + name for name in (*ADAPTER_FILES, *TRANSFORMER_FILES)]
    assert {"*.bin", "*.pt", "*.pkl", "*.ckpt"} <= set(options["ignore_patterns"])
    assert adapters.hub_id(where) == repo


def test_other_files_are_fetched_on_request_and_a_repository_without_them_is_refused(hub, base):
    hub.answer = base
    assert adapters.locate("owner/name", ("vae/*.json",)) == base
    assert hub.calls[-1][1]["allow_patterns"] == ["vae/*.json"]
    assert adapters.locate("owner/name") == base, "a full checkpoint is an expert too"
    hub.answer = base / "vae"
    said = refusal(adapters.locate, "owner/name")
    assert said.startswith("owner/name: holds none of adapter_config.json, ") and "owner/name/FOLDER" in said
    assert "holds none of" in refusal(adapters.locate, "owner/name/sub")


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=401)
HUB_FAULTS = [
    (
        errors.GatedRepoError("401\nlong", response=RESPONSE),
        r"accept its licence at https://\S+/o/n, .*`hf auth login`",
    ),
    (errors.RepositoryNotFoundError("404\nlong", response=RESPONSE), "neither a path here nor a public Hub repository"),
    (errors.RevisionNotFoundError("404\nlong", response=RESPONSE), "no revision r1 there; give another one"),
    (errors.LocalEntryNotFoundError("Cannot find\nlong"), "HF_HUB_OFFLINE.*`hf download o/n`.* give the folder's path"),
    (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE.*`hf download o/n`"),
    (errors.HfHubHTTPError("\n500 broken\nlong", response=RESPONSE), r"\(500 broken\).*`hf download o/n`"),
    (errors.HFValidationError("bad id"), r"\(bad id\)"),
    (OSError(28, "No space left on device"), r"\(\[Errno 28\] No space left on device\)"),
    (TimeoutError(), r"\(TimeoutError\)"),
]


@pytest.mark.parametrize(("fault", "message"), HUB_FAULTS, ids=[type(fault).__name__ for fault, _ in HUB_FAULTS])
def test_what_the_hub_refuses_is_said_in_one_line_with_a_way_out(hub, fault, message):
    hub.answer = fault
    said = refusal(adapters.locate, "o/n@r1")
    assert said.startswith("o/n@r1: ") and re.search(message, said)


def test_offline_the_cache_is_asked_and_nothing_else(monkeypatch, saved, tmp_path):
    """The real snapshot_download, with HF_HUB_OFFLINE on and a cache of our own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert "HF_HUB_OFFLINE is set, and the cache lacks it" in refusal(adapters.locate, "owner/name")
    commit = "0123456789" * 4
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / commit
    shutil.copytree(saved, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    assert adapters.locate("owner/name") == snapshot and adapters.kind(snapshot) == "peft"


# ------------------------------------------------------------------------------------------------------- card
SETTINGS = {
    "model": "stabilityai/stable-diffusion-3.5-medium@v1", "name": "my-run", "stage": "opd", "estimator": "analytic",
    "teachers": {"text": "CostaliyA/SD3.5M-FlowGRPO-OCR-3240", "quality": "runs/q"}, "lr": 1e-4, "steps": 300,
    "cfg": 4.5, "eval_steps": 2, "init": "", "guard": False, "beta": 0.0,
}  # fmt: skip


def rows(text):
    """{first cell: second cell} of every two-column table row; cells split at bars that are not escaped."""
    lines = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
    assert all(len(cells) == 4 for cells in lines), "two cells a row"
    return {cells[1].strip(): cells[2].strip() for cells in lines}


def test_the_card_has_front_matter_settings_scores_and_metrics():
    card = huggingface_hub.ModelCard(
        adapters.model_card(SETTINGS, {"gap": 0.0123456789}, {"text": 0.75}, 300, PIPELINE)
    )
    data = card.data.to_dict()
    assert data["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"lora", "text-to-image", "flow-matching"} <= set(data["tags"])
    found = rows(card.text)
    assert found["lr"] == "0.0001" and found["guard"] == "False" and found["beta"] == "0", "zero and False are values"
    assert found["eval_steps"] == "2" and "init" not in found, "empty settings are left out"
    assert found["gap"] == "0.0123457" and found["text"] == "0.75"
    assert "Stage opd, 300 steps" in card.text and "estimator analytic" in card.text
    assert "- text: CostaliyA/SD3.5M-FlowGRPO-OCR-3240" in card.text
    assert "estimator" not in adapters.model_card(SETTINGS | {"stage": "grpo"}, {}, {}, 1).split("| setting")[0]


def test_the_card_guides_as_the_run_guided_its_students_pictures():
    """Distilled from guided teachers (Q 4.3), a student has the guidance in its weights."""
    for guidance, scale in (("both", 4.5), ("rollout", 4.5), ("teacher", 1.0), ("neither", 1.0)):
        card = adapters.model_card(SETTINGS | {"guidance": guidance}, {}, {}, 1, PIPELINE)
        assert f'pipe("a photo of two cats", num_inference_steps=2, guidance_scale={scale}).images[0]' in card


@pytest.mark.parametrize("model", ["/data/sd35", "./sd35", "runs", "a b", 'o"w/n\nx: 1', ""])
def test_a_base_that_is_no_hub_id_stays_out_of_the_front_matter(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = huggingface_hub.ModelCard(adapters.model_card(SETTINGS | {"model": model}, {}, {}, 1, PIPELINE))
    assert "base_model" not in card.data.to_dict() and "x" not in card.data.to_dict()


NASTY = [
    "a\nb",
    "---\nlicense: mit",
    "| cell |",
    '"quoted"',
    "```python\nx",
    "<script>",
    "*bold* _it_ [l](u)",
    "a\\|b",
    "\u2028é\x00",
]


def test_nasty_strings_leave_the_card_valid():
    strings = [a + b for a, b in itertools.product(NASTY, NASTY)]
    settings = {text: text for text in strings} | {key: "".join(NASTY) for key in ("model", "name", "estimator")}
    settings |= {"stage": "opd", "teachers": {text: text for text in NASTY}, "cfg": "1\n```", "eval_steps": "2\n```"}
    text = adapters.model_card(settings, dict.fromkeys(strings, float("nan")), {"s": "\n|"}, 1, PIPELINE)
    card = huggingface_hub.ModelCard(text)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert text.count("\n---\n") == 1 and "<script" not in prose and "&lt;script&gt;" in prose
    assert len(rows(text)) > len(strings) / 2 and len([x for x in text.splitlines() if x.startswith("```")]) == 4
    for block in code(text):
        compile(block, "card", "exec")
    assert adapters._cell("a\n b|c*d_e _f_ <g> \\") == r"a b\|c\*d_e \_f\_ &lt;g&gt; \\"


def code(card):
    return re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def test_the_code_on_the_card_loads_the_adapter(base, lora, saved, capsys):
    expected = velocity(attached(base, *lora))
    settings = SETTINGS | {"model": str(base)}
    local = [("path/to/this/folder", str(saved)), ('"cuda"', '"cpu"'), ("bfloat16", "float32")]
    blocks = code(adapters.model_card(settings, {}, {}, 1, PIPELINE)) + code(adapters.model_card(settings, {}, {}, 1))
    assert len(blocks) == 3
    stock, with_peft, bare = [re.sub("|".join(a for a, _ in local), lambda m: dict(local)[m[0]], b) for b in blocks]
    names = {}
    exec(stock, names)
    assert gap(velocity(names["pipe"].transformer), expected) == 0.0 and names["image"].size == (64, 64)
    names = {"pipe": pipeline(base)}
    exec(with_peft, names)
    assert gap(velocity(names["pipe"].transformer), expected) == 0.0
    assert pictures(names["pipe"]).shape == (2, 64, 64, 3)
    names = {}
    exec(bare, names)
    assert gap(velocity(names["transformer"]), expected) == 0.0


# ---------------------------------------------------------------------------------------- the shipped teachers
ASSETS = ROOT / "assets" / "tiny"


@pytest.mark.parametrize("folder", sorted(ASSETS.glob("teacher-*")), ids=lambda folder: folder.name)
def test_the_shipped_teachers_read_on_the_shipped_base_and_on_no_other(folder):
    config = json.loads((ASSETS / "base/transformer/config.json").read_text())
    tiny = dict(SD3Transformer2DModel.from_config(config).named_modules())
    weights = (ASSETS / "base/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    mark = hashlib.sha256(weights).hexdigest()[:16]
    assert adapters.kind(adapters.locate(os.path.relpath(folder))) == "peft"
    state, lora = adapters.read_adapter(folder, tiny, str(ASSETS / "base"), mark)
    assert (lora.r, lora.lora_alpha) == (16, 32.0) and len(state) == 2 * (8 + 8 + 7)
    raw = safetensors.torch.load_file(folder / PEFT_FILES[1])
    assert all(torch.equal(state[key.removeprefix(adapters.PREFIX)], value) for key, value in raw.items())
    assert "trained on another base" in refusal(adapters.read_adapter, folder, tiny, "another", "0" * 16)
