"""What several processes must agree on, shown with gloo on a CPU: torchrun starts them as it does on GPUs.

One pair of ranks runs a list of jobs in one go, and a run of one rank happens in the test's own process. That two ranks
train what one does, whatever the settings, is in test_world_size.py.
"""

import json
import re

import pytest

from tests.helpers.qwen_hub import build_vlm
from tests.helpers.ranks import ROOT, torchrun
from tests.helpers.runs import command, write_marks

# Runs jobs one after another in this rank: {"argv": [...], "env": {...}, "code": the exit code expected,
# "broken": a rank whose scorer fails in the second step, "told": a rank that gets SIGTERM within the second step}.
WORKER = """
import json, os, signal, sys, types
sys.path.insert(0, {root!r})
import train
from harness import cli
from harness.run import Run
from scorers import ocr
rank, job, calls = int(os.environ["RANK"]), {{}}, {{}}

def planted(owner, name, key, at, fault):
    real = getattr(owner, name)
    def function(*args):
        calls[name] = calls.get(name, 0) + 1
        if job.get(key) == rank and calls[name] == at:
            fault()
        return real(*args)
    setattr(owner, name, function)

def fail():
    raise ValueError("the planted fault")

planted(ocr, "score_jpeg", "broken", 3, fail)  # the first call is the self-test
planted(Run, "stop_if_asked", "told", 6, lambda: os.kill(os.getpid(), signal.SIGTERM))  # three calls a step
cli.time = types.SimpleNamespace(sleep=lambda seconds: None)  # rank 1 would wait for rank 0 to print first
for job in json.load(open({jobs!r})):
    os.environ.update(job.get("env", {{}}))
    calls.clear()
    code = train.main(job["argv"])
    if code != job.get("code", 0):
        sys.exit(f"job {{job['argv']}} ended with {{code}}")
"""


def work(folder, jobs):
    """Two ranks work through `jobs` -> the output, if each ended as it should."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT), jobs=str(folder / "jobs.json")))
    code, output, _ = torchrun(folder / "worker.py")
    assert code == 0, output[-4000:]
    return output


def job(base, out, name, stage, *flags):
    """The flags of a run: of the fixture's those that the stage reads, then its own."""
    return command(base.flags, "--out", str(out), "--name", name, "--stage", stage, *flags)


def alone(argv):
    import train

    assert train.main(argv) == 0


def tensors(run, inner="adapter_model.safetensors"):
    """The newest checkpoint's tensors of one file."""
    from safetensors.torch import load_file

    from models import hub

    return load_file(hub.last_checkpoint(run) / inner)


def furthest(a, b):
    assert a.keys() == b.keys() and len(a) > 10
    return max((a[key].float() - b[key].float()).abs().max().item() for key in a)


def lines(run, *keys):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row[key] for key in keys] for row in rows]


def alike(two, one, *keys):
    """Do two runs have the same metrics but for rounding?"""
    return sum(lines(two, *keys), []) == pytest.approx(sum(lines(one, *keys), []), rel=1e-4, abs=1e-7)


WHOLE = "transformer/diffusion_pytorch_model.safetensors"

# ------------------------------------------------------------------------------------------ two ranks equal one rank
# Runs on a small SD3.5: stage and flags. One rank alone has the prompts of both: HALF becomes BOTH.
HALF, BOTH = ["--prompts-per-step", "3"], ["--prompts-per-step", "6"]
QUIET = ["--eval-prompts", "0", "--save-every", "2"]
OPD = ["opd", *QUIET, "--steps", "3"]
GRPO = ["grpo", *QUIET, *"--steps 3 --task text --advantage-std group --lr 1e-3 --rewards jpeg=1".split()]
FULL = [*OPD, "--parameters", "full", "--lr", "1e-3"]
REWARD = "--stage reward --objective pairwise --steps 2 --micro-batch 2 --rank 4 --holdout 0.3".split()
REWARD += "--precision float32 --device cpu --save-every 2".split()
CURATE = ["curate", *"--tasks text --threshold 0.0045 --prompts-per-step 2 --rewards jpeg=1".split()]


