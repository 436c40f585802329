"""Oracles for the plan: exact counts against the real modules, a real step's forwards, every number's own flag."""

import collections
import json
import math
import re
import struct
from pathlib import Path

import pytest

import settings as S
from harness import cost as C
from harness import plan as P
from harness import sizes as Z

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
HUB = "owner/sd35"
FLOW = f"--model {HUB} --micro-batch 8"  # F App. A on SD3.5-M, from the Hub, in small micro-batches
TINY = "--preset tiny"
# Q on Qwen-Image-Edit, with numbers of the tests' own
EDITS = (
    "--preset qwen-rl --model owner/Qwen-Image-Edit-x --prompts edit=pairs.jsonl --resolution 512 --text-length 512 "
    "--rank 64 --cfg 4 --num-steps 40 --window 0:16 --train-steps random --train-count 8 --micro-batch 4 "
    "--prompts-per-step 4 --group-size 12 --updates 1 --no-overlap"
)
N = 2_243_171_520  # parameters of SD3.5-M's transformer; the first test counts them
SMALL = {
    "num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 8, "caption_projection_dim": 24,
    "joint_attention_dim": 40, "pooled_projection_dim": 28, "patch_size": 2, "in_channels": 4, "out_channels": 4,
    "dual_attention_layers": (0,), "qk_norm": "rms_norm", "pos_embed_max_size": 10, "sample_size": 12,
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No torchrun, and the repository's folder, where the shipped assets are."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)


def parse(line="", **more):
    return S.parse(line.split() if isinstance(line, str) else line, **more)[0]


def lines(line, world=None, local=None):
    """{label: its lines} of a plan."""
    shown = P.describe(parse(line), world, local)
    found = collections.defaultdict(list)
    for text in shown[shown.index("\n}") + 3 :].split("\n"):
        found[text[:21].strip()].append(text[21:].strip())
    return dict(found)


def write_safetensors(file, shapes):
    """A safetensors file of zeros, by the format's own words: length, JSON header, bytes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def full_checkpoint(folder, config=Z.SD35_MEDIUM):
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel", **config}))
    return folder


TWENTY = 20_430_401_088  # parameters of Qwen-Image's transformer
SMALL_QWEN = {
    "_class_name": Z.QWEN, "num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 8, "patch_size": 2,
    "joint_attention_dim": 40, "in_channels": 12, "out_channels": 5, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip


def meta(config):
    """The real class on the meta device: shapes without numbers."""
    import diffusers
    import torch

    config = dict(config)
    with torch.device("meta"):
        return getattr(diffusers, config.pop("_class_name", Z.SD3))(**config)


def count(parameters):
    return sum(p.numel() for p in parameters)


# --------------------------------------------------------------------------------------------------- exact counts
def test_the_published_medium_model_has_exactly_the_parameters_that_diffusers_builds():
    assert Z.transformer_parameters(Z.SD35_MEDIUM) == count(meta(Z.SD35_MEDIUM).parameters()) == N


def test_qwen_image_has_exactly_the_parameters_that_diffusers_builds():
    import diffusers
    import torch

    assert Z.transformer_parameters(Z.QWEN_IMAGE) == count(meta(Z.QWEN_IMAGE).parameters()) == TWENTY
    assert 38 * GIB < 2 * TWENTY < 38.1 * GIB, "in bfloat16"
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLQwenImage()
    assert count(vae.parameters()) == pytest.approx(Z.QWEN_VAE, rel=0.01)


QWEN_CHANGES = [
    {}, {"num_layers": 1}, {"num_layers": 5, "out_channels": None},
    {"num_attention_heads": 5, "joint_attention_dim": 17}, {"patch_size": 3, "in_channels": 9},
    {"attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)},
    {"use_additional_t_cond": True}, {"zero_cond_t": True},
]  # fmt: skip


@pytest.mark.parametrize("change", QWEN_CHANGES, ids=str)
def test_small_qwen_images_of_every_shape_are_counted_exactly(change):
    config = SMALL_QWEN | change
    assert Z.transformer_parameters(config) == count(meta(config).parameters())


@pytest.mark.parametrize(
    "config", [SMALL_QWEN, SMALL_QWEN | {"num_layers": 3}, SMALL | {"num_layers": 4}], ids=lambda c: c["num_layers"]
)
def test_what_no_velocity_reads_is_not_trained_and_counted_as_the_model_does(config):
    from models import flow, qwen
    from models import lora as adapters

    kind = qwen.QwenFlow if Z.is_qwen(config) else flow.FlowModel
    model = kind(meta(config), "meta")
    assert count(model.trainable().values()) == Z.transformer_parameters(config) - Z.unread_parameters(config)
    model.transformer.requires_grad_(False)
    model.add_adapter(flow.STUDENT, adapters.lora_config(3, 6.0))
    assert count(model.trainable().values()) == Z.lora_parameters(config, 3) - C.unread_lora(config, 3)
    names = [name for name, _ in model.transformer.named_parameters() if ".lora_" in name]
    left = sum(any(part in name for part in Z.unread_names(config)) for name in names)
    assert left == 2 * Z.is_qwen(config) and (C.unread_lora(config, 3) > 0) == Z.is_qwen(config)


def test_an_adapter_file_tells_what_of_it_no_velocity_reads(tmp_path):
    base = C.Base("", SMALL_QWEN, 0, 0, 20, 32)
    keys = ["1.attn.to_add_out", "1.attn.to_q", "0.attn.to_add_out"]
    shapes = {f"transformer.transformer_blocks.{key}.lora_A.weight": (2, 24) for key in keys}
    write_safetensors(tmp_path / "pytorch_lora_weights.safetensors", shapes)
    found = C.expert(str(tmp_path), base, 4)
    assert (found.parameters, found.unread) == (3 * 48, 48)
    assert C.trained_parameters(parse(f"{EDITS} --stage opd"), base, found, {}) == 2 * 48


def test_the_source_of_an_edit_is_as_many_text_tokens_as_the_encoder_makes_of_it():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    height, width = smart_resize(384, 384, factor=28)
    assert (height // 28) * (width // 28) == Z.PICTURE_TOKENS == 196
    base = C.base_of(parse(f"{EDITS} --stage opd"))
    assert base.tokens() == (32 * 32, 512) and base.tokens(edit=True) == (2 * 32 * 32, 512 + 196)
    large = C.base_of(parse(f"{EDITS} --stage opd --source-resolution 1024"))
    assert large.tokens() == base.tokens() and large.tokens(edit=True) == (32 * 32 + 64 * 64, 708)
    assert base.latent == 16 * 64 * 64 and C.base_of(parse(FLOW)).tokens(edit=True) == (32 * 32, 333)


CHANGES = [
    {},
    {"num_layers": 1, "dual_attention_layers": ()},
    {"num_layers": 5, "dual_attention_layers": (1, 4)},  # the last block has two attentions
    {"dual_attention_layers": (0, 7)},  # a layer that is not there
    {"qk_norm": None},
    {"num_attention_heads": 5, "attention_head_dim": 4, "caption_projection_dim": 20},
    {"joint_attention_dim": 17, "pooled_projection_dim": 9},
    {"patch_size": 3, "in_channels": 5, "out_channels": 2},
    {"in_channels": 7, "out_channels": None},  # as many as come in
    {"pos_embed_max_size": 20, "sample_size": 16},  # a buffer: no parameters
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_small_models_of_every_shape_are_counted_exactly(change):
    config = SMALL | change
    assert Z.transformer_parameters(config) == count(meta(config).parameters())


def test_the_older_configs_without_norm_and_dual_layers_are_those_of_none():
    old = {k: v for k, v in SMALL.items() if k not in ("qk_norm", "dual_attention_layers", "out_channels")}
    same = old | {"qk_norm": None, "dual_attention_layers": (), "out_channels": None}
    assert Z.transformer_parameters(old) == count(meta(same).parameters())


def test_an_unknown_norm_is_refused_and_a_missing_entry_is_named():
    with pytest.raises(ValueError, match="layer_norm"):
        Z.transformer_parameters(SMALL | {"qk_norm": "layer_norm"})
    with pytest.raises(KeyError, match="patch_size"):
        Z.transformer_parameters({k: v for k, v in SMALL.items() if k != "patch_size"})


BARE = tuple(name.removeprefix("attn.") for name in Z.TARGETS)


@pytest.mark.parametrize("targets", [Z.TARGETS, BARE, ("to_q", "attn.to_add_out")], ids=["attn.", "bare", "mixed"])
@pytest.mark.parametrize(
    "config", [Z.SD35_MEDIUM, SMALL, SMALL | CHANGES[2], SMALL_QWEN | {"num_layers": 3}], ids=lambda c: c["num_layers"]
)
def test_a_lora_has_exactly_the_factors_that_peft_injects(config, targets):
    from models import lora as adapters

    model = meta(config).requires_grad_(False)
    model.add_adapter(adapters.lora_config(3, 6.0, targets))
    assert Z.lora_parameters(config, 3, targets) == count(p for p in model.parameters() if p.requires_grad) > 0


def test_the_students_lora_is_hand_counted():
    # 24 blocks of eight projections, less the last to_add_out; (32, 1536) and (1536, 32) each
    assert Z.lora_parameters(Z.SD35_MEDIUM, 32) == (24 * 8 - 1) * 2 * 32 * 1536 == 18_776_064
    # Qwen-Image: 60 blocks of eight, of which the last one's to_add_out is not trained
    assert Z.lora_parameters(Z.QWEN_IMAGE, 64) == 60 * 8 * 2 * 64 * 3072
    assert C.unread_lora(Z.QWEN_IMAGE, 64) == 2 * 64 * 3072
    # bare names reach attn2's four projections in 13 blocks besides
    assert Z.lora_parameters(Z.SD35_MEDIUM, 32, BARE) == (24 * 8 - 1 + 13 * 4) * 2 * 32 * 1536


def test_a_planted_bug_in_the_last_block_or_the_second_attention_is_seen(monkeypatch):
    true = Z.block_parameters
    for wrong in (lambda c, n: true(c, 0), lambda c, n: true(c | {"dual_attention_layers": ()}, n)):
        monkeypatch.setattr(Z, "block_parameters", wrong)
        assert Z.transformer_parameters(Z.SD35_MEDIUM) != N


def test_a_planted_bug_that_ends_qwen_images_text_early_or_joins_the_kinds_is_seen(monkeypatch):
    true = Z.block_parameters
    monkeypatch.setattr(Z, "block_parameters", lambda c, n: true(c | {"_class_name": Z.SD3, "qk_norm": "rms_norm"}, n))
    assert Z.transformer_parameters(Z.QWEN_IMAGE) < TWENTY
    mix = f"{EDITS} --stage grpo --task mix --mix joint --prompts-per-step 5 --group-size 3"
    monkeypatch.setattr(C, "groupby", lambda rows, kind: [(None, rows)])
    assert C.rows_in_step(parse(mix)) == (15, 4, 4), "not 5 micro-batches: rows of both kinds share the third"


# ------------------------------------------------------------------------------- copies of what cannot be imported
def test_what_is_copied_from_the_heavy_modules_is_what_they_say():
    import opd
    from models import lora as adapters

    assert Z.TARGETS == adapters.TARGETS and C.FILE_ENDINGS == adapters.FILE_ENDINGS
    for estimator in opd.ESTIMATORS:
        s = parse(f"{FLOW} --estimator {estimator}")
        assert C.is_single_pass(s) == (estimator not in opd.NEEDS_FUTURE), estimator


PLACES = ["a/b", "a/SD3.5M-b", "a/b/c", "a/b@v1", "a/b@refs/pr/1", "a", "", "./a/b", "/a/b", "~/a/b", "a/b.safetensors",
          "assets/b", "tests/none", "a b/c", "a//b", "a/b/", "a/b@", "-a/b"]  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
def test_what_is_a_hub_id_is_decided_as_by_adapters(where):
    from models import lora as adapters

    assert C.hub_id(where) == bool(adapters.hub_id(where))


def test_kinds_and_last_checkpoints_are_those_of_adapters(tmp_path):
    from models import lora as adapters

    run = tmp_path / "run"
    for name in ("step-000002", "step-000010", ".step-000020", "step-new"):
        (run / "checkpoints" / name).mkdir(parents=True)
    assert C.last_step(run) == 10 and adapters.last_checkpoint(run).name == "step-000010"
    assert C.last_step(tmp_path) is None and adapters.last_checkpoint(tmp_path) is None
    layouts = {"peft": ("adapter_model.safetensors",), "diffusers": ("pytorch_lora_weights.safetensors",)}
    layouts["both"] = layouts["peft"] + layouts["diffusers"]
    for name, files in layouts.items():
        for file in files:
            write_safetensors(tmp_path / name / file, {"x.lora_A.weight": (2, 5), "x.lora_B.weight": (7, 2)})
        if name != "diffusers":
            (tmp_path / name / "adapter_config.json").write_text("{}")
    full_checkpoint(tmp_path / "full", SMALL)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "full" / "transformer" / "config.json").read_text())
    for name in (*layouts, "full", "bare"):
        found = C.expert(str(tmp_path / name), None, 4)
        assert found.kind == adapters.kind(tmp_path / name), name
        assert found.parameters == (24 if name in layouts else count(meta(SMALL).parameters())), name


# ------------------------------------------------------------------------------------------- a step's arithmetic
def work(line):
    return {(w.who, w.gradient): (w.forwards, w.rows) for w in C.forwards(parse(line))}


def test_the_default_distillation_is_hand_counted():
    # 3 groups of 24 = 72 rows in 9 micro-batches of 8, three of each task; 9 of 10 transitions train, guidance doubles
    assert C.groups(parse(FLOW)) == {"composition": 1, "text": 1, "quality": 1}
    assert C.rows_in_step(parse(FLOW)) == (72, 9, 8)
    assert work(FLOW) == {
        ("student", True): (9 * 9, 72 * 9 * 2),
        ("student", False): (9, 72 * 2),
        ("teachers", False): (6 * 9, 48 * 9 * 2),  # quality's rows are the anchor's
        ("anchor", False): (9 * 9, 72 * 9 * 2),
    }


def test_a_micro_batch_across_two_tasks_asks_both_teachers():
    s = "--prompts-per-step 4 --group-size 3 --micro-batch 5 --mar 0 --cfg 1 --num-steps 6 --window 1:4"
    # rows by task: 6, 3, 3; in fives: 5 | 1 + 3 + 1 | 2, so 1 + 3 + 1 teachers; 3 transitions train
    assert C.groups(parse(f"{FLOW} {s}")) == {"composition": 2, "text": 1, "quality": 1}
    assert work(f"{FLOW} {s}") == {
        ("student", True): (9, 36),
        ("student", False): (9, 36),
        ("teachers", False): (15, 36),
    }


def test_stored_trajectories_cost_one_more_forward_for_each_trained_state():
    for way in ("--estimator path", "--estimator sampled_path"):
        assert work(f"{FLOW} {way}")["student", False] == (9 * 10, 72 * 10 * 2)
        assert work(f"{FLOW} {way}")["student", True] == work(FLOW)["student", True]


def test_grpo_walks_without_gradient_and_never_spans_two_updates():
    s = "--stage grpo --rewards jpeg=1 --task text --prompts-per-step 6 --group-size 5 --updates 3 --micro-batch 4"
    # each update has 10 rows: 4 + 4 + 2, three forwards
    assert C.rows_in_step(parse(s)) == (30, 9, 4)
    walked, trained = (9 * 10, 30 * 10 * 2), (9 * 9, 30 * 9 * 2)
    assert work(s) == {("student", True): trained, ("student", False): walked, ("base", False): trained}
    assert ("base", False) not in work(f"{s} --beta 0")


def test_the_trained_transitions_follow_the_window_the_subset_and_the_estimator():
    def trained(line):
        return C.trained_steps(parse(f"{FLOW} {line}"))

    assert trained("") == 9 and trained("--window 2:5") == 3 and trained("--num-steps 4") == 4
    assert trained("--train-steps first") == 4 and trained("--train-steps random --train-count 6") == 6
    assert trained("--train-steps first --window 0:3") == 3
    assert trained("--estimator velocity --window 0:0") == 10, "the ODE needs no noise"


def test_flow_matching_sees_each_image_once_and_merging_nothing():
    assert work("--preset tiny --stage pretrain --batch-size 7 --micro-batch 3") == {("student", True): (3, 7)}
    sft = f"{FLOW} --stage sft --batch-size 9 --micro-batch"
    assert work(f"{sft} 0") == {("student", True): (3, 9)}, "a part for each of the three tasks"
    assert work(f"{sft} 2") == {("student", True): (3 * 2, 9)} and C.rows_in_step(parse(f"{sft} 7"))[2] == 7
    assert C.rows_in_step(parse(f"{sft} 0"))[2] == 9, "by chance all are of one task"
    assert work(f"{FLOW} --stage merge") == {}


def test_the_hybrid_asks_for_the_branches_one_after_the_other_and_learns_without_guidance():
    # 4 prompts x 12 = 48 rows in 12 micro-batches; 40 steps are walked, 8 are trained
    t2i = f"{EDITS} --stage grpo --task t2i --beta 0 --guidance"
    assert work(f"{t2i} rollout") == {("student", True): (96, 384), ("student", False): (12 * 40 * 2, 48 * 40 * 2)}
    assert work(f"{t2i} both") == {("student", True): (96, 768), ("student", False): (12 * 40, 48 * 40 * 2)}
    assert work(f"{t2i} neither") == {("student", True): (96, 384), ("student", False): (12 * 40, 48 * 40)}
    assert work(f"{t2i} rollout --beta 0.1")["base", False] == (96, 384), "the KL is one of policies without guidance"
    assert work(f"{t2i} rollout --cfg 1") == work(f"{t2i} neither")
    curate = f"{EDITS} --stage curate --guidance"
    assert work(f"{curate} rollout") == {("student", False): (12 * 40 * 2, 48 * 40 * 2)}
    assert work(f"{curate} both") == {("student", False): (12 * 40, 48 * 40 * 2)}


def test_the_forward_process_asks_its_old_policy_to_draw_and_again_at_each_trained_time():
    nft = f"{EDITS} --stage nft --task edit --guidance"
    visited = 96, 384
    assert work(f"{nft} rollout --beta 0") == {
        ("student", True): visited,
        ("old policy", False): (960 + 96, 3840 + 384),
    }
    assert work(f"{nft} both --beta 0.1") == {
        ("student", True): (96, 768),
        ("old policy", False): (480 + 96, 3840 + 768),
        ("base", False): (96, 768),
    }
    assert C.trained_steps(parse(f"{nft} both --window 0:2")) == 8, "any time may be trained"
    assert C.rows_in_step(parse(f"{nft} both --updates 4 --micro-batch 8")) == (48, 4 * 2, 8), "12 rows each: 8 + 4"


def test_mix_rl_joins_the_tasks_and_no_micro_batch_holds_both_kinds():
    mix = f"{EDITS} --stage grpo --task mix --prompts-per-step 5 --group-size 3"
    joint = parse(f"{mix} --mix joint")
    assert C.groups(joint) == {"t2i": 3, "edit": 2}
    assert C.micro_batches(joint) == [["t2i"] * 4, ["t2i"] * 4, ["t2i"], ["edit"] * 4, ["edit"] * 2]
    turns = parse(f"{mix} --mix turns")
    assert C.groups(turns) == {"the task whose turn it is": 5} and C.rows_in_step(turns) == (15, 4, 4)
    flow = parse(f"{FLOW} --stage grpo --rewards jpeg=1 --task mix --mix joint --micro-batch 100")
    assert C.groups(flow) == {"composition": 2, "text": 2, "quality": 2}
    assert C.rows_in_step(flow) == (144, 2, 72), "where nothing is edited, tasks share a forward; two updates"


def test_a_guided_teacher_and_a_student_without_guidance_are_hand_counted():
    opd = f"{EDITS} --stage opd --prompts-per-step 3 --group-size 2 --num-steps 10 --micro-batch 3 --train-steps all"
    # 4 rows of t2i and 2 of edit: 3 + 1 | 2; Q Eq. 14 is about every state of the ODE
    assert work(f"{opd} --guidance teacher") == {("student", True): (30, 60), ("teachers", False): (30, 120)}
    assert work(f"{opd} --guidance both") == {("student", True): (30, 120), ("teachers", False): (30, 120)}
    assert work(f"{opd} --guidance neither") == {("student", True): (30, 60), ("teachers", False): (30, 60)}
    some = work(f"{opd} --guidance teacher --train-steps random --train-count 7")
    assert some == {("student", True): (21, 42), ("student", False): (9, 18), ("teachers", False): (21, 84)}
    stored = work(f"{opd} --guidance teacher --mar 0.1 --anchor owner/a")
    assert stored["anchor", False] == (30, 120)


def test_pretraining_has_half_a_batch_of_edits_where_the_world_has_them():
    flow = "--stage pretrain --batch-size 7 --micro-batch 2"
    assert work(f"--preset tiny-qwen {flow}") == {("student", True): (2 + 2, 7)}  # 2 + 2 | 2 + 1
    assert work(f"--preset tiny-qwen {flow} --micro-batch 0") == {("student", True): (2, 7)}
    assert work(f"--preset tiny-qwen {flow} --tasks t2i --micro-batch 0") == {("student", True): (1, 7)}


BASE = "assets/tiny-qwen/base"
QWEN = "--preset tiny-qwen --prompts-per-step 4 --group-size 2 --num-steps 4 --window 0:3 --train-count 2"
REAL = [
    f"{TINY} --stage opd --prompts-per-step 4 --group-size 2 --micro-batch 3",
    f"{TINY} --stage opd --prompts-per-step 4 --group-size 2 --micro-batch 5 --estimator path --cfg 2 "
    "--anchor assets/tiny/teacher-text",
    f"{TINY} --stage grpo --task text --prompts-per-step 4 --group-size 3 --updates 2 --micro-batch 4 --beta 0.1",
    f"{QWEN} --stage grpo --task edit --updates 2 --micro-batch 3",
    f"{QWEN} --stage grpo --task mix --micro-batch 3 --guidance both --beta 0.1",
    f"{QWEN} --stage nft --task mix --micro-batch 3 --beta 0.1",
    f"{QWEN} --stage opd --prompts-per-step 3 --micro-batch 3 --teachers t2i={BASE} edit={BASE}",
]
NAMES = ["single pass", "path", "grpo", "hybrid", "mix", "nft", "two kinds"]


@pytest.mark.parametrize("line", REAL, ids=NAMES)
def test_a_real_step_makes_the_forwards_that_the_plan_foretells(line, tmp_path, monkeypatch):
    import torch

    import train
    from models import flow

    torch.set_num_threads(1)
    calls, rows, who = collections.Counter(), collections.Counter(), [None]
    use, forward = flow.FlowModel._use, flow.FlowModel._forward

    def watched_use(self, name):
        who[0] = name
        return use(self, name)

    def watched_forward(self, x, t, cond):
        silent = "old policy" if "--stage nft" in line else "student"  # its weights stand in the student's place
        student = "student" if torch.is_grad_enabled() else silent
        key = {"student": student, None: "base"}.get(who[0], who[0]), torch.is_grad_enabled()
        calls[key] += 1
        rows[key] += len(x)
        return forward(self, x, t, cond)

    monkeypatch.setattr(flow.FlowModel, "_use", watched_use)
    monkeypatch.setattr(flow.FlowModel, "_forward", watched_forward)
    argv = f"{line} --steps 1 --eval-prompts 0 --threads 1 --out {tmp_path}".split()
    assert train.main(argv) == 0
    s = parse(argv)
    teachers = [k for k in calls if k[0].startswith("teacher:")]
    shared = C.anchor_of(s).replace("teacher ", "teacher:")
    seen = {k: (calls[k], rows[k]) for k in calls if k not in teachers}
    if (shared, False) in teachers:
        seen["anchor", False] = calls[shared, False], rows[shared, False]
        teachers.remove((shared, False))
    if teachers:
        seen["teachers", False] = sum(calls[k] for k in teachers), sum(rows[k] for k in teachers)
    assert seen == work(argv)


# ------------------------------------------------------------------------------------------------------- memory
def memory(line, world=1, local=1):
    s = parse(line)
    base = C.base_of(s)
    experts = C.experts_of(s, base)
    init = C.expert(s.init, base, s.rank) if s.init else None
    return C.memory(s, base, experts, C.trained_parameters(s, base, init, experts), world, local)


LORA = 18_776_064


def test_the_default_distillations_memory_is_hand_added():
    found = memory(FLOW)
    row = 2 * (333 * 4096 + 2048)
    assert found.parts == {
        "frozen backbone": 2 * N, "trained weights": 4 * LORA, "averaged weights": 4 * LORA, "gradients": 4 * LORA,
        "Adam moments": 8 * LORA, "bfloat16 copies": 2 * LORA, "adapters": 3 * 4 * LORA,
        "text conditioning": 16 * row, "VAE": 4 * 84_000_000,
    }  # fmt: skip
    assert found.moments["encoding prompts"] == 2 * 5_570_000_000
    assert found.moments["exporting the average"] == 4 * LORA
    assert found.moments["decoding a picture"] == 4096 * 512**2 == GIB
    # 300 steps of 3 prompts, 8 test prompts of each of three tasks, and the empty one
    assert found.host == {"prompts": row * (900 + 24 + 1)}
    # Prompts are encoded before there are gradients, moments, copies and a batch's conditioning.
    early = 14 * LORA + 16 * row
    assert found.largest == "encoding prompts"
    assert found.total == sum(found.parts.values()) - early + found.moments["encoding prompts"]


QWEN_LORA = 480 * 2 * 64 * 3072


def test_a_distillation_of_two_kinds_is_hand_added():
    line = f"{EDITS} --stage opd --guidance teacher --steps 10 --eval-prompts 3 --parameters lora"
    found = memory([*line.split(), "--teachers", "t2i=owner/a", "edit=owner/b"])
    row, edit = 2 * 512 * 3584, 2 * (512 + 196) * 3584 + 4 * 16 * 64 * 64
    n = QWEN_LORA - 2 * 64 * 3072
    assert found.parts == {
        "frozen backbone": 2 * TWENTY, "trained weights": 4 * n, "averaged weights": 4 * n, "gradients": 4 * n,
        "Adam moments": 8 * n, "bfloat16 copies": 2 * n, "adapters": 2 * 4 * QWEN_LORA,
        "text conditioning": 4 * 2 * edit, "VAE": 4 * 127_000_000,
    }  # fmt: skip
    assert found.moments["encoding prompts"] == 2 * 8_290_000_000 + 4096 * 512**2, "beside a source in the VAE"
    assert found.moments["decoding a picture"] == 7168 * 512**2
    # of each kind 10 x 2 prompts and 3 test prompts, and an empty one; each edit has its own, with its picture
    empty = edit - row
    assert found.host == {"prompts": (23 + 1) * row + 23 * (edit + empty)}
    inputs = 60 * 4 * 3072 * (2048 + 708) * 2
    assert found.moments["training step"] == inputs + 4 * 3072 * (2048 + 708) * 41, "a student without guidance"
    assert found.moments["forward without gradient"] == 8 * 3072 * (2048 + 708) * 41, "teachers with it"
    alone = memory([*line.split(), "--teachers", "t2i=owner/a", "--tasks", "t2i"])
    assert alone.moments["training step"] == (60 * 2 + 41) * 4 * 3072 * (1024 + 512)
    assert alone.moments["encoding prompts"] == 2 * 8_290_000_000 and alone.host == {"prompts": (40 + 3 + 1) * row}


def test_what_the_forward_process_keeps_beside_the_student():
    grpo, nft = (memory(f"{EDITS} --stage {stage} --task edit --beta 0") for stage in ("grpo", "nft"))
    weights = nft.parts["trained weights"]
    assert nft.parts["old policy"] == weights and "old policy" not in grpo.parts
    more = nft.moments["forward without gradient"] - grpo.moments["forward without gradient"]
    assert more == weights, "while the old policy's stand in its place, the student's weights wait"
    latent = 4 * 16 * 64 * 64
    assert grpo.parts["trajectories"] == 48 * 121 * latent
    assert nft.parts["trajectories"] == 48 * 4 * latent, "the last transition alone"
    assert memory(f"{EDITS} --stage grpo --task edit --overlap").parts["trajectories"] == 2 * 48 * 121 * latent
    full = f"{EDITS} --stage nft --task edit --parameters full --parallel fsdp"
    assert "frozen backbone" not in memory(f"{full} --beta 0", 16, 8).parts
    kept = memory(f"{full} --beta 0.1", 16, 8).parts
    assert kept["frozen backbone"] == 2 * TWENTY, "the other side of Q Eq. 9's distance"
    assert kept["old policy"] == 4 * (TWENTY - Z.unread_parameters(Z.QWEN_IMAGE)) // 16


def test_a_hybrid_forward_is_half_as_large_as_a_guided_one():
    def silent(guidance):
        line = f"{EDITS} --stage grpo --task t2i --beta 0 --eval-prompts 0 --guidance {guidance}"
        return memory(line).moments["forward without gradient"]

    assert 2 * silent("rollout") == 2 * silent("neither") == silent("both") == 8 * 3072 * (1024 + 512) * 41


def test_a_teacher_of_t2i_meets_edits_in_the_final_evaluation_only():
    found = memory(f"{EDITS} --stage grpo --task t2i --beta 0 --eval-prompts 4 --guidance both")
    assert found.moments["training step"] == (60 * 2 + 41) * 8 * 3072 * (1024 + 512)
    assert found.moments["forward without gradient"] == 8 * 3072 * (2048 + 708) * 41
    assert found.moments["encoding prompts"] > 2 * Z.QWEN_VL_7B, "test edits have sources"


def test_judges_on_this_machine_are_counted_once_a_checkpoint_and_type(tmp_path):
    from scorers import rubrics as judges

    asked = {name: rubric.model for name, rubric in judges.RUBRICS.items() if name not in ("unifiedreward", "deqa")}
    assert {name: C.judge({"rubric": name}).model for name in asked} == asked, "the others cannot be asked here"
    assert set(asked.values()) == set(C.JUDGES)
    write_safetensors(tmp_path / "own" / "model.safetensors", {"a": (3, 5)})
    vlm = {"kind": "vlm", "rubric": "alignment"}
    scorers = {
        "a": vlm, "again": {**vlm, "rubric": "aesthetic"},
        "b": {**vlm, "rubric": "portrait", "dtype": "bfloat16"}, "c": {**vlm, "device": "cpu"},
        "d": {**vlm, "model": str(tmp_path / "own")}, "e": {**vlm, "model": "owner/judge"},
        "f": {"kind": "judge", "rubric": "alignment", "model": "x", "endpoints": ["http://a:1"]},
    }  # fmt: skip
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"scorers": scorers, "weights": {"default": dict.fromkeys(scorers, 1)}}))
    line = f"{EDITS} --stage nft --task t2i --rewards {file}"
    assert memory(line).parts["judges"] == (4 + 2) * Z.QWEN_VL_7B + 4 * 15
    found = lines(line)["judge"]
    whole = "a: Qwen/Qwen2.5-VL-7B-Instruct, 8.29 billion parameters, float32, on the run's own accelerator"
    assert found[0] == f"{whole}, 30.88 GiB a rank"
    assert found[2].endswith("bfloat16, on the run's own accelerator, 15.44 GiB a rank")
    assert found[3].endswith("on cpu, not counted") and "of unknown size" in found[5] and len(found) == 6
    assert "judges" not in memory(f"{EDITS} --stage opd --rewards {file}").parts, "a distillation asks nobody"
    worst = P.verdict(parse(line), 99 * GIB)
    assert "judges in bfloat16" in worst and "judges behind endpoints" in worst
    assert "judges" not in P.verdict(parse(f"{EDITS} --stage nft --task t2i --rewards jpeg"), 99 * GIB)


def test_a_full_student_is_sharded_over_all_ranks_or_those_of_a_node():
    full = f"{FLOW} --parameters full"
    for parallel, shards in (("ddp", 1), ("fsdp", 16), ("hsdp", 8)):
        parts = memory(f"{full} --parallel {parallel}", 16, 8).parts
        assert parts["frozen backbone"] == 2 * N, "the teachers are LoRAs"
        assert parts["trained weights"] == parts["gradients"] == parts["averaged weights"] == 4 * N // shards
        assert parts["Adam moments"] == 8 * N // shards
    assert memory(f"{full} --parallel ddp", 16, 8).parts["bfloat16 copies"] == 2 * N
    gathered = memory(f"{full} --parallel fsdp", 16, 8).parts
    assert "bfloat16 copies" not in gathered
    assert gathered["gathered blocks"] == 2 * 2 * Z.block_parameters(Z.SD35_MEDIUM, 0)


def test_a_full_student_keeps_the_base_only_for_those_who_need_it(tmp_path):
    teachers = [f"{t}={full_checkpoint(tmp_path / t)}" for t in S.FLOW_TASKS]
    alone = [*FLOW.split(), "--parameters", "full", "--teachers", *teachers]
    assert "frozen backbone" not in memory(alone).parts
    assert "frozen backbone" in memory([*alone, "--anchor", "jieliu/SD3.5M-FlowGRPO-Text"]).parts
    grpo = f"--stage grpo --rewards jpeg=1 --model {HUB} --parameters full"
    assert memory(grpo).parts["frozen backbone"] == 2 * N
    assert "frozen backbone" not in memory(f"{grpo} --beta 0").parts


def test_full_teachers_wait_in_host_memory_and_come_for_their_own_and_the_next_micro_batch(tmp_path):
    teachers = [f"{t}={full_checkpoint(tmp_path / t)}" for t in S.FLOW_TASKS]
    given = [*FLOW.split(), "--teachers", *teachers]
    apart = memory([*given, "--mar", "0"])  # micro-batches of 8 in groups of 24: one task, and the next
    assert apart.parts["full experts"] == 2 * (2 * N) and apart.host["full experts"] == 3 * (2 * N)
    assert "adapters" not in apart.parts
    assert memory(given).parts["full experts"] == 3 * (2 * N), "the anchor, quality's teacher, stays beside two others"
    together = memory([*given, "--mar", "0", "--micro-batch", "0"])
    assert together.parts["full experts"] == 3 * (2 * N), "one micro-batch with all tasks needs all teachers"
    lone = memory([*given, "--mar", "0", "--tasks", "text"])
    assert lone.parts["full experts"] == 2 * N and lone.host["full experts"] == 3 * (2 * N)
    sft = memory([*given, "--stage", "sft"])
    assert sft.parts["full experts"] == 2 * N, "one after the other"


def test_trajectories_wait_for_grpos_reward_and_for_path_credit_only():
    latent = 4 * 16 * 64 * 64
    grpo = memory(f"--stage grpo --rewards jpeg=1 --model {HUB}")
    assert grpo.parts["trajectories"] == 144 * 31 * latent
    assert memory(f"{FLOW} --estimator path").parts["trajectories"] == 8 * (5 * 9 + 1) * latent
    assert memory(f"{FLOW} --estimator path --mar 0").parts["trajectories"] == 8 * (4 * 9 + 1) * latent
    assert "trajectories" not in memory(FLOW).parts and "trajectories" not in memory(f"{FLOW} --stage sft").parts


def test_prompts_are_kept_once_each_however_long_the_run(tmp_path):
    def prompts(line):
        return C.distinct_prompts(parse(line))

    assert prompts(f"{FLOW} --eval-prompts 0 --cfg 1") == 900
    assert prompts(f"{FLOW} --eval-prompts 0 --cfg 2") == 901, "the empty prompt of guidance"
    assert prompts(f"{FLOW} --eval-prompts 0 --cfg 1 --train-prompts 10") == 3 * 10
    own = tmp_path / "own.txt"
    own.write_text('say "a"\n\nsay "b"\n')
    assert prompts(f"{FLOW} --eval-prompts 0 --cfg 1 --train-prompts 10 --prompts text={own}") == 2 + 2 * 10
    (tmp_path / "train.txt").write_text("a\nb\nc\n")
    assert prompts(f"{FLOW} --eval-prompts 0 --cfg 1 --train-prompts 10 --prompts quality={tmp_path}") == 3 + 2 * 10
    grpo = "--stage grpo --rewards jpeg=1 --eval-prompts 0 --cfg 1 --train-prompts 10"
    assert prompts(f"{grpo} --task text") == 10 and prompts(f"{grpo} --task mix") == 30
    assert prompts(f"{FLOW} --stage sft --eval-prompts 0 --cfg 1 --sft-images 33") == 33
    assert prompts(f"{FLOW} --stage merge --eval-prompts 0 --cfg 1") == 0


def test_edits_are_kept_apart_from_prompts_without_a_source(tmp_path):
    def prompts(line):
        s = parse(line)
        return C.distinct_prompts(s), C.distinct_prompts(s, edits=True)

    many = f"{EDITS} --steps 5 --eval-prompts 0 --train-prompts 1000"
    opd = f"{many} --stage opd --prompts-per-step 3"
    assert prompts(f"{opd} --guidance teacher") == (5 * 2 + 1, 5 * 1), "an edit's empty prompt is its own"
    assert prompts(f"{opd} --guidance neither") == (5 * 2, 5 * 1), "nobody asks for the empty prompt"
    assert prompts(f"{opd} --guidance neither --eval-prompts 7") == (5 * 2 + 7, 5 * 1 + 7)
    assert prompts(f"{many} --stage nft --task edit") == (0, 20)
    assert prompts(f"{many} --stage grpo --task t2i --eval-prompts 7") == (20 + 7 + 1, 7)
    assert prompts(f"{many} --stage grpo --task mix --mix joint") == (10 + 1, 10)
    assert prompts(f"{many} --stage grpo --task mix --mix turns") == (20 + 1, 20), "at most"
    own = tmp_path / "own.jsonl"
    own.write_text("{}\n{}\n")
    assert prompts(f"{many} --stage nft --task edit --prompts edit={own}") == (0, 2)
    assert prompts(f"{many} --stage curate --train-prompts 9 --guidance both --prompts edit={own}") == (9 + 1, 2)


def test_a_merge_has_no_gradients_and_cat_adds_the_ranks_up():
    merged = memory(f"{FLOW} --stage merge")
    assert merged.parts["trained weights"] == 4 * LORA and "gradients" not in merged.parts
    assert "training step" not in merged.moments and "adapters" not in merged.parts
    assert memory(f"{FLOW} --stage merge --merge-method cat").parts["trained weights"] == 3 * 4 * LORA


def test_a_student_begun_from_an_adapter_has_that_adapters_size():
    shipped = C.expert("assets/tiny/teacher-text", None, 3)
    assert memory(f"{TINY} --init assets/tiny/teacher-text").parts["trained weights"] == 4 * shipped.parameters
    assert memory(f"{TINY} --rank 3").parts["trained weights"] == 4 * 3 * 2 * 96 * (8 * 3 - 1)


def keeps(base, rows, *given, edit=False, **more):
    """`sizes.activations` of a base's own tokens."""
    return Z.activations(base.config, *base.tokens(edit), rows, *given, **more)


def small_model(trained, b, **change):
    """A small transformer as the runs use it, its LoRA float32 on a frozen bfloat16 or float32 base."""
    import torch
    from diffusers import SD3Transformer2DModel

    from models import lora as adapters

    heads = {"num_attention_heads": 6, "attention_head_dim": 32, "caption_projection_dim": 192}
    config = SMALL | heads | {"pos_embed_max_size": 16, "sample_size": 32} | change
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**config)
    if trained == "lora":
        model.requires_grad_(False)
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16 if b == 2 else torch.float32)
        model.add_adapter(adapters.lora_config(4, 4.0))
        for name, p in model.named_parameters():
            p.data = p.data.float() if ".lora_" in name else p.data
    return model, C.Base("", config, 0, 0, 20, 32)


