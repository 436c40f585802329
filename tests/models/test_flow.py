"""Oracles for student and experts: guidance by hand, teachers that leave no trace, full experts that wait on the host.

Everything runs on three architectures: the tiny world's, SD3.5's with its second attention and normalised queries, and
Qwen-Image's with masked texts and source pictures.
"""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file

from models import experts
from models import lora as adapters
from models.experts import STUDENT
from models.flow import Cond, FlowModel, joined
from models.hub import fingerprint, read_transformer
from models.qwen import QwenFlow
from models.tiny import new_tiny
from tests.helpers import qwen_hub, sd3
from tests.helpers.checks import gap
from tests.helpers.pretend_cuda import CPU, CUDA, place, pretend_cuda
from tests.helpers.runs import same

RANK, ALPHA = 4, 12.0  # alpha / rank = 3: an adapter that loses its alpha is seen


@pytest.fixture(scope="module")
def bases(folders, tmp_path_factory):
    """{(architecture, seed): a folder with transformer/}."""
    root, made = tmp_path_factory.mktemp("flow"), {("sd35", 0): folders["sd35"], ("qwen", 0): folders["plus"]}
    for seed in (0, 1):
        small = new_tiny(seed, width=32, layers=2)
        made["tiny", seed] = root / f"tiny-{seed}"
        small.save_full(made["tiny", seed], small.transformer.state_dict())
    made["sd35", 1] = sd3.build_sd35(root / "sd35", 1)
    made["qwen", 1] = qwen_hub.build_qwen(root / "qwen", "plus", 1)
    return made


@pytest.fixture(params=["tiny", "sd35", "qwen"])
def kind(request):
    return request.param


@pytest.fixture
def base(bases, kind):
    return bases[kind, 0]


@pytest.fixture
def other(bases, kind):
    """A full checkpoint of the same architecture with other weights."""
    return bases[kind, 1]


def load(folder, precision="float32"):
    transformer = read_transformer(folder, getattr(torch, precision))
    model = (QwenFlow if isinstance(transformer, QwenImageTransformer2DModel) else FlowModel)(transformer)
    model.precision, model.source = precision, str(folder)
    model.fingerprint = fingerprint(folder / "transformer")
    return model


def random_lora(model, seed):
    return sd3.random_lora(model.backbone, RANK, ALPHA, seed)


@pytest.fixture
def model(base):
    """The base with a student as it begins and a LoRA teacher that differs from it."""
    model = load(base)
    state, config = random_lora(model, 1)
    model.add_adapter(STUDENT, adapters.lora_config(RANK, ALPHA))
    model.add_adapter("text", config, state)
    return model


@pytest.fixture
def lora(base, tmp_path):
    """A folder with a LoRA of the base, in PEFT's layout."""
    model = load(base)
    adapters.save_adapter(tmp_path / "lora", *random_lora(model, 2), model.source, model.fingerprint)
    return tmp_path / "lora"


def inputs(model, seed=0):
    """Three samples that are taller than wide, their times, a text of five tokens each, and the empty prompt's."""
    config, rng = model.transformer.config, torch.Generator().manual_seed(seed)
    if isinstance(model, QwenFlow):
        return qwen_inputs(config, rng)
    shape = (3, config.in_channels, config.sample_size, config.sample_size - config.patch_size)
    texts = [
        Cond(
            torch.randn(3, 5, config.joint_attention_dim, generator=rng),
            torch.randn(3, config.pooled_projection_dim, generator=rng),
        )
        for _ in range(2)
    ]
    return torch.randn(shape, generator=rng), torch.tensor([0.9, 0.5, 0.1]), *texts