@pytest.fixture(scope="module")
def pair(sd35, qwen, tmp_path_factory):
    """Every two-rank run that the tests below look at, made in one go; the folder that holds the runs."""
    out = tmp_path_factory.mktemp("pair")
    jobs = [
        job(sd35, out, "opd-2", *OPD, *HALF),
        job(sd35, out, "grpo-2", *GRPO, "--prompts-per-step", "1"),
        job(sd35, out, "half", *OPD, *HALF, "--steps", "2"),
        job(sd35, out, "full-ddp", *FULL, *HALF),
        job(sd35, out, "full-fsdp", *FULL, *HALF, "--parallel", "fsdp"),
        job(sd35, out, "full-half", *FULL, *HALF, "--parallel", "fsdp", "--steps", "2"),
        job(sd35, out, "merge-2", "merge", "--eval-prompts", "0", "--teachers", f"quality={sd35.lora}"),
        job(sd35, out, "curate-2", *CURATE),
    ]
    marks = ["--data", str(write_marks(out) / "pairwise.jsonl"), "--model", str(build_vlm(out / "vlm"))]
    jobs.append([*REWARD, *marks, "--out", str(out), "--name", "reward-2", "--batch-size", "4"])
    sft = "sft --steps 2 --rewards jpeg=1 --eval-prompts 1".split()
    jobs.append(job(qwen, out, "sft-2", *sft))
    jobs = [{"argv": argv} for argv in jobs]
    jobs.append({"argv": job(sd35, out, "told", *OPD, *HALF), "told": 0})
    torn = job(sd35, out, "torn", *GRPO, "--prompts-per-step", "1")
    jobs += [{"argv": torn, "code": 2, "broken": 1}, {"argv": torn}]
    # two nodes of one rank each: parameters whole on each, gradients averaged between them
    hsdp = job(sd35, out, "full-hsdp", *FULL, *HALF, "--parallel", "hsdp")
    jobs.append({"argv": hsdp, "env": {"LOCAL_WORLD_SIZE": "1"}})
    (out / "output.txt").write_text(work(out, jobs))
    return out


@pytest.fixture(scope="module")
def distilled(sd35, pair):
    """What one rank distils alone."""
    alone(job(sd35, pair, "opd-1", *OPD, *BOTH))
    return pair / "opd-1"


def test_two_ranks_train_the_reward_model_that_one_rank_trains(pair):
    marks = ["--data", str(pair / "pairwise.jsonl"), "--model", str(pair / "vlm")]
    alone([*REWARD, *marks, "--out", str(pair), "--name", "reward-1", "--batch-size", "8"])
    assert alike(pair / "reward-2", pair / "reward-1", "loss", "grad_norm")
    assert furthest(tensors(pair / "reward-1"), tensors(pair / "reward-2")) < 1e-5


@pytest.mark.parametrize("other", ["full-fsdp", "full-hsdp"])
def test_sharded_training_equals_replicated_training(pair, other):
    assert furthest(tensors(pair / "full-ddp", WHOLE), tensors(pair / other, WHOLE)) < 1e-5
    gaps = sum(lines(pair / "full-ddp", "gap"), [])
    assert sum(lines(pair / other, "gap"), []) == pytest.approx(gaps, rel=1e-5)
    assert abs(gaps[2] - gaps[0]) > 1e-3 * gaps[0], "three updates show in the velocity"


def test_a_run_saved_by_two_ranks_goes_on_with_one(sd35, pair):
    alone(job(sd35, pair, "half", *OPD, *BOTH))
    assert furthest(tensors(pair / "half"), tensors(pair / "opd-2")) < 1e-5
    assert len(lines(pair / "half", "gap")) == 3


def test_a_sharded_run_goes_on_unsharded_with_one_rank(sd35, pair):
    from models import hub

    shards = list((hub.last_checkpoint(pair / "full-half") / "training").glob("*.safetensors"))
    assert len(shards) == 2, "each rank has written its own part"
    alone(job(sd35, pair, "full-half", *FULL, *BOTH, "--parallel", "ddp"))
    assert furthest(tensors(pair / "full-half", WHOLE), tensors(pair / "full-ddp", WHOLE)) < 1e-5


def test_sigterm_to_one_rank_saves_and_ends_all_in_good_order(sd35, pair, distilled):
    assert "told: stopped by SIGTERM" in (pair / "output.txt").read_text()
    assert [p.name for p in (pair / "told/checkpoints").iterdir()] == ["step-000001"], "the last whole step"
    alone(job(sd35, pair, "told", *OPD, *BOTH))
    assert furthest(tensors(pair / "told"), tensors(distilled)) < 1e-5


