"""Oracles for the plan: exact counts against the real modules, a real step's forwards, every number's own flag."""

import collections
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import cost as C
import plan as P
import settings as S

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
HUB = "owner/sd35"
FLOW = f"--model {HUB} --micro-batch 8"  # F App. A on SD3.5-M, from the Hub, in small micro-batches
TINY = "--preset tiny"
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


def full_checkpoint(folder, config=C.SD35_MEDIUM):
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel", **config}))
    return folder


def meta(config):
    import torch
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        return SD3Transformer2DModel(**config)


def count(parameters):
    return sum(p.numel() for p in parameters)


# --------------------------------------------------------------------------------------------------- exact counts
def test_the_published_medium_model_has_exactly_the_parameters_that_diffusers_builds():
    assert C.transformer_parameters(C.SD35_MEDIUM) == count(meta(C.SD35_MEDIUM).parameters()) == N


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
    assert C.transformer_parameters(config) == count(meta(config).parameters())


def test_the_older_configs_without_norm_and_dual_layers_are_those_of_none():
    old = {k: v for k, v in SMALL.items() if k not in ("qk_norm", "dual_attention_layers", "out_channels")}
    same = old | {"qk_norm": None, "dual_attention_layers": (), "out_channels": None}
    assert C.transformer_parameters(old) == count(meta(same).parameters())


def test_an_unknown_norm_is_refused_and_a_missing_entry_is_named():
    with pytest.raises(ValueError, match="layer_norm"):
        C.transformer_parameters(SMALL | {"qk_norm": "layer_norm"})
    with pytest.raises(KeyError, match="patch_size"):
        C.transformer_parameters({k: v for k, v in SMALL.items() if k != "patch_size"})


BARE = tuple(name.removeprefix("attn.") for name in C.TARGETS)


@pytest.mark.parametrize("targets", [C.TARGETS, BARE, ("to_q", "attn.to_add_out")], ids=["attn.", "bare", "mixed"])
@pytest.mark.parametrize("config", [C.SD35_MEDIUM, SMALL, SMALL | CHANGES[2]], ids=lambda c: c["num_layers"])
def test_a_lora_has_exactly_the_factors_that_peft_injects(config, targets):
    import adapters

    model = meta(config).requires_grad_(False)
    model.add_adapter(adapters.lora_config(3, 6.0, targets))
    assert C.lora_parameters(config, 3, targets) == count(p for p in model.parameters() if p.requires_grad) > 0


def test_the_students_lora_is_hand_counted():
    # 24 blocks of eight projections, less the last to_add_out; (32, 1536) and (1536, 32) each
    assert C.lora_parameters(C.SD35_MEDIUM, 32) == (24 * 8 - 1) * 2 * 32 * 1536 == 18_776_064
    # bare names reach attn2's four projections in 13 blocks besides
    assert C.lora_parameters(C.SD35_MEDIUM, 32, BARE) == (24 * 8 - 1 + 13 * 4) * 2 * 32 * 1536


def test_a_planted_bug_in_the_last_block_or_the_second_attention_is_seen(monkeypatch):
    true = C._block_parameters
    for wrong in (lambda c, n: true(c, 0), lambda c, n: true(c | {"dual_attention_layers": ()}, n)):
        monkeypatch.setattr(C, "_block_parameters", wrong)
        assert C.transformer_parameters(C.SD35_MEDIUM) != N


# ------------------------------------------------------------------------------- copies of what cannot be imported
def test_what_is_copied_from_the_heavy_modules_is_what_they_say():
    import adapters
    import opd

    assert C.TARGETS == adapters.TARGETS and C.FILE_ENDINGS == adapters.FILE_ENDINGS
    for estimator in opd.ESTIMATORS:
        s = parse(f"{FLOW} --estimator {estimator}")
        assert C.is_single_pass(s) == (estimator in opd.SINGLE_PASS), estimator
        assert C.is_ode(s) == (estimator in opd.NEEDS_ODE), estimator


PLACES = ["a/b", "a/SD3.5M-b", "a/b/c", "a/b@v1", "a/b@refs/pr/1", "a", "", "./a/b", "/a/b", "~/a/b", "a/b.safetensors",
          "assets/b", "tests/none", "a b/c", "a//b", "a/b/", "a/b@", "-a/b"]  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
def test_what_is_a_hub_id_is_decided_as_by_adapters(where):
    import adapters

    assert C.hub_id(where) == bool(adapters.hub_id(where))


def test_kinds_and_last_checkpoints_are_those_of_adapters(tmp_path):
    import adapters

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
    for way in ("--no-single-pass", "--estimator path", "--estimator sampled_path"):
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
    assert work(f"{FLOW} --stage sft --batch-size 9 --micro-batch 0") == {("student", True): (1, 9)}
    assert work(f"{FLOW} --stage merge") == {}