def small_qwen(trained, b, **change):
    """The same of Qwen-Image's architecture, with a smaller source beside each picture."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    from models import lora as adapters

    config = SMALL_QWEN | {"num_attention_heads": 6, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)} | change
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**{k: v for k, v in config.items() if k != "_class_name"})
    if trained == "lora":
        model.requires_grad_(False)
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16 if b == 2 else torch.float32)
        model.add_adapter(adapters.lora_config(4, 4.0))
        for name, p in model.named_parameters():
            p.data = p.data.float() if ".lora_" in name else p.data
    return model, C.Base("", config, 0, 0, 14, 32, source=20, picture=6)


def run_qwen(model, b, rows):
    """16 x 16 image tokens, 10 x 10 of the source, 20 of the text, some of them padding."""
    import torch

    mask = torch.ones(rows, 20, dtype=torch.bool)
    mask[0, 17:] = False
    with torch.autocast("cpu", torch.bfloat16, enabled=b == 2):
        model(
            hidden_states=torch.randn(rows, 356, 12), encoder_hidden_states=torch.randn(rows, 20, 40),
            encoder_hidden_states_mask=mask, timestep=torch.full((rows,), 0.5),
            img_shapes=[[(1, 16, 16), (1, 10, 10)]] * rows, return_dict=False,
        )  # fmt: skip


def run_small(model, b, rows):
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=b == 2):
        model(
            hidden_states=torch.randn(rows, 4, 32, 32), encoder_hidden_states=torch.randn(rows, 20, 40),
            pooled_projections=torch.randn(rows, 28), timestep=torch.full((rows,), 500.0),
        )  # fmt: skip


KINDS = [{"dual_attention_layers": ()}, {"qk_norm": None, "dual_attention_layers": (0, 1, 2)},
         {"dual_attention_layers": (0, 1, 2)}]  # fmt: skip


@pytest.mark.parametrize("b", [2, 4])
@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("change", KINDS, ids=["norm", "dual", "both"])
def test_the_activations_are_within_a_quarter_of_what_autograd_keeps(trained, b, change):
    model, base = small_model(trained, b, num_layers=3, **change)
    assert 0.75 < keeps(base, 2, trained, b) / kept_by_autograd(model, run_small, b) < 1.25


@pytest.mark.parametrize("b", [2, 4])
@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("change", [{}, {"zero_cond_t": True}], ids=["", "modulated source"])
def test_the_activations_of_qwen_image_are_within_a_tenth_of_what_autograd_keeps(trained, b, change):
    model, base = small_qwen(trained, b, num_layers=3, **change)
    assert base.tokens(edit=True) == (356, 20)
    measured = kept_by_autograd(model, run_qwen, b)
    assert 0.9 < keeps(base, 2, trained, b, edit=True) / measured < 1.1
    assert keeps(base, 2, trained, b) / measured < 0.8, "without its source it is not the same forward"


def kept_by_autograd(model, run, b):
    """Bytes that a forward of two rows leaves for backward, autocast's copies of float32 weights not counted."""
    import torch

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}  # storage -> bytes; holding the tensor keeps its address from being used again

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model, b, rows=2)
    copies = 2 * count(p for p in model.parameters() if p.requires_grad) if b == 2 else 0
    return sum(size for _, size in kept.values()) - copies


