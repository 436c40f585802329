"""What several processes must agree on, shown with gloo on a processor: torchrun starts them as it does on GPUs.

Starting a process costs seconds (torch, diffusers), so one pair of ranks runs a list of jobs in one go, and a run of
one rank happens in the test's own process.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Runs jobs [{"argv": [...], "env": {...}, "code": expected, "broken": a rank whose scorer gives out in the second
# step}] one after another in this rank.
WORKER = """
import json, os, sys, types
sys.path.insert(0, {root!r})
import train
from harness import ranks
from scorers import ocr
score, calls, broken = ocr.score_jpeg, [], None

def score_jpeg(images, prompts):
    calls.append(prompts)
    if len(calls) == 3 and str(broken) == os.environ["RANK"]:  # the first one is the self-test
        raise ValueError("the planted fault")
    return score(images, prompts)

ocr.score_jpeg = score_jpeg
ranks.time = types.SimpleNamespace(sleep=lambda seconds: None)  # rank 1 would let rank 0 speak first
for job in json.load(open({jobs!r})):
    os.environ.update(job.get("env", {{}}))
    calls.clear()
    broken = job.get("broken")
    code = train.main(job["argv"])
    if code != job.get("code", 0):
        sys.exit(f"job {{job['argv']}} ended with {{code}}")
"""


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A tiny random SD3.5 on disk, three LoRA teachers in both layouts, and the flags of a run on it."""
    import torch
    from diffusers import SD3Transformer2DModel

    from models import lora as adapters
    from tests.helpers import sd3

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("sd")
    base = sd3.build_sd35(root / "base")
    transformer = SD3Transformer2DModel.from_pretrained(base / "transformer")
    teachers = []
    for seed, task in enumerate(("composition", "text", "quality")):
        state, config = sd3.random_lora(transformer, 4, 8, seed=seed)
        adapters.save_adapter(root / task, state, config, pipeline="StableDiffusion3Pipeline")
        if task == "text":  # one in diffusers' layout only
            (root / task / "adapter_config.json").unlink()
            (root / task / "adapter_model.safetensors").unlink()
        teachers.append(f"{task}={root / task}")
    flags = ["--model", str(base), "--teachers", *teachers]
    flags += "--resolution 32 --precision float32 --num-steps 3 --window 0:2 --group-size 2 --micro-batch 2".split()
    flags += "--train-prompts 12 --eval-prompts 0 --eval-steps 2 --rank 4 --alpha 8 --ema-every 1 --updates 1".split()
    flags += "--threads 1 --save-every 2 --rewards jpeg=1 --sft-images 6 --batch-size 4".split()
    return flags


def torchrun(script, *arguments, ranks=2, env=None, timeout=480, **more):
    """Start `script` on that many ranks of this machine and wait; (exit code, output, seconds)."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, str(script), *arguments], env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, **more,
    )  # fmt: skip
    return done.returncode, done.stdout, time.monotonic() - began


def work(folder, jobs, **more):
    """Two ranks work through `jobs`; the output if all went well."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT), jobs=str(folder / "jobs.json")))
    code, output, _ = torchrun(folder / "worker.py", **more)
    assert code == 0, output[-4000:]
    return output


def alone(*argv):
    import train

    assert train.main([str(a) for a in argv]) == 0


def tensors(run, inner="adapter_model.safetensors"):
    """The newest checkpoint's tensors of one file."""
    from safetensors.torch import load_file

    from models import lora as adapters

    return load_file(adapters.last_checkpoint(run) / inner)


def furthest(a, b):
    assert a.keys() == b.keys() and len(a) > 10
    return max((a[key].float() - b[key].float()).abs().max().item() for key in a)


def lines(run, *keys):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row[key] for key in keys] for row in rows]


WHOLE = "transformer/diffusion_pytorch_model.safetensors"
CURATE = "--stage curate --tasks text --threshold 0.0045 --prompts-per-step 2".split()