def test_a_scorer_that_fails_on_one_rank_ends_both_after_a_checkpoint_that_goes_on_to_the_same_weights(pair):
    output = (pair / "output.txt").read_text()
    assert "error: another rank has failed" in output and "error (rank 1): scorer 'jpeg': the planted fault" in output
    assert "torn: continues from" in output and "torn/checkpoints/step-000001" in output, "a whole step had been saved"
    assert furthest(tensors(pair / "torn"), tensors(pair / "grpo-2")) == 0.0
    assert lines(pair / "torn", "step", "reward") == lines(pair / "grpo-2", "step", "reward")


def test_two_ranks_keep_the_prompts_that_one_rank_keeps(sd35, pair):
    alone(job(sd35, pair, "curate-1", *CURATE))
    one, two = (
        [(file.relative_to(folder), file.read_text()) for file in sorted((folder / "prompts").rglob("*.*"))]
        for folder in (pair / "curate-1", pair / "curate-2")
    )
    assert one == two and len(one) == 1
    assert (pair / "curate-1/curation.md").read_text() == (pair / "curate-2/curation.md").read_text()
    assert 0 < one[0][1].count("\n") < 12, "some are dropped"
    shares = [(pair / f"curate-2/ranges/rank-{rank}.jsonl").read_text() for rank in (0, 1)]
    assert [share.count('"scores"') for share in shares] == [6, 6], "each rank looked at its half"


def test_the_cold_starts_run_on_two_ranks_and_one_of_them_scores(pair):
    assert tensors(pair / "merge-2")
    run = pair / "sft-2"
    scores = json.loads((run / "results.json").read_text())[run.name]["scores"]
    assert set(scores) == {"t2i jpeg", "edit jpeg"} and len(lines(run, "loss")) == 2


# Prompts of different lengths, which share no forward: the ranks have different numbers of them.
WHOLE_21 = ["opd", *QUIET, *"--steps 3 --parameters full --lr 1e-3".split()]
HALF_21, BOTH_21 = ["--prompts-per-step", "2"], ["--prompts-per-step", "4"]


@pytest.fixture(scope="module")
def pair21(qwen21, tmp_path_factory):
    """Runs of a small Qwen-Image-2.1 on two ranks; the folder that holds them."""
    out = tmp_path_factory.mktemp("pair21")
    jobs = [
        job(qwen21, out, "fsdp", *WHOLE_21, *HALF_21, "--parallel", "fsdp"),
        job(qwen21, out, "half", *WHOLE_21, *HALF_21, "--parallel", "fsdp", "--steps", "2"),
    ]
    hsdp = job(qwen21, out, "hsdp", *WHOLE_21, *HALF_21, "--parallel", "hsdp")
    work(out, [*({"argv": argv} for argv in jobs), {"argv": hsdp, "env": {"LOCAL_WORLD_SIZE": "1"}}])
    return out


def test_qwen_image_2_1_sharded_over_two_ranks_learns_as_on_one_and_goes_on_there(qwen21, pair21):
    alone(job(qwen21, pair21, "one", *WHOLE_21, *BOTH_21))
    alone(job(qwen21, pair21, "half", *WHOLE_21, *BOTH_21, "--parallel", "ddp"))
    gaps = sum(lines(pair21 / "one", "gap"), [])
    for name in ("fsdp", "hsdp", "half"):
        assert furthest(tensors(pair21 / "one", WHOLE), tensors(pair21 / name, WHOLE)) < 1e-4, name
        assert sum(lines(pair21 / name, "gap"), []) == pytest.approx(gaps, rel=1e-4)
    assert abs(gaps[2] - gaps[0]) > 1e-3 * gaps[0], "three updates show in the velocity"