@pytest.mark.parametrize("b", [2, 4])
def test_checkpointing_keeps_the_inputs_of_the_blocks_and_one_block(b):
    model, base = small_model("lora", b, num_layers=3)
    sizes, streams = [], ("hidden_states", "encoder_hidden_states")
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(
            lambda _, args, given: sizes.append(sum(given[k].nbytes for k in streams)), with_kwargs=True
        )
    run_small(model, b, rows=2)
    inputs = keeps(base, 2, "lora", b, checkpointing=True) - keeps(base, 2, "lora", b, gradient=False)
    assert inputs == sum(sizes) == 3 * 2 * (256 + 20) * 192 * b


@pytest.mark.parametrize("b", [2, 4])
def test_checkpointing_keeps_the_inputs_of_qwen_images_blocks_too(b):
    model, base = small_qwen("lora", b, num_layers=3)
    sizes, streams = [], ("hidden_states", "encoder_hidden_states")
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(
            lambda _, args, given: sizes.append(sum(given[k].nbytes for k in streams)), with_kwargs=True
        )
    run_qwen(model, b, rows=2)
    more = {"edit": True}
    inputs = keeps(base, 2, "lora", b, checkpointing=True, **more) - keeps(base, 2, "lora", b, gradient=False, **more)
    assert inputs == sum(sizes) == 3 * 2 * (356 + 20) * 192 * b