# ------------------------------------------------------------------------------------------ two ranks equal one rank
@pytest.fixture(scope="module")
def pair(sd, tmp_path_factory):
    """Every two-rank run that the tests below look at, made in one go; the folder that holds the runs."""
    out = tmp_path_factory.mktemp("pair")
    flags = [*sd, "--out", str(out)]
    opd, grpo = ["--stage", "opd"], "--stage grpo --task text --advantage-std group --lr 1e-3".split()
    full = [*opd, "--parameters", "full", "--lr", "1e-3", "--prompts-per-step", "3", "--steps", "3"]
    jobs = [
        [*opd, "--name", "opd-2", "--prompts-per-step", "3", "--steps", "3"],
        [*grpo, "--name", "grpo-2", "--prompts-per-step", "1", "--steps", "3"],
        [*opd, "--name", "half", "--prompts-per-step", "3", "--steps", "2"],
        [*full, "--name", "full-ddp"],
        [*full, "--name", "full-fsdp", "--parallel", "fsdp"],
        [*full, "--name", "full-half", "--parallel", "fsdp", "--steps", "2"],
        ["--stage", "sft", "--name", "sft-2", "--steps", "2"],
        ["--stage", "merge", "--name", "merge-2"],
    ]
    jobs = [{"argv": [*flags, *job]} for job in jobs]
    torn = [*flags, *grpo, "--name", "torn", "--prompts-per-step", "1", "--steps", "3"]
    jobs += [{"argv": torn, "code": 2, "broken": 1}, {"argv": torn}]
    jobs.append({"argv": [*flags, *CURATE, "--name", "curate-2"]})
    # two nodes of one rank each: parameters whole on each, gradients averaged between them
    hsdp = [*flags, *full, "--name", "full-hsdp", "--parallel", "hsdp"]
    jobs.append({"argv": hsdp, "env": {"LOCAL_WORLD_SIZE": "1"}})
    (out / "output.txt").write_text(work(out, jobs))
    return out


def test_two_ranks_distil_what_one_rank_does_with_the_same_global_batch(sd, pair):
    alone(*sd, "--out", pair, "--stage", "opd", "--name", "opd-1", "--prompts-per-step", "6", "--steps", "3")
    one, two = tensors(pair / "opd-1"), tensors(pair / "opd-2")
    assert furthest(one, two) < 1e-5
    keys = ("loss", "gap", "kl", "mar", "grad_norm")
    assert sum(lines(pair / "opd-2", *keys), []) == pytest.approx(sum(lines(pair / "opd-1", *keys), []), rel=1e-4)
    moved = furthest(one, tensors(pair / "half"))
    assert moved > 1e-5, "the third step moves the weights by more than the ranks differ"


def test_two_ranks_reinforce_what_one_rank_does_with_the_same_global_batch(sd, pair):
    grpo = "--stage grpo --task text --advantage-std group --lr 1e-3".split()
    alone(*sd, "--out", pair, *grpo, "--name", "grpo-1", "--prompts-per-step", "2", "--steps", "3")
    # Adam's first steps are lr times a sign: where a gradient is rounding noise, so is the step.
    assert lines(pair / "grpo-2", "reward", "grad_norm")[0] == pytest.approx(
        lines(pair / "grpo-1", "reward", "grad_norm")[0], rel=1e-4
    )
    assert furthest(tensors(pair / "grpo-1"), tensors(pair / "grpo-2")) < 1e-5


def test_sharded_training_equals_replicated_training(pair):
    whole = tensors(pair / "full-ddp", WHOLE)
    for other in ("full-fsdp", "full-hsdp"):
        assert furthest(whole, tensors(pair / other, WHOLE)) < 1e-5
        assert lines(pair / other, "gap") == [pytest.approx(row, rel=1e-5) for row in lines(pair / "full-ddp", "gap")]
    gaps = [row[0] for row in lines(pair / "full-ddp", "gap")]
    assert abs(gaps[2] - gaps[0]) > 1e-3 * gaps[0], "three updates show in the velocity"


def test_a_run_saved_by_two_ranks_goes_on_with_one(sd, pair):
    alone(*sd, "--out", pair, "--stage", "opd", "--name", "half", "--prompts-per-step", "6", "--steps", "3")
    assert furthest(tensors(pair / "half"), tensors(pair / "opd-2")) < 1e-5
    assert len(lines(pair / "half", "gap")) == 3


def test_a_sharded_run_goes_on_unsharded_with_one_rank(sd, pair):
    from models import lora as adapters

    shards = list((adapters.last_checkpoint(pair / "full-half") / "training").glob("*.safetensors"))
    assert len(shards) == 2, "each rank has written its own part"
    full = ["--stage", "opd", "--parameters", "full", "--lr", "1e-3", "--name", "full-half"]
    alone(*sd, "--out", pair, *full, "--parallel", "ddp", "--prompts-per-step", "6", "--steps", "3")
    assert furthest(tensors(pair / "full-half", WHOLE), tensors(pair / "full-ddp", WHOLE)) < 1e-5