# ------------------------------------------------------------- two nodes: half precision, sharded; one run folder
NODES = """
import os, sys, types
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from safetensors.torch import save_file
from harness import ranks
from models import load
from tests.helpers.checks import five_velocities

torch.distributed.init_process_group("gloo")
os.environ |= {{"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}}  # two nodes of one rank each
ranks.time = types.SimpleNamespace(sleep=lambda seconds: None)
for folder in ("both", "node-{{}}".format(ranks.rank_and_world()[0]), "both"):
    folder = Path(sys.argv[1]).with_name(folder)
    folder.mkdir(exist_ok=True)
    try:
        ranks.check_shared(folder)
        print(f"shared: {{folder.name}}")
    except ranks.SettingsError as fault:
        print(f"refused: {{fault}}")
found = {{}}
for where in sys.argv[2:]:
    for parallel in ("ddp", "fsdp", "hsdp"):
        for precision in ("float32", "bfloat16"):
            model = load.load(where, precision=precision, size=(64, 64))
            model.train_fully(keep_base=False, shard=ranks.sharding(parallel, precision, torch.device("cpu")))
            found[f"{{where}} {{parallel}} {{precision}}"] = five_velocities(model)
if ranks.rank_and_world()[0] == 0:
    save_file(found, sys.argv[1])
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def nodes(sd35, qwen, qwen21, tmp_path_factory):
    """What two nodes of one rank each find out; the folder that has it."""
    root = tmp_path_factory.mktemp("nodes")
    (root / "nodes.py").write_text(NODES.format(root=str(ROOT)))
    code, output, _ = torchrun(root / "nodes.py", root / "found.safetensors", sd35.base, qwen.base, qwen21.base)
    assert code == 0, output[-4000:]
    (root / "output.txt").write_text(output)
    return root


def test_a_run_folder_that_is_not_one_for_all_nodes_is_refused_on_every_rank(nodes):
    output = (nodes / "output.txt").read_text()
    assert output.count("shared: both") == 4 and not [*(nodes / "both").iterdir()], "and nothing is left in it"
    assert output.count(f"refused: {nodes}/node-") == 2


def test_a_full_student_has_the_base_models_velocity_however_it_is_sharded_and_in_half_precision(
    sd35, qwen, qwen21, nodes
):
    """At five times that bfloat16 would round: SD3's 900.9 to 900, and velocities 20 to 115 % apart."""
    from safetensors.torch import load_file

    from models import load
    from tests.helpers.checks import five_velocities, relative

    where = [str(base.base) for base in (sd35, qwen, qwen21)]
    whole = {folder: load.load(folder, size=(64, 64)) for folder in where}
    for name, found in load_file(nodes / "found.safetensors").items():
        folder, _, precision = name.split()
        expected = five_velocities(whole[folder], folder != str(sd35.base) and precision == "bfloat16")
        print(f"{name}: {relative(found, expected):.1e}")
        assert relative(found, expected) < {"float32": 1e-5, "bfloat16": 2e-2}[precision], name


# --------------------------------------------------------------------------------------------------- the command line


FAULTY = """
import signal, sys, time
sys.path.insert(0, {root!r})
import train
from harness import ranks
from harness.run import Run
real, calls = Run.stop_if_asked, [0]
def stop_if_asked(run):
    calls[0] += 1
    if run.rank == 1 and calls[0] == 5:  # in the middle of the second step
        {fault}
    real(run)
Run.stop_if_asked = stop_if_asked
ranks.leave(train.main)
"""
HANG = "signal.signal(signal.SIGTERM, signal.SIG_DFL), time.sleep(3600)"


@pytest.mark.parametrize(
    ("fault", "message"),
    [("raise KeyError('the planted fault')", "rank 1 failed: 'the planted fault'"), (HANG, "lost the other ranks")],
    ids=["a rank fails", "a rank hangs"],
)
def test_a_rank_that_fails_or_hangs_ends_the_job_with_a_message(sd35, tmp_path, fault, message):
    (tmp_path / "faulty.py").write_text(FAULTY.format(root=str(ROOT), fault=fault))
    argv = job(sd35, tmp_path, "faulty", *OPD, *HALF, "--timeout", "0.1")
    code, output, seconds = torchrun(tmp_path / "faulty.py", *argv, timeout=300)
    assert code != 0 and message in output and seconds < 240


@pytest.mark.parametrize("flags", [("--prompts", "text=none.txt"), ("--lr", "inf")], ids=["late", "early"])
def test_bad_input_is_said_once_whichever_rank_finds_it_first(sd35, tmp_path, flags):
    """Ranks that the launcher finds at work yet it ends itself, and the other code and traceback are its own."""
    code, output, _ = torchrun(ROOT / "train.py", *job(sd35, tmp_path, "bad", *OPD, *flags))
    assert code == 1 and output.count("error: ") == 1 == output.count("Traceback"), output
    assert re.search(r"rank      : 0 .*\n  exitcode  : 2 ", output)


def test_train_py_survives_kill_9_before_a_sample_of_its_writes(world):
    """All of them, and full disks: python -m bench.kills. The same on two tensors: tests/harness/test_ownership.py."""
    from bench import kills

    for case in kills.cases(world.base).values():
        _, tried, survived = kills.survived(case, every=40)
        assert tried == survived > 0