def test_activations_grow_with_rows_and_blocks_and_shrink_with_checkpointing():
    base = C.base_of(parse(FLOW))
    one = keeps(base, 1, "lora", 2)
    assert keeps(base, 3, "lora", 2) == 3 * one
    assert keeps(base, 1, "lora", 2, checkpointing=True) < one / 5
    assert keeps(base, 1, "full", 2) > one > keeps(base, 1, "lora", 2, gradient=False)


@pytest.mark.parametrize(
    ("gib", "sentence"),
    [(21.8, "fits one 24 GiB accelerator"), (21.9, "needs more than 24 GiB"), (72.7, "one 80 GiB accelerator a rank"),
     (72.8, "needs more than 80 GiB a rank")],
)  # fmt: skip
def test_a_verdict_leaves_a_tenth_to_spare(gib, sentence):
    assert sentence in P.verdict(parse(FLOW), gib * GIB)


def test_the_verdict_names_only_what_would_help():
    assert P.verdict(parse(FLOW), 99 * GIB).endswith("try --micro-batch 1 or a smaller --resolution")
    worst = P.verdict(parse(f"{FLOW} --no-gradient-checkpointing --precision float32 --parameters full"), 99 * GIB)
    for way in ("--gradient-checkpointing", "--precision bfloat16", "--parameters lora", "--parallel fsdp"):
        assert way in worst