def test_the_cold_starts_run_on_two_ranks(pair):
    assert len(lines(pair / "sft-2", "loss")) == 2
    assert tensors(pair / "merge-2")


def test_a_scorer_that_fails_on_one_rank_ends_both_after_a_checkpoint_that_goes_on_to_the_same_weights(pair):
    output = (pair / "output.txt").read_text()
    assert "error: another rank has failed; its message says why" in output
    assert "error (rank 1): scorer 'jpeg': the planted fault, for the prompt " in output
    assert "torn: continues from" in output and "torn/checkpoints/step-000001" in output, "a whole step had been saved"
    assert furthest(tensors(pair / "torn"), tensors(pair / "grpo-2")) == 0.0
    assert lines(pair / "torn", "step", "reward") == lines(pair / "grpo-2", "step", "reward")


def test_two_ranks_keep_the_prompts_that_one_rank_keeps(sd, pair):
    alone(*sd, "--out", pair, *CURATE, "--name", "curate-1")
    one, two = (
        [(file.relative_to(folder), file.read_text()) for file in sorted((folder / "prompts").rglob("*.*"))]
        for folder in (pair / "curate-1", pair / "curate-2")
    )
    assert one == two and len(one) == 1
    assert (pair / "curate-1/curation.md").read_text() == (pair / "curate-2/curation.md").read_text()
    assert 0 < one[0][1].count("\n") < 12, "some are dropped"
    shares = [(pair / f"curate-2/ranges/rank-{rank}.jsonl").read_text() for rank in (0, 1)]
    assert [share.count('"scores"') for share in shares] == [6, 6], "each rank looked at its half"


# ------------------------------------------------------------------------------------ Q's two tasks on two ranks
# Q's two tasks: name -> flags. On two ranks each has half the prompts of a step.
QUICK = "--steps 2 --eval-prompts 0 --lr 1e-3 --prompts-per-step 2".split()
TINY_QWEN = {
    "nft": ["--stage", "nft", "--task", "mix", "--beta", "0.1", *QUICK],
    "opd": ["--stage", "opd", "--micro-batch", "3", *QUICK],
    "sft": ["--stage", "sft", *QUICK],
    "curate": "--stage curate --threshold 0 --train-prompts 4 --prompts-per-step 2".split(),
}
REAL_QWEN = {
    "grpo": "--stage grpo --task mix --rewards jpeg=1 --guidance both".split() + QUICK,
    "opd": ["--stage", "opd", *QUICK],
    "full": ["--stage", "nft", "--task", "edit", "--rewards", "jpeg=1", "--parameters", "full", *QUICK,
             "--parallel", "fsdp"],
    "sft": ["--stage", "sft", *QUICK, "--eval-prompts", "1", "--rewards", "jpeg=1"],
}  # fmt: skip


def two_of(base, out, *flags, ranks=2):
    """The flags of a run on a fixture's base: NAME-RANKS; one rank alone has the prompts of both."""
    kind = "tiny" if "tiny-qwen" in base.flags else "real"
    jobs = TINY_QWEN if kind == "tiny" else REAL_QWEN
    name = next(name for name, job in jobs.items() if job == [*flags])
    whole = [] if ranks == 2 or "curate" in flags else ["--prompts-per-step", "4", "--parallel", "ddp"]
    return [*base.flags, "--out", str(out), "--name", f"{kind}-{name}-{ranks}", *flags, *whole]


@pytest.fixture(scope="module")
def pair2(world2, qwen, tmp_path_factory):
    """The two-rank runs on Q's two tasks, in one go; the folder that holds the runs."""
    out = tmp_path_factory.mktemp("pair2")
    jobs = [two_of(base, out, *job) for base, jobs in ((world2, TINY_QWEN), (qwen, REAL_QWEN)) for job in jobs.values()]
    work(out, [{"argv": job} for job in jobs])
    return out