def qwen_inputs(config, rng):
    """The same for Qwen-Image: texts with a mask, and of another length for the empty prompt, and source pictures."""
    mask, source = torch.ones(3, 5, dtype=torch.bool), torch.randn(3, config.out_channels, 4, 6, generator=rng)
    mask[1, 3:] = False
    source = (source, torch.randn(3, config.out_channels, 2, 4, generator=rng))
    cond = Cond(torch.randn(3, 5, config.joint_attention_dim, generator=rng), None, mask, source)
    uncond = Cond(torch.randn(3, 4, config.joint_attention_dim, generator=rng), None, None, source)
    x = torch.randn(3, config.out_channels, 8, 6, generator=rng)
    # Eighths are exact in bfloat16, to which the half-precision transformer rounds its times.
    return x, torch.tensor([0.875, 0.5, 0.125]), cond, uncond


def velocity(model, name="unchanged"):
    """v of three fixed samples, without gradient; `name` selects an expert first."""
    x, t, cond, _ = inputs(model)
    with torch.no_grad():
        if name == "unchanged":
            return model.velocity(x, t, cond)
        with model.adapter(name):
            return model.velocity(x, t, cond)


# -------------------------------------------------------------------------------------------------- velocity
@torch.no_grad()
def test_guidance_is_the_two_branch_formula_and_is_written_once(base, monkeypatch):
    model = load(base)
    x, t, cond, uncond = inputs(model)
    v_cond, v_uncond = model.velocity(x, t, cond), model.velocity(x, t, uncond)
    assert gap(v_cond, v_uncond) > 1e-2, "the prompt matters"
    for cfg in (4.5, 0.5, 0.0):
        guided = model.velocity(x, t, cond, uncond, cfg)
        torch.testing.assert_close(guided, v_uncond + cfg * (v_cond - v_uncond), atol=5e-5, rtol=1e-4)
    swapped = v_cond + 4.5 * (v_uncond - v_cond)  # planted: the branches in the other order
    assert gap(model.velocity(x, t, cond, uncond, 4.5), swapped) > 1e-2
    poison = uncond.each(lambda part: part if part.dtype == torch.bool else part * float("nan"))
    assert torch.equal(model.velocity(x, t, cond, poison, 1.0), v_cond), "at 1 the empty prompt plays no part"
    with pytest.raises(ValueError, match="uncond"):
        model.velocity(x, t, cond, cfg=2.5)
    monkeypatch.setattr(model, "guide", lambda v_uncond, v_cond, cfg: torch.stack([v_uncond, v_cond]))
    branches = model.velocity(x, t, cond, uncond, 3.0)  # a model's own `guide` is asked, and both are not guided yet
    torch.testing.assert_close(branches, torch.stack([v_uncond, v_cond]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_every_sample_has_its_own_velocity(base):
    model = load(base)
    x, t, cond, uncond = inputs(model)
    x2, t2, cond2, uncond2 = inputs(model)  # the same once more
    x2[1], t2[1], cond2.tokens[1], uncond2.tokens[1] = -x[1], 0.3, -cond.tokens[1], -uncond.tokens[1]
    before, after = model.velocity(x, t, cond, uncond, 3.0), model.velocity(x2, t2, cond2, uncond2, 3.0)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]])
    assert gap(before[1], after[1]) > 1e-2


def test_conditioning_is_joined_row_by_row_with_a_mask_where_lengths_differ():
    a = Cond(torch.ones(2, 3, 5), None, None, (torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 2, 6)))
    mask, sources = torch.tensor([[True, True, False, True]]), (2 * torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 6))
    b = Cond(2 * torch.ones(1, 4, 5), None, mask, sources)
    both = joined([a, b])
    assert both.mask.int().tolist() == [[1, 1, 1, 0]] * 2 + [[1, 1, 0, 1]]
    assert both.tokens.shape == (3, 4, 5) and (both.tokens[:2, 3] == 0).all()
    assert torch.equal(both.tokens[:2, :3], a.tokens) and torch.equal(both.tokens[2:], b.tokens)
    assert [s[:, 0, 0, 0].tolist() for s in both.sources] == [[1, 1, 2], [0, 0, 1]] and both.pooled is None
    assert joined([a, a]).mask is None, "where none was padded there is none"
    assert joined([b, b]).mask.int().tolist() == [[1, 1, 0, 1]] * 2, "one that was there stays"
    pooled = joined([Cond(torch.zeros(1, 3, 5), torch.ones(1, 2)), Cond(torch.zeros(2, 3, 5), torch.zeros(2, 2))])
    assert pooled.pooled.tolist() == [[1, 1], [0, 0], [0, 0]] and pooled.sources == ()
    for other in ((), sources[:1], sources[::-1]):
        with pytest.raises(ValueError, match="number or shape"):
            joined([a, b._replace(sources=other)])