# ------------------------------------------------------------------------------------------------ the whole plan
GRPO = f"--stage grpo --task text --rewards jpeg=1 --model {HUB}"
EDIT, NFT = f"{EDITS} --stage grpo --task edit --beta 0.1", f"{EDITS} --stage nft --task edit"
# (the plan before, what is added, labels whose lines must change); all others but "run" must stay as they are.
MOVES = [
    (FLOW, "--seed 5", ""),
    (FLOW, "--lr 0.5", ""),
    (FLOW, "--rank 8", "student trained teacher memory moment checkpoints"),
    (FLOW, "--alpha 8", "student"),
    (FLOW, "--steps 7", "batch host"),
    (FLOW, "--group-size 12", "batch forwards"),
    (FLOW, "--prompts-per-step 4", "batch groups forwards host"),
    (FLOW, "--micro-batch 4", "batch forwards memory moment"),
    (FLOW, "--cfg 1", "guidance forwards drawing memory moment"),
    (FLOW, "--num-steps 12", "rollout forwards"),
    (FLOW, "--window 0:4", "rollout forwards"),
    (FLOW, "--noise-level 0.5", "rollout"),
    (FLOW, "--train-steps first", "rollout forwards"),
    (FLOW, "--estimator path", "objective forwards memory"),
    (FLOW, "--estimator sampled", "objective"),
    (FLOW, "--mar 0.5", "objective"),
    (FLOW, "--mar 0", "objective forwards anchor"),
    (FLOW, "--anchor owner/anchor", "forwards anchor memory"),
    (FLOW, "--tasks text,quality", "groups drawing host"),  # as many rows have a teacher beside the anchor
    (FLOW, "--precision float32", "memory moment host"),
    (FLOW, "--no-gradient-checkpointing", "memory moment"),
    (FLOW, "--parameters full", "student trained memory moment checkpoints"),
    (FLOW, "--resolution 1024", "transformer memory moment"),
    (FLOW, "--text-length 100", "transformer memory moment host"),
    (FLOW, "--train-prompts 10", "host"),
    (FLOW, "--eval-prompts 0", "drawing memory moment host"),
    (FLOW, "--eval-steps 20", "drawing"),
    (FLOW, "--save-every 7", "checkpoints"),
    (FLOW, "--keep 3", "checkpoints"),
    (FLOW, "--wandb", "writes"),
    (FLOW, "--name other", "writes checkpoints"),
    (FLOW, "--model owner/other", "model"),
    (FLOW, "--init owner/start", "student"),
    (GRPO, "--beta 0", "objective forwards"),
    (GRPO, "--updates 3", "objective"),
    (GRPO, "--rewards jpeg=2", "reward"),
    (GRPO, "--rewards ocr", "reward scorer"),
    (GRPO, "--combine normalised", ""),  # of a single reward
    (f"{GRPO} --rewards jpeg,ocr=2", "--combine normalised", "reward"),
    (GRPO, "--overlap", "memory"),  # two steps' trajectories wait
    (GRPO, "--on-reward-failure drop", ""),
    (GRPO, "--kernel cps --beta 0", "objective forwards rollout"),
    (GRPO, "--task mix", "groups tasks writes checkpoints"),
    (f"{GRPO} --task mix", "--mix joint", "groups tasks"),
    (EDIT, "--guidance both", "guidance forwards moment"),  # not the largest
    (EDIT, "--guidance neither", "guidance forwards drawing memory moment host"),
    (EDIT, "--no-cfg-rescale", "guidance"),
    (EDIT, "--source-resolution 256", "transformer memory moment host"),
    (EDIT, "--text-length 300", "transformer memory moment host"),
    (EDIT, "--stage nft", "objective rollout forwards memory moment writes checkpoints"),
    (EDIT, "--task t2i", "groups reward scorer judge memory moment host writes checkpoints"),
    (NFT, "--interpolation 0.5", "objective"),
    (NFT, "--window 0:3", ""),
    (NFT, "--train-count 5", "rollout forwards"),
    (NFT, "--noise-level 0.1", ""),
    (NFT, "--beta 0", "objective forwards"),
    (f"{EDITS} --stage opd", "--guidance both", "guidance forwards drawing moment"),
    (f"{FLOW} --stage sft", "--batch-size 12", "batch forwards memory"),
    (f"{FLOW} --stage sft", "--sft-images 99", "drawing host"),
    (f"{FLOW} --stage merge", "--merge-method cat", "student trained memory moment checkpoints"),
    (f"{TINY} --stage pretrain", "--batch-size 32", "batch forwards memory moment"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "added", "labels"), MOVES, ids=[f"{b[-12:]} {a}" for b, a, _ in MOVES])