@pytest.mark.parametrize("name", ["nft", "opd"])
def test_two_ranks_learn_both_of_qs_tasks_as_one_rank_does(world2, pair2, name):
    alone(*two_of(world2, pair2, *TINY_QWEN[name], ranks=1))
    one, two = pair2 / f"tiny-{name}-1", pair2 / f"tiny-{name}-2"
    assert furthest(tensors(one), tensors(two)) < 1e-5
    keys = ("loss", "grad_norm", *(("moved", "distance", "reward") if name == "nft" else ("gap",)))
    assert sum(lines(two, *keys), []) == pytest.approx(sum(lines(one, *keys), []), rel=1e-4, abs=1e-7)


def test_two_ranks_draw_and_keep_edits_as_one_does(world2, pair2):
    alone(*two_of(world2, pair2, *TINY_QWEN["curate"], ranks=1))
    one, two = (sorted((pair2 / f"tiny-curate-{n}" / "prompts").rglob("*.*")) for n in (1, 2))
    assert [file.read_text() for file in one] == [file.read_text() for file in two] and len(one) == 2
    assert len(lines(pair2 / "tiny-sft-2", "loss")) == 2


@pytest.mark.parametrize("name", ["grpo", "opd", "full"])
def test_two_ranks_train_qwen_image_edit_as_one_rank_does(qwen, pair2, name):
    alone(*two_of(qwen, pair2, *REAL_QWEN[name], ranks=1))
    one, two = pair2 / f"real-{name}-1", pair2 / f"real-{name}-2"
    inner = [WHOLE] if name == "full" else []
    assert furthest(tensors(one, *inner), tensors(two, *inner)) < 1e-5
    assert lines(two, "grad_norm") == [pytest.approx(row, rel=1e-4) for row in lines(one, "grad_norm")]


def test_two_ranks_draw_qwens_edits_and_one_of_them_scores(pair2):
    scores = json.loads((pair2 / "real-sft-2/results.json").read_text())["real-sft-2"]["scores"]
    assert set(scores) == {"t2i jpeg", "edit jpeg"} and len(lines(pair2 / "real-sft-2", "loss")) == 2


# --------------------------------------------------------------------------------------------------- the command line
def test_torchrun_runs_the_stage_end_to_end_and_draws_its_pictures(sd, tmp_path):
    argv = [*sd, "--out", str(tmp_path), "--stage", "opd", "--prompts-per-step", "3", "--steps", "2", "--name", "cli"]
    code, output, _ = torchrun(ROOT / "train.py", *argv, "--eval-prompts", "3")
    assert code == 0, output[-4000:]
    assert output.count("  checkpoint ") == 1, "one rank speaks"
    assert {p.name for p in (tmp_path / "cli" / "samples").glob("final-*.png")} == {
        f"final-{task}.png" for task in ("composition", "text", "quality")
    }


def test_the_default_line_ends_with_one_sentence_where_there_is_no_accelerator(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    home = tmp_path / "hub"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "train.py", "--stage", "opd", "--out", str(tmp_path)], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "HF_HOME": str(home)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no accelerator" in done.stderr and "--preset tiny" in done.stderr
    assert time.monotonic() - began < 60 and not home.exists(), "nothing was fetched"
    assert list(tmp_path.iterdir()) == [], "and nothing written"


FAULTY = """
import signal, sys, time
sys.path.insert(0, {root!r})
import train
from harness import ranks
walk, count = train.distil_part, [0]
def distil_part(run, *rest):
    count[0] += 1
    if run.rank == 1 and count[0] == 3:
        {fault}
    return walk(run, *rest)
train.distil_part = distil_part
ranks.leave(train.main)
"""


HANG = "signal.signal(signal.SIGTERM, signal.SIG_DFL), time.sleep(3600)"


@pytest.mark.parametrize(
    ("fault", "message"),
    [("raise KeyError('the planted fault')", "the planted fault"), (HANG, "lost the other ranks")],
    ids=["a rank fails", "a rank hangs"],
)
def test_a_rank_that_fails_or_hangs_ends_the_job_with_a_message(sd, tmp_path, fault, message):
    (tmp_path / "faulty.py").write_text(FAULTY.format(root=str(ROOT), fault=fault))
    argv = [*sd, "--out", str(tmp_path), "--stage", "opd", "--prompts-per-step", "3", "--steps", "4"]
    code, output, seconds = torchrun(tmp_path / "faulty.py", *argv, "--timeout", "0.1", timeout=120)
    assert code != 0 and message in output
    assert seconds < 90
    if "planted" in message:
        assert "rank 1 failed" in output and output.count("Traceback (most recent call last)") >= 1