# ------------------------------------------------------------------------------------------------ half precision
def last_attention(model):
    """SD3 drops the text's side of its last attention: the queries of the text have no effect there."""
    return f"transformer_blocks.{len(model.transformer.transformer_blocks) - 1}.attn"


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_float32_student_on_a_bfloat16_base_has_float32_velocities_and_gradients(base, full):
    model, whole = load(base, "bfloat16"), load(base)
    state, config = random_lora(whole, 3)
    for one in (model, whole):
        one.train_fully() if full else one.add_adapter(STUDENT, config, state)
    assert {p.dtype for name, p in model.backbone.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    x, t, cond, uncond = inputs(model)
    v, exact = model.velocity(x, t, cond), velocity(whole)
    assert torch.equal(v.bfloat16().float(), v), "it leaves the transformer in bfloat16"
    guided = model.velocity(x, t, cond, uncond, 4.5)
    assert not torch.equal(guided.bfloat16().float(), guided), "guidance is computed in float32"
    assert v.dtype == torch.float32 and 0 < gap(v, exact) < 0.05 * exact.abs().max(), "bfloat16 has 8 bits"
    v.square().sum().backward()
    grads = gradients(model)
    assert {g.dtype for g in grads.values() if g is not None} == {torch.float32}
    silent = [name for name, g in grads.items() if g is None or not g.abs().sum() > 0]
    last = last_attention(model)
    assert silent and all(name.startswith((f"{last}.add_q_proj.", f"{last}.norm_added_q.")) for name in silent)
    with torch.no_grad():  # text in half precision will do
        low = model.velocity(x, t, cond.each(lambda p: p if p.dtype == torch.bool else p.bfloat16()))
    assert low.dtype == torch.float32 and gap(low, exact) < 0.05 * exact.abs().max()


# ------------------------------------------------------------------------------------------------ LoRA experts
def test_a_new_adapter_is_the_base_exactly_and_adapter_none_is_always_the_base(base, model):
    plain = velocity(load(base))
    assert torch.equal(velocity(model), plain), "B = 0"
    assert torch.equal(velocity(model, None), plain)
    assert gap(velocity(model, "text"), plain) > 1e-2
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.3)
    assert gap(velocity(model), plain) > 1e-2, "the student has moved"
    assert torch.equal(velocity(model, None), plain), "the base has not"


def trained(model):
    return {name for name, p in model.backbone.named_parameters() if p.requires_grad}


@pytest.fixture(params=["lora", "full"])
def taught(request, base, other, lora):
    """A student of either kind, beside a LoRA teacher, a full checkpoint and the base."""
    model = load(base)
    if request.param == "full":
        model.train_fully()
    else:
        model.add_adapter(STUDENT, adapters.lora_config(RANK, ALPHA))
    model.add_expert("text", str(lora))
    model.add_expert("whole", str(other))
    return model


def test_leaving_an_expert_restores_the_student_whatever_happened(taught, base, other):
    model, before, student = taught, velocity(taught), set(taught.trainable())
    expected = {"whole": velocity(load(other)), None: velocity(load(base))}
    for name in ("text", "whole", None):
        with model.adapter(name):
            assert torch.is_grad_enabled() is False
        with pytest.raises(ZeroDivisionError), model.adapter(name):
            found = velocity(model)
            assert torch.equal(found, expected[name]) if name in expected else gap(found, before) > 1e-2
            raise ZeroDivisionError
        assert torch.equal(velocity(model), before) and set(model.trainable()) == student and torch.is_grad_enabled()