def test_every_number_moves_with_its_flag_and_with_no_other(before, added, labels):
    old, new = lines(before), lines(f"{before} {added}")
    changed = {label.split()[0] for label in old | new if old.get(label) != new.get(label)} - {"run"}
    assert changed == set(labels.split())


def test_every_number_of_ranks_shows_where_ranks_count():
    one, many = lines(FLOW), lines(FLOW, world=16, local=8)
    assert many["batch"] == ["ranks 16 x prompts 3 x group 24 = trajectories 1,152 a step, 345,600 in 300 steps; "
                             "9 micro-batches a rank of at most 8"]  # fmt: skip
    assert one["memory"] == many["memory"], "a LoRA is not sharded"
    assert many["host memory"][0].endswith("2.35 GiB a rank, 18.83 GiB a node")
    full = f"{FLOW} --parameters full --parallel fsdp"
    assert "trained weights: 8.36 GiB" in lines(full)["memory"]
    assert "trained weights: 1.04 GiB" in lines(full, world=8, local=4)["memory"]
    assert "trained weights: 2.09 GiB" in lines(full.replace("fsdp", "hsdp"), world=8, local=4)["memory"]


def test_torchruns_ranks_are_read_from_its_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert P.describe(parse(FLOW)) == P.describe(parse(FLOW), 6, 2) != P.describe(parse(FLOW), 6, 3)