REAL = [
    "--stage opd --prompts-per-step 4 --group-size 2 --micro-batch 3",
    "--stage opd --prompts-per-step 4 --group-size 2 --micro-batch 5 --estimator path --cfg 2 "
    "--anchor assets/tiny/teacher-text",
    "--stage grpo --task text --prompts-per-step 4 --group-size 3 --updates 2 --micro-batch 4 --beta 0.1",
]


@pytest.mark.parametrize("line", REAL, ids=["single pass", "path", "grpo"])
def test_a_real_step_makes_the_forwards_that_the_plan_foretells(line, tmp_path, monkeypatch):
    import torch

    import flow
    import train

    torch.set_num_threads(1)
    calls, rows, who = collections.Counter(), collections.Counter(), [None]
    use, forward = flow.FlowModel._use, flow.FlowModel._forward

    def watched_use(self, name):
        who[0] = name
        return use(self, name)

    def watched_forward(self, x, t, cond):
        key = {"student": "student", None: "base", "anchor": "anchor"}.get(who[0], who[0]), torch.is_grad_enabled()
        calls[key] += 1
        rows[key] += len(x)
        return forward(self, x, t, cond)

    monkeypatch.setattr(flow.FlowModel, "_use", watched_use)
    monkeypatch.setattr(flow.FlowModel, "_forward", watched_forward)
    argv = f"{TINY} {line} --steps 1 --eval-prompts 0 --threads 1 --out {tmp_path}".split()
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
    assert found.total == sum(found.parts.values()) + max(found.moments.values())


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
    assert gathered["gathered blocks"] == 2 * 2 * C._block_parameters(C.SD35_MEDIUM, 0)


def test_a_full_student_keeps_the_base_only_for_those_who_need_it(tmp_path):
    teachers = [f"{t}={full_checkpoint(tmp_path / t)}" for t in S.TASKS]
    alone = [*FLOW.split(), "--parameters", "full", "--teachers", *teachers]
    assert "frozen backbone" not in memory(alone).parts
    assert "frozen backbone" in memory([*alone, "--anchor", "jieliu/SD3.5M-FlowGRPO-Text"]).parts
    grpo = f"--stage grpo --rewards jpeg=1 --model {HUB} --parameters full"
    assert memory(grpo).parts["frozen backbone"] == 2 * N
    assert "frozen backbone" not in memory(f"{grpo} --beta 0").parts


def test_full_teachers_wait_in_host_memory_and_come_for_their_own_and_the_next_micro_batch(tmp_path):
    teachers = [f"{t}={full_checkpoint(tmp_path / t)}" for t in S.TASKS]
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


def test_a_merge_has_no_gradients_and_cat_adds_the_ranks_up():
    merged = memory(f"{FLOW} --stage merge")
    assert merged.parts["trained weights"] == 4 * LORA and "gradients" not in merged.parts
    assert "training step" not in merged.moments and "adapters" not in merged.parts
    assert memory(f"{FLOW} --stage merge --merge-method cat").parts["trained weights"] == 3 * 4 * LORA


def test_a_student_begun_from_an_adapter_has_that_adapters_size():
    shipped = C.expert("assets/tiny/teacher-text", None, 3)
    assert memory(f"{TINY} --init assets/tiny/teacher-text").parts["trained weights"] == 4 * shipped.parameters
    assert memory(f"{TINY} --rank 3").parts["trained weights"] == 4 * 3 * 2 * 96 * (8 * 3 - 1)


def small_model(trained, b, **change):
    """A small transformer as the runs use it, its LoRA float32 on a frozen bfloat16 or float32 base."""
    import torch
    from diffusers import SD3Transformer2DModel

    import adapters

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
    import torch

    model, base = small_model(trained, b, num_layers=3, **change)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}  # storage -> bytes; holding the tensor keeps its address from being used again

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_small(model, b, rows=2)
    measured = sum(size for _, size in kept.values())
    if b == 2:  # autocast's copies of float32 weights are a part of their own
        measured -= 2 * count(p for p in model.parameters() if p.requires_grad)
    assert 0.75 < C.activations(base, 2, trained, b) / measured < 1.25


@pytest.mark.parametrize("b", [2, 4])
def test_checkpointing_keeps_the_inputs_of_the_blocks_and_one_block(b):
    model, base = small_model("lora", b, num_layers=3)
    sizes, streams = [], ("hidden_states", "encoder_hidden_states")
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(
            lambda _, args, given: sizes.append(sum(given[k].nbytes for k in streams)), with_kwargs=True
        )
    run_small(model, b, rows=2)
    inputs = C.activations(base, 2, "lora", b, checkpointing=True) - C.activations(base, 2, "lora", b, gradient=False)
    assert inputs == sum(sizes) == 3 * 2 * (256 + 20) * 192 * b