def student_loss(model, seed=3):
    x, t, cond, uncond = inputs(model, seed)
    return model.velocity(x, t, cond, uncond, 2.0).square().sum()


def gradients(model):
    """The student's gradients, taken away from it."""
    found = {name: p.grad for name, p in model.trainable().items()}
    for p in model.trainable().values():
        p.grad = None
    return found


def test_teachers_between_forward_and_backward_cost_the_student_no_gradient(taught):
    """With and without gradient checkpointing, which runs the student's forward once more inside backward."""
    model = taught
    student_loss(model).backward()
    expected = gradients(model)
    assert sum(g.abs().sum() for g in expected.values() if g is not None) > 0
    for _ in range(2):
        loss = student_loss(model)
        for name in ("text", "whole", None):
            with model.adapter(name):
                x, t, cond, _ = inputs(model)
                assert not model.velocity(x, t, cond).requires_grad
        loss.backward()
        student = {id(p) for p in model.trainable().values()}
        everyone = (*model.transformer.parameters(), *model.backbone.parameters(),
                    *model.hosted["whole"].module.parameters())  # fmt: skip
        assert all(p.grad is None for p in everyone if id(p) not in student), "nobody else learns"
        assert same(gradients(model), expected)
        model.transformer.enable_gradient_checkpointing()


def test_a_new_lora_is_gaussian_in_a_and_zero_in_b_and_float32_on_any_backbone(base):
    torch.manual_seed(0)
    model = load(base, "bfloat16")
    model.add_adapter(STUDENT, adapters.lora_config(16, 32.0))
    state = model.adapter_state()
    a = torch.cat([value.flatten() for key, value in state.items() if "lora_A" in key])
    assert all((value == 0).all() for key, value in state.items() if "lora_B" in key)
    assert {value.dtype for value in state.values()} == {torch.float32}
    # PEFT draws A from N(0, (1/r)^2); the sample sd of n draws has standard error sd / sqrt(2n). bfloat16 keeps it.
    assert abs(a.std().item() - 1 / 16) < 5 / 16 / (2 * a.numel()) ** 0.5


# ------------------------------------------------------------------ host experts: copied to a device and released
@pytest.mark.parametrize("kind", ["sd35"], indirect=True)
def test_full_experts_wait_in_pinned_memory_and_take_turns_on_the_device_bit_identical(base, other, monkeypatch):
    expected = {"a": velocity(load(other)), "b": velocity(load(base))}
    monkeypatch.setattr(experts, "CHUNK", 1 << 17)
    with pretend_cuda() as mode:
        model = load(base)
        model.device = CUDA
        model.transformer.to(CUDA)
        for name, folder in (("a", other), ("b", base)):
            model.add_expert(name, str(folder))
        held = sum(t.nbytes for e in model.hosted.values() for t in (*e.module.parameters(), *e.module.buffers()))
        assert all(size & (size - 1) == 0 for size in mode.pinned), "torch would round them up"
        assert held <= sum(mode.pinned) < 1.2 * held and len(mode.pinned) > 4
        x, t, cond, _ = inputs(model)
        for name in ("a", "b", "a"):
            model.keep([name, "text", ""])
            with model.adapter(name):
                found = model.velocity(x.to(CUDA), t.to(CUDA), cond.to(CUDA))
            assert torch.equal(found.cpu(), expected[name])
            for p in model.hosted[name].module.parameters():
                p.zero_()  # the copy, which is not written back
            there = {n: {place(p) for p in e.module.parameters()} for n, e in model.hosted.items()}
            assert there == {n: {CUDA if n == name else CPU} for n in model.hosted}, "one at a time"
        model.keep([])
        assert {place(t) for e in model.hosted.values() for t in e.module.state_dict().values()} == {CPU}