def test_the_shipped_tiny_plan_needs_no_text_encoder_no_vae_and_little_memory():
    found = lines(TINY)
    shape = "0.001 billion parameters (973,104), 3 blocks, 3 heads of 32; 36 image and 12 text tokens"
    assert found["transformer"] == [shape]
    assert found["teacher text"] == ["assets/tiny/teacher-text: a LoRA in PEFT's layout, 70,656 parameters"]
    assert not any("encoding" in line or "decoding" in line for line in found["moment"])
    assert "host memory" not in found and not any("VAE" in line for line in found["memory"])
    assert found["memory"][-1].endswith("fits one 24 GiB accelerator") and "MiB" in found["memory"][-1]
    new = lines(f"{TINY} --stage pretrain")
    assert new["trained"] == ["978,384 parameters"], "the text encoder's 5,280 with them"
    assert lines(f"{TINY} --precision bfloat16 --gradient-checkpointing") == found, "it is float32 in any case"


def test_the_shipped_models_counts_are_those_of_the_loaded_model():
    from models import load as models

    model = models.load_tiny(ROOT / "assets/tiny/base")
    base = C.base_of(parse(TINY))
    assert base.parameters == count(model.transformer.parameters())
    assert base.encoders == count(model.text_encoder.parameters())
    assert (base.text, base.side) == (len(model.text_encoder.place.weight), model.latent_shape[1])


def test_a_local_pipeline_is_read_from_its_own_files(tmp_path):
    folder = full_checkpoint(tmp_path / "sd", SMALL)
    write_safetensors(folder / "text_encoder" / "model.safetensors", {"a": (3, 5)})
    write_safetensors(folder / "text_encoder_2" / "model.safetensors", {"a": (7,), "b": ()})
    write_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", {"a": (2, 2, 2)})
    base = C.base_of(parse(f"--model {folder} --resolution 96"))
    assert (base.encoders, base.vae, base.side, base.tokens()) == (23, 8, 12, (36, 77 + 256))
    assert base.parameters == Z.transformer_parameters(SMALL)
    run = tmp_path / "run"
    full_checkpoint(run / "checkpoints" / "step-000004", SMALL | {"num_layers": 5})
    full_checkpoint(run / "checkpoints" / "step-000003", SMALL | {"num_layers": 3})
    last = C.base_of(parse(f"--model {run}"))
    assert last.config["num_layers"] == 5, "a run stands for its last checkpoint"


def test_a_run_is_new_or_continues_from_its_last_checkpoint(tmp_path):
    def standing(line=""):
        return lines(f"{FLOW} --name mine --out {tmp_path} {line}")["run"]

    folder = tmp_path / "mine"
    assert standing() == [f"{folder}: new"]
    folder.mkdir()
    assert standing() == [f"{folder}: exists without a checkpoint, starts at step 0"]
    for step in ("step-000050", "step-000150", ".step-000200"):
        (folder / "checkpoints" / step).mkdir(parents=True)
    assert standing() == [f"{folder}: exists, continues from step 150"]
    assert standing("--no-resume") == [f"{folder}: exists, --no-resume removes it first"]
    assert standing("--stage merge") == [f"{folder}: exists, is written anew"]


def test_a_plan_of_several_runs_names_each():
    name = "{}: new".format
    each = [name(f"none/g-{t}") for t in S.FLOW_TASKS]
    for stage in ("grpo", "nft"):
        assert lines(f"--stage {stage} --rewards jpeg=1 --name g --out none")["run"] == each
    parts = ["pretrain", *(f"grpo-{t}" for t in S.FLOW_TASKS), "merge", "sft", "opd"]
    tiny = lines(f"{TINY} --stage all --name a --out none")
    assert tiny["run"] == [*(name(f"none/a-{p}") for p in parts), name("none/a")]
    assert "numbers" in tiny and "memory" not in tiny
    flow = lines(f"{FLOW} --stage all --name a --out none")["run"]
    assert flow == [name(f"none/a-{p}") for p in parts[4:]] + [name("none/a")]


def test_what_is_paid_and_by_whom_is_told_with_every_option(tmp_path):
    file = tmp_path / "r.json"
    judge = {"kind": "judge", "rubric": "alignment", "model": "vlm", "endpoints": ["http://a:1", "http://b:2"]}
    weights = {"counting": {"geneval": 0.8, "far": -0.2}, "default": {"far": 1}}
    file.write_text(json.dumps({"scorers": {"far": judge}, "weights": weights, "watch": ["jpeg"]}))
    found = lines(f"--stage grpo --task mix --model {HUB} --rewards {file} --combine normalised")
    assert found["reward"] == ["counting: 0.8 geneval + -0.2 far, normalised", "default: 1 far"]
    assert found["scorer"] == [
        "far: kind judge, rubric alignment, model vlm, endpoints ['http://a:1', 'http://b:2']",
        "geneval: kind geneval",
        "jpeg: kind jpeg, only watched",
    ]
    assert lines(f"--stage curate --model {HUB} --rewards {file}")["scorer"] == found["scorer"]
    assert not {"reward", "scorer"} & set(lines(f"{FLOW} --rewards {file}")), "opd asks nobody"


def test_without_rewards_the_plan_shows_those_of_the_tasks_that_are_drawn():
    assert lines(f"{TINY} --stage grpo --task quality")["reward"] == ["quality: 0.4 quality + 0.6 preference, sum"]
    mix = lines(f"--stage grpo --task mix --model {HUB}")
    assert mix["reward"] == ["composition: 1 geneval", "text: 1 ocr", "quality: 1 pickscore"]
    assert mix["scorer"] == ["geneval: kind geneval", "ocr: kind ocr", "pickscore: kind pickscore"]
    assert lines(f"--stage curate --tasks text --model {HUB}")["reward"] == ["text: 1 ocr"]


def test_the_guidance_strategy_is_told_in_words():
    def told(line):
        return lines(line)["guidance"]

    assert told(FLOW) == ["4.5 of the teachers and of the student"]
    grpo = f"{EDITS} --stage grpo --task t2i --no-cfg-rescale --guidance"
    assert told(f"{grpo} rollout") == ["4 in the rollout, none in the objective, the branches one after the other"]
    assert told(f"{grpo} both") == ["4 in the rollout and in the objective"]
    for way in ("neither --cfg-rescale", "both --cfg 1"):
        assert told(f"{grpo} {way}") == ["none in the rollout and in the objective"]
    opd = f"{EDITS} --stage opd --guidance teacher"
    assert told(opd) == ["4 of the teachers, none of the student, rescaled to the norm with the prompt"]
    assert told(f"{EDITS} --stage curate --guidance both --no-cfg-rescale") == ["4 in the rollout"]
    assert "guidance" not in lines(f"{FLOW} --stage sft")


def test_the_forward_process_and_mix_rl_are_told_in_words():
    nft = lines(f"{EDITS} --stage nft --task mix --mix joint --beta 0.001 --interpolation 0.5")
    assert nft["objective"] == ["DiffusionNFT, strength 0.5, distance to the base 0.001, 1 updates a step"]
    assert nft["rollout"] == ["40 steps, an ODE, 8 trained (random)"]
    assert nft["tasks"] == ["t2i, edit, in every step (Q 4.3's Mix-RL)"]
    assert nft["groups"] == ["a rank: 2 of t2i, 2 of edit"]
    assert {line.split(":")[0] for line in nft["reward"]} == {"t2i", "portrait", "typography", "edit"}
    assert nft["transformer"][0].endswith("1024 image and 512 text tokens; an edit: 2048 and 708")
    assert lines(f"{EDITS} --stage grpo --task mix --mix turns")["tasks"] == ["t2i, edit, in turns (F's GRPO-mix)"]