STOPPED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from harness import ranks
walk, count = train.distil_part, [0]
def distil_part(run, *rest):
    count[0] += 1
    if run.rank == 0 and count[0] == 5:  # in the middle of the second step; only one rank is told
        os.kill(os.getpid(), signal.SIGTERM)
    return walk(run, *rest)
train.distil_part = distil_part
ranks.leave(train.main)
"""


def test_sigterm_to_one_rank_saves_and_ends_all_in_good_order(sd, tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED.format(root=str(ROOT)))
    argv = [*sd, "--out", str(tmp_path), "--stage", "opd", "--steps", "3", "--name", "told"]
    code, output, _ = torchrun(tmp_path / "stopped.py", *argv, "--prompts-per-step", "3")
    assert code == 0 and "stopped by SIGTERM" in output, output[-4000:]
    assert (tmp_path / "told" / "checkpoints" / "step-000001").is_dir()
    alone(*argv, "--prompts-per-step", "6")
    alone(*argv, "--prompts-per-step", "6", "--name", "free")
    assert furthest(tensors(tmp_path / "told"), tensors(tmp_path / "free")) < 1e-5


def test_two_torchrun_agents_are_two_nodes(sd, tmp_path):
    argv = [*sd, "--out", str(tmp_path), "--stage", "opd", "--prompts-per-step", "3", "--steps", "1", "--name", "nodes"]
    argv += ["--parameters", "full", "--parallel", "hsdp"]
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{20000 + os.getpid() % 20000}", "--rdzv_id=7"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *meeting]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen([*command, "train.py", *argv], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]  # fmt: skip
    outputs = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum(output.count("  checkpoint ") for output in outputs) == 1
    assert lines(tmp_path / "nodes", "gap")


# ------------------------------------------------------------------------------------------------------------ kill -9
# Imports once, then forks a child for every attempt: a real process that a real SIGKILL ends.
KILLED = """
import json, os, random, signal, sys, time
sys.path.insert(0, {root!r})
import train
argv, kills = json.loads(sys.argv[1]), int(sys.argv[2])

def child(name):
    pid = os.fork()
    if pid == 0:
        os._exit(train.main([*argv, "--name", name]))
    return pid

def code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

began = time.monotonic()
assert code(child("whole")) == 0
length, rng, killed = time.monotonic() - began, random.Random(3), 0
for _ in range(kills):
    pid = child("torn")
    time.sleep(rng.uniform(0.0, 0.9 * length))
    os.kill(pid, signal.SIGKILL)
    killed += code(pid) == -signal.SIGKILL
assert code(child("torn")) == 0
print("killed", killed)
"""


def test_a_run_killed_at_ten_random_instants_ends_with_the_weights_of_one_that_was_not(sd, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED.format(root=str(ROOT)))
    argv = [*sd, "--out", str(tmp_path / "runs"), "--stage", "opd", "--prompts-per-step", "3", "--steps", "6"]
    argv += ["--save-every", "1", "--keep", "3"]
    done = subprocess.run(
        [sys.executable, tmp_path / "killed.py", json.dumps(argv), "10"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) >= 5, "most of the kills met a living run"
    assert furthest(tensors(tmp_path / "runs" / "torn"), tensors(tmp_path / "runs" / "whole")) == 0.0
    whole, torn = (lines(tmp_path / "runs" / name, "step", "gap", "grad_norm") for name in ("whole", "torn"))
    assert whole == torn, "and with its metrics, each step once"


# -------------------------------------------------------------------------------------------------- real prompt files
FILES = {"text": "ocr_test.txt", "composition": "geneval_test_metadata.jsonl"}


@pytest.mark.parametrize("task", FILES)
def test_the_published_prompt_files_load_route_and_encode(sd, task):
    from data import files as data
    from models import load as models

    file = ROOT.parent / "shared" / "data" / FILES[task]
    if not file.exists():
        pytest.skip("the published files are not here")
    prompts = data.read_prompts(file, task)
    assert {data.task_of(p.text, p.metadata) for p in prompts} == {task}
    model = models.load_sd35(Path(sd[1]), resolution=32, text_length=512)
    cond = model.encode([p.text for p in prompts])
    assert len(cond.tokens) == len(prompts) and bool(cond.tokens.isfinite().all())
    assert len(model.known) == len({p.text for p in prompts})
    assert cond.tokens.flatten(1).unique(dim=0).shape[0] == len(model.known), "different prompts, different conditions"