# ------------------------------------------------------------------------------------- full-parameter students
def test_every_block_of_every_transformer_is_compiled_once(base, other, monkeypatch):
    """The base's, those of the student that is a copy of it, and those of a full expert that comes later."""
    found = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: found.append(block))
    model = load(base)
    model.compile()
    model.train_fully()
    model.add_expert("whole", str(other))
    modules = model.backbone, model.transformer, model.hosted["whole"].module
    assert [id(block) for block in found] == [id(block) for m in modules for block in m.transformer_blocks]


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("start", ["base", "full", "lora"])
def test_a_full_student_starts_as_what_it_starts_from_and_trains_entirely(base, other, lora, start, keep_base):
    frozen, plain = load(base), velocity(load(base))
    frozen.add_expert("init", str(lora))
    expected = {"base": plain, "full": velocity(load(other)), "lora": velocity(frozen, "init")}
    model = load(base)
    if keep_base:
        model.transformer.enable_gradient_checkpointing()
    model.train_fully({"base": "", "full": str(other), "lora": str(lora)}[start], keep_base)
    assert model.transformer.is_gradient_checkpointing == keep_base, "as asked, wherever it starts"
    assert gap(velocity(model), expected[start]) <= (1e-5 if start == "lora" else 0.0)
    assert start == "base" or gap(velocity(model), plain) > 1e-2
    names = [name for name, _ in load(base).transformer.named_parameters()]
    assert [name for name, _ in model.transformer.named_parameters()] == names, "no trace of a LoRA"
    assert all(p.requires_grad for p in model.transformer.parameters()), "all of it"
    assert {p.dtype for p in model.trainable().values()} == {torch.float32} and model.trains == "full"
    assert (model.backbone is not model.transformer) == keep_base
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.05)
    assert gap(velocity(model), expected[start]) > 1e-2
    assert torch.equal(velocity(model, None), plain) == keep_base, "a kept base does not move with the student"


def test_a_full_student_comes_to_the_device_block_by_block(base):
    """What FSDP2 is given; what it has not been given yet waits on the host, as it was read."""
    with pretend_cuda():
        model = load(base, "bfloat16")
        blocks, given = [*model.transformer.transformer_blocks], []

        def shard(part):
            waiting = [p for block in blocks[len(given) + 1 :] for p in block.parameters()]
            assert {(p.dtype, p.device) for p in waiting} <= {(torch.bfloat16, CPU)}
            assert {p.dtype for p in part.parameters()} == {torch.float32}
            given.append(part)
            part.to(CUDA)

        model.train_fully(keep_base=False, device=CUDA, shard=shard)
        assert given == [*blocks, model.transformer] and model.device == CUDA
        assert {p.device for p in model.transformer.parameters()} == {CUDA}


def test_a_lora_is_fused_in_float32_whatever_the_backbone_is_in(base, lora):
    model = load(base, "bfloat16")
    state, _ = model.read_adapter(lora)
    model.train_fully(str(lora))
    for name in {key.rpartition(".lora_")[0] for key in state}:
        update = 3.0 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        frozen = model.backbone.get_submodule(name).weight
        assert frozen.dtype == torch.bfloat16
        torch.testing.assert_close(model.transformer.get_submodule(name).weight.data, frozen.float() + update)


# ------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_saved_transformer_comes_back_bitwise_and_whole_or_not_at_all(base, tmp_path, precision):
    model = load(base, precision)
    model.train_fully()
    with torch.no_grad():
        for p in model.trainable().values():
            p.mul_(1.5)
    state = {key: value.clone() for key, value in model.transformer.state_dict().items()}
    model.save_full(tmp_path, state)
    dtype = getattr(torch, precision)
    expected = {key: value.to(dtype) for key, value in state.items()}
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    assert same(load_file(file), expected), "in the model's precision"
    stock = type(model.transformer).from_pretrained(tmp_path / "transformer", torch_dtype=dtype)
    assert same(dict(stock.state_dict()), expected)
    assert same(dict(read_transformer(tmp_path, dtype).state_dict()), expected)
    assert same(dict(model.transformer.state_dict()), state)
    state.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.save_full(tmp_path / "part", state)
    assert not (tmp_path / "part").exists()