def test_qs_own_pipeline_trains_a_teacher_a_task_and_distils_them():
    name = "{}: new".format
    parts = ["grpo-t2i", "grpo-edit", "opd"]
    big = lines(f"{EDITS} --stage all --name a --out none")["run"]
    assert big == [*(name(f"none/a-{p}") for p in parts), name("none/a")]
    tiny = lines("--preset tiny-qwen --stage all --name a --out none")["run"]
    assert tiny == [*(name(f"none/a-{p}") for p in ["pretrain", *parts]), name("none/a")]


def test_the_plan_for_eight_accelerators_says_what_fits_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    line = f"{EDITS} --stage opd --teachers t2i=owner/a edit=owner/b"
    opd = lines(line)
    assert opd["memory"][0] == "frozen backbone: 38.05 GiB"
    assert opd["memory"][-1].endswith("one 80 GiB accelerator a rank")
    assert opd["batch"][0].startswith("ranks 8 x prompts 4 x group 12 = trajectories 384 a step")
    full = lines(f"{line} --parameters full --parallel fsdp")
    assert "more than 80 GiB a rank" in full["memory"][-1] and "--parameters lora" in full["memory"][-1]
    far = lines(f"{EDITS} --stage grpo --task t2i --rewards jpeg")
    assert far["memory"][-1].endswith("one 80 GiB accelerator a rank"), "without a judge beside it"


def test_the_tiny_qwen_world_is_read_from_its_own_files():
    from models import load as models

    model = models.load_tiny(ROOT / BASE)
    base = C.base_of(parse("--preset tiny-qwen"))
    assert base.parameters == count(model.transformer.parameters())
    assert base.encoders == count(model.text_encoder.parameters())
    assert (base.text, base.side, base.source) == (len(model.text_encoder.place.weight), *model.latent_shape[1:])
    assert base.tokens() == (36, base.text) and base.tokens(edit=True) == (72, base.text)
    assert base.latent == math.prod(model.latent_shape)
    new = lines("--preset tiny-qwen --stage pretrain")
    trained = count(model.trainable().values())  # before there is a student: all that is read, the text encoder too
    assert new["trained"] == [f"{trained:,} parameters"] and trained < base.parameters + base.encoders


def test_a_local_qwen_image_is_read_from_its_own_files(tmp_path):
    folder = full_checkpoint(tmp_path / "q", SMALL_QWEN)
    write_safetensors(folder / "text_encoder" / "model-00001.safetensors", {"a": (3, 5)})
    write_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", {"a": (2, 2, 2)})
    base = C.base_of(parse(f"--preset qwen-rl --model {folder} --resolution 96 --text-length 40 --stage opd"))
    assert (base.encoders, base.vae, base.tokens(), base.tokens(edit=True)) == (15, 8, (36, 40), (72, 236))
    assert base.parameters == count(meta(SMALL_QWEN).parameters()) and base.note == "Qwen-Image in a folder"
    found = C.expert(str(folder), base, 4)
    assert (found.kind, found.unread) == ("full", Z.unread_parameters(SMALL_QWEN)) and found.unread > 0


def test_an_evaluation_shows_students_and_teachers_each_with_its_own_guidance():
    names = "--compare one=owner/c two=owner/d --teachers t2i=owner/a edit=owner/b"
    line = f"{EDITS} {names} --eval-prompts 3 --eval-steps 10 --guidance teacher"
    shown = P.describe(parse(line, prog="eval.py"), prog="eval.py")
    # of two tasks 3 each: base and two teachers with guidance, two students without
    assert f"in the end: {5 * 6} test pictures, {6 * 10 * (3 * 2 + 2 * 1):,} rows" in shown
    drawn = lines(f"{EDITS} --stage opd --eval-prompts 3 --eval-steps 10 --guidance teacher")["drawing"]
    assert drawn == ["in the end: 6 test pictures, 60 rows"]


def test_nothing_is_written(tmp_path):
    lines(f"{FLOW} --out {tmp_path}/runs")
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said_and_what_can_be_told_is_told(tmp_path):
    gone = lines(f"{FLOW} --model /nowhere --init ./gone")
    assert gone["model"][0].startswith("/nowhere: MISSING") and "memory" not in gone
    assert "MISSING" in gone["student"][0] and gone["forwards"] == lines(FLOW)["forwards"]
    (tmp_path / "empty").mkdir()
    assert "UNUSABLE" in lines(f"{FLOW} --tasks text --teachers text={tmp_path}/empty")["teacher text"][0]
    assert "REFUSED" in lines(f"{FLOW} --init {full_checkpoint(tmp_path / 'full')}")["student"][0]
    assert "REFUSED" not in lines(f"{FLOW} --parameters full --init {tmp_path / 'full'}")["student"][0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "safetensors"), (b"\xff" * 20, "cut off"), (struct.pack("<Q", 4) + b"nope", "safetensors"),
     (struct.pack("<Q", 2) + b"[]", "safetensors"), (struct.pack("<Q", 8) + b'{"a": 1}', "safetensors")],
)  # fmt: skip
def test_a_broken_adapter_file_is_named_in_one_line(tmp_path, content, reason):
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(content)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(S.SettingsError) as error:
        lines(f"{FLOW} --tasks text --teachers text={tmp_path}")
    assert str(error.value).startswith(f"{file}: not a readable") and reason in str(error.value)
    assert "\n" not in str(error.value)


WRONG = [SMALL | {"qk_norm": "odd"}, SMALL | {"_class_name": "FluxTransformer2DModel"}]


@pytest.mark.parametrize("text", ["{", "[]", '{"num_layers": 3}', *map(json.dumps, WRONG)])
def test_a_config_of_neither_architecture_is_named_in_one_line(tmp_path, text):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(text)
    with pytest.raises(S.SettingsError) as error:
        lines(f"--model {tmp_path}")
    assert str(error.value).startswith(f"{tmp_path}/transformer/config.json: not the config of an SD3 or Qwen-Image tr")
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- answer_early
def answer(line, capsys, prog="train.py"):
    """(exit code or None, stdout, stderr)"""
    try:
        P.answer_early(line.split(), prog)
        code = None
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_an_early_answer_prints_the_plan_the_mistake_or_nothing(capsys):
    code, out, err = answer(f"{TINY} --dry-run", capsys)
    assert (code, err) == (0, "") and out == P.describe(parse(f"{TINY} --dry-run")) + "\n"
    assert answer(TINY, capsys) == (None, "", ""), "there is work to do"
    assert answer("--stepz 3", capsys) == (2, "", "error: unknown flag --stepz; did you mean --steps?\n")
    said = "error: --rewards orc=1: no scorer 'orc'; choose from "
    assert answer(f"{TINY} --rewards orc=1", capsys)[2].startswith(said), "before anything is loaded"
    code, out, err = answer("--help", capsys)
    assert code == 0 and "--prompts-per-step" in out
    code, out, err = answer(f"{TINY} --dry-run", capsys, "eval.py")
    assert code == 0 and "in the end" in out and "training step" not in out


def test_a_broken_file_is_a_mistake_too(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    code, out, err = answer(f"{TINY} --dry-run --model {tmp_path}", capsys)
    assert (code, out) == (2, "") and re.fullmatch(r"error: .*config\.json: not the config.*\n", err)


def test_other_ranks_are_silent_and_exit_alike(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for line, code in ((f"{TINY} --dry-run", 0), ("--stepz 3", 2), ("--help", 0), (TINY, None)):
        assert answer(line, capsys) == (code, "", "")
    monkeypatch.setenv("RANK", "0")
    assert answer("--stepz 3", capsys)[0::2] == (2, "error: unknown flag --stepz; did you mean --steps?\n")


@pytest.mark.parametrize(("line", "missing"), [
    ("--stage opd", True), ("--stage grpo --task edit", True), ("--stage all", True),
    ("--stage grpo --task t2i", False), ("--stage opd --tasks t2i", False),
    ("--stage opd --prompts edit=x.jsonl", False),
])  # fmt: skip
def test_a_plan_says_that_edits_need_pictures_where_they_are_trained(line, missing):
    said = lines(f"--preset qwen-rl {line}").get("prompts", [])
    assert any("edit: MISSING" in text and "--prompts edit=FILE.jsonl" in text for text in said) == missing