def test_activations_grow_with_rows_and_blocks_and_shrink_with_checkpointing():
    base = C.base_of(parse(FLOW))
    one = C.activations(base, 1, "lora", 2)
    assert C.activations(base, 3, "lora", 2) == 3 * one
    assert C.activations(base, 1, "lora", 2, checkpointing=True) < one / 5
    assert C.activations(base, 1, "full", 2) > one > C.activations(base, 1, "lora", 2, gradient=False)


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
    (FLOW, "--cfg 1", "rollout forwards drawing memory moment"),
    (FLOW, "--num-steps 12", "rollout forwards"),
    (FLOW, "--window 0:4", "rollout forwards"),
    (FLOW, "--noise-level 0.5", "rollout"),
    (FLOW, "--train-steps first", "rollout forwards"),
    (FLOW, "--estimator path", "objective forwards memory"),
    (FLOW, "--estimator sampled", "objective"),
    (FLOW, "--no-single-pass", "objective forwards memory"),
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
    (GRPO, "--overlap", ""),
    (GRPO, "--on-reward-failure drop", ""),
    (GRPO, "--kernel cps --beta 0", "objective forwards rollout"),
    (GRPO, "--task mix", "groups writes checkpoints"),
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


def test_the_resolved_settings_come_first_as_json():
    s = parse(FLOW)
    found, end = json.JSONDecoder().raw_decode(P.describe(s))
    assert found == S.asdict(s) and P.describe(s)[end] == "\n"


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
    import models

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
    assert (base.encoders, base.vae, base.side, base.image) == (23, 8, 12, 36)
    assert base.parameters == C.transformer_parameters(SMALL)
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
    assert lines("--stage grpo --rewards jpeg=1 --name g --out none")["run"] == [name(f"none/g-{t}") for t in S.TASKS]
    parts = ["pretrain", *(f"grpo-{t}" for t in S.TASKS), "sft", "merge", "opd"]
    tiny = lines(f"{TINY} --stage all --name a --out none")
    assert tiny["run"] == [*(name(f"none/a-{p}") for p in parts), name("none/a")]
    assert "numbers" in tiny and "memory" not in tiny
    flow = lines(f"{FLOW} --stage all --name a --out none")["run"]
    assert flow == [name(f"none/a-{p}") for p in parts[4:]] + [name("none/a")]


def test_what_is_paid_and_by_whom_is_told_with_every_option(tmp_path):
    file = tmp_path / "r.json"
    judge = {"kind": "judge", "rubric": "alignment", "model": "vlm", "endpoints": ["http://a:1", "http://b:2"]}
    weights = {"counting": {"geneval": 0.8, "far": -0.2}, "default": {"far": 1}}
    file.write_text(json.dumps({"scorers": {"far": judge}, "weights": weights, "watch": {"jpeg": {"drop": 1}}}))
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


def test_an_evaluation_draws_with_every_model_and_trains_none():
    s = parse(f"{TINY} --compare one=assets/tiny/teacher-text", prog="eval.py")
    shown = P.describe(s, prog="eval.py")
    assert json.JSONDecoder().raw_decode(shown)[0] == S.asdict(s)
    assert f"in the end: {5 * 3 * 192} test pictures, {5 * 3 * 192 * 10:,} rows" in shown
    assert "compare one" in shown and "training step" not in shown and "forwards" not in shown
    assert "checkpoints" not in shown and "results.json" in shown


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


@pytest.mark.parametrize("text", ["{", "[]", '{"num_layers": 3}', json.dumps(SMALL | {"qk_norm": "odd"})])
def test_a_config_that_is_no_sd3_transformers_is_named_in_one_line(tmp_path, text):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(text)
    with pytest.raises(S.SettingsError) as error:
        lines(f"--model {tmp_path}")
    assert str(error.value).startswith(f"{tmp_path}/transformer/config.json: not the config of an SD3 transformer")
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
    said = "error: --rewards orc=1: no reward 'orc'; did you mean 'ocr'?\n"
    assert answer(f"{TINY} --rewards orc=1", capsys) == (2, "", said), "before anything is loaded"
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


def test_a_plan_needs_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import plan, settings; "
        "[plan.describe(settings.parse(a)[0]) for a in (['--preset', 'tiny'], [])]; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - {'cost', 'plan', 'recipe', 'settings'}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
