"""The claims of both papers as data: which runs a claim compares, and in which order their scores must stand.

A run is the flags of train.py. `@name` in them is the folder of another run of the same seed, which is made first;
names that begin with q- live in the tiny-qwen world, others in F's tiny world.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from bench.runs import parsed

QUICK = os.environ.get("QUICK") == "1"
SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "0" if QUICK else "0,1,2").split(",")]
TEACHERS = {task: f"assets/tiny/teacher-{task}" for task in ("composition", "text", "quality")}
OPD = "--stage opd --steps 100 --save-every 25 --keep 9"
SHORT = "--stage opd --steps 50"
MIX = "--stage grpo --task mix --steps 50 --save-every 10 --keep 9"  # 9,600 trajectories, as OPD's 100 steps
STACKED = "--stage grpo --task mix --mix joint --steps 50 --tasks"
Q_GRPO, Q_OPD = "--stage grpo --steps 80", "--stage opd --steps 120"
JUDGED = "--stage grpo --task quality --steps 60 --rewards"
MERGES = ("svd", "cat", "ties", "knots", "dare", "iso", "factor")
# Drawn states of a trajectory, 0 for all: a third of the steps that take about as many CPU seconds.
DRAWN = {
    "from-base": {0: 13, 1: 32, 2: 19}, "from-merge": {0: 7, 1: 16, 2: 9},
    "q-from-base": {0: 7, 1: 18, 2: 11}, "q-from-q-merge": {0: 4, 1: 11, 2: 6},
}  # fmt: skip
RUNS = {
    **{f"merge-{method}": f"--stage merge --merge-method {method}" for method in MERGES},
    "sft": "--stage sft", "mix": MIX, "sft-mix": f"{MIX} --init @sft", "merge-mix": f"{MIX} --init @merge-svd",
    "opd": OPD, "sft-opd": f"{OPD} --init @sft", "merge-opd": f"{OPD} --init @merge-svd",
    **{f"{m}-opd-short": f"{SHORT} --init @merge-{m}" for m in MERGES},
    "sft-opd-short": f"{SHORT} --init @sft", "opd-short": SHORT,
    "no-mar": f"{SHORT} --mar 0", "base-mar": f"{SHORT} --anchor assets/tiny/base",
    **{e: f"{SHORT} --drawn-states 0 --mar 0 --estimator {e}" for e in ("analytic", "literal", "sampled", "velocity")},
    **{e: f"{SHORT} --mar 0 --estimator {e}" for e in ("path", "sampled_path")},
    **{f"{start}-{k}": f"--stage opd --drawn-states {k} --steps {3 * third} --save-every {third} --keep 3"
                       + " --init @q-merge" * ("q-merge" in start) + " --init @merge-svd" * (start == "from-merge")
       for start, thirds in DRAWN.items() for k, third in thirds.items()},
    "released": f"{SHORT} --drawn-states 0 --mar 0 --estimator released --weight kl_dt --updates 2",
    "random": "--stage pretrain --steps 1",
    "random-teacher": f"{SHORT} --mar 0 --teachers composition=@random text=@random quality=@random",
    "wrong-teacher": f"{SHORT} --mar 0 --teachers composition={TEACHERS['text']} text={TEACHERS['quality']} "
                     f"quality={TEACHERS['composition']}",
    "teacher-states": f"{SHORT} --mar 0 --drawn-states 0",  # `reproduce.walked_by_teachers` draws the states
    "stack-1": f"{STACKED} composition", "stack-2": f"{STACKED} composition,text",
    "stack-3": f"{STACKED} composition,text,quality",
    "nft": "--stage nft --task mix --mix joint --steps 50",
    **{f"rm-{o}": f"--stage reward --objective {o}" for o in ("pointwise", "pairwise")},
    **{f"judged-{o}": f"{JUDGED} @rm-{o}/reward.json" for o in ("pointwise", "pairwise")},
    "q-t2i": f"{Q_GRPO} --task t2i", "q-edit": f"{Q_GRPO} --task edit", "q-mix": f"{Q_GRPO} --task mix",
    "q-mix-160": "--stage grpo --steps 160 --task mix", "q-opd": f"{Q_OPD} --teachers t2i=@q-t2i edit=@q-edit",
    "q-both": f"{Q_GRPO} --task t2i --guidance both", "q-neither": f"{Q_GRPO} --task t2i --guidance neither",
    "q-hacked-all": f"{Q_GRPO} --task t2i --rewards quality=1 --train-steps all --window 0:99",
    "q-hacked-few": f"{Q_GRPO} --task t2i --rewards quality=1", "q-curate": "--stage curate --tasks t2i",
    "q-curated": "--stage grpo --steps 63 --task t2i --prompts t2i=@q-curate/prompts/t2i",
    "q-nft": "--stage nft --steps 80 --task t2i", "q-merge": "--stage merge",
}  # fmt: skip
# Runs that are compared with one another have each a rate of its own: the one of these factors of the preset's with
# which the training reward over the last five steps is highest (seed 0, half of the steps).
TUNED = {name: (0.5, 1.0, 2.0) for name in (
    "nft", "stack-1", "stack-2", "stack-3", "q-t2i", "q-mix", "q-both", "q-neither", "q-nft",
)}  # fmt: skip

FLOW, Q = ("composition", "text", "quality", "average"), ("t2i", "edit", "average")


class Claim(NamedTuple):
    """rows: {printed name: run, folder of a shipped adapter, or "" for the base}; with " | both" behind it, it is drawn
    with guidance.

    above: (a, b, column): the claim holds if a is above b there, in every seed and by more than the spread over seeds.
    """

    number: str
    title: str
    source: str
    rows: dict[str, str]
    above: tuple[tuple[str, str, str], ...]
    columns: tuple[str, ...] = FLOW
    note: str = ""


SHIPPED = {f"teacher {task}": where for task, where in TEACHERS.items()}
CLAIMS = (
    Claim("2", "One student beats mixing rewards", "F Table 2, Fig. 1", {
        "base": "", **SHIPPED, "GRPO-mix": "mix", "SFT + GRPO-mix": "sft-mix", "merge + GRPO-mix": "merge-mix",
        "OPD": "opd", "OPD (SFT)": "sft-opd", "OPD (merge)": "merge-opd",
    }, (("OPD", "GRPO-mix", "average"), ("OPD (SFT)", "SFT + GRPO-mix", "average"),
        ("OPD (merge)", "merge + GRPO-mix", "average")), (*FLOW, "to 0.85"),
        "Every student has drawn 9,600 trajectories; `to 0.85`: after how many of them the average is 0.85, looked at "
        "every 1,920 (GRPO) or 2,400 (OPD). GRPO-mix has the teachers' learning rate, not tuned for it."),
    Claim("4", "MAR keeps quality and diversity", "F Fig. 5, Table 4", {
        "base": "", "no MAR": "no-mar", "anchor: base": "base-mar", "anchor: quality teacher": "opd-short",
    }, (("anchor: quality teacher", "no MAR", "quality"), ("anchor: quality teacher", "no MAR", "diversity")),
        (*FLOW, "diversity")),
    Claim("6", "Estimators on the real transformer", "F Eq. 9-11, Q Eq. 14", {
        e: e for e in ("analytic", "released", "literal", "sampled", "path", "sampled_path", "velocity")
    }, (("analytic", "literal", "average"), ("analytic", "sampled", "average"), ("analytic", "released", "average")),
        ("average", "gap at first", "gap at last", "noise"), "F Eq. 10-11 taken literally have no gradient: the claim "
        "tested is ours. `noise`: the spread of a step's gradient over its mean norm, at the base. Without MAR; "
        "`released` makes two updates a step, the others one."),
    *(Claim(f"6{letter}", f"One drawn state teaches more than all states in equal time, {where}", "in neither paper", {
        f"{k or 'all'} state{'s' * (k != 1)}, {3 * third} steps": f"{start}-{k}" for k, third in DRAWN[start].items()
    }, ((f"1 state, {3 * DRAWN[start][1]} steps", f"all states, {3 * DRAWN[start][0]} steps", "average"),),
        ("a third", "two thirds", "average", "seconds"), "Averages along the run; CPU seconds of its steps.")
      for letter, start, where in (
          ("b", "from-base", "F's SDE from the base"), ("c", "from-merge", "F's SDE from the merge"),
          ("d", "q-from-base", "Q's ODE from the base"), ("e", "q-from-q-merge", "Q's ODE from the merge"))),
    Claim("3", "A cold start helps, and OPD is needed", "F Fig. 4", {
        "base": "", "SFT alone": "sft", **{f"{m} merge alone": f"merge-{m}" for m in MERGES},
        "OPD": "opd-short", "SFT, OPD": "sft-opd-short",
        **{f"{m} merge, OPD": f"{m}-opd-short" for m in MERGES},
    }, (("SFT, OPD", "OPD", "average"), ("svd merge, OPD", "OPD", "average"),
        ("svd merge, OPD", "svd merge alone", "average"))),
    Claim("9", "It is the teacher, and it is on-policy", "nobody's: controls", {
        "base": "", "OPD, no MAR": "no-mar", "OPD, no MAR, all states": "analytic",
        "random teacher": "random-teacher", "wrong teachers": "wrong-teacher", "teachers' own states": "teacher-states",
        "merged only": "merge-svd",
    }, (("OPD, no MAR", "random teacher", "average"), ("OPD, no MAR", "wrong teachers", "average"),
        ("OPD, no MAR, all states", "teachers' own states", "average"), ("OPD, no MAR", "merged only", "average"))),
    Claim("1", "Each reward that is added costs the others", "F Table 1, Fig. 2", {
        "base": "", **SHIPPED, "composition": "stack-1", "+ text": "stack-2", "+ quality": "stack-3",
    }, (("composition", "+ text", "composition"), ("+ text", "+ quality", "composition"),
        ("+ text", "+ quality", "text"))),
    Claim("5", "The tasks' policy gradients conflict", "F 4.2", {}, (("0", "policy, base", "mean cosine"),
        ("0", "policy, mixed", "mean cosine"), ("distillation, base", "policy, base", "mean cosine")),
        ("lowest cosine", "mean cosine"), "Cosines between the tasks' gradients of one step, three pairs of tasks."),
    Claim("7a", "OPD beats NFT", "F Table 5", {"base": "", "NFT": "nft", "OPD": "opd-short"},
          (("OPD", "NFT", "average"),)),
    Claim("7b", "One student for two tasks", "Q Fig. 5-6", {
        "base": "q- | both", "t2i teacher": "q-t2i | both", "edit teacher": "q-edit | both", "Mix-RL": "q-mix | both",
        "Mix-RL, twice the steps": "q-mix-160 | both", "OPD student": "q-opd",
    }, tuple(("OPD student", f"Mix-RL{x}", c) for x in ("", ", twice the steps") for c in ("t2i", "edit")), Q),
    Claim("7c", "Guidance in the rollout alone is best", "Q Fig. 3", {
        f"{way}, drawn {how}": run + " | both" * (how == "guided") for how in ("guided", "plain")
        for way, run in (("both", "q-both"), ("rollout", "q-t2i"), ("neither", "q-neither"))
    }, tuple((f"rollout, drawn {how}", f"{way}, drawn {how}", "t2i")
             for how in ("guided", "plain") for way in ("both", "neither")), Q),
    Claim("7d", "A few noisy steps resist hacking", "Q 4.2", {
        "base": "q- | both", "all steps": "q-hacked-all | both", "a few noisy ones": "q-hacked-few | both",
    }, (("a few noisy ones", "all steps", "t2i alignment"),), ("t2i aesthetic", "t2i alignment", "edit")),
    Claim("7e", "Curated prompts teach more", "Q 4.2", {"all prompts": "q-t2i | both", "curated": "q-curated | both"},
          (("curated", "all prompts", "t2i"),), Q),
    Claim("7f", "Pointwise reward models are better", "Q Fig. 2", {
        "base": "", "pointwise": "judged-pointwise", "pairwise": "judged-pairwise",
    }, (("pointwise", "pairwise", "quality"),)),
    Claim("7g", "NFT or GRPO", "Q Eq. 6-8", {"GRPO": "q-t2i | both", "NFT": "q-nft | both"},
          (("NFT", "GRPO", "t2i"),), Q, "Q prefers neither in numbers; the order tested is ours."),
    Claim("8", "The student surpasses every teacher", "F 6.2", {}, (("OPD (merge)", "routed teacher again", "share"),),
          ("share",), "Share of prompts on which the mean of four pictures is above every teacher's, which are drawn "
          "from other noise; the control draws the prompt's own teacher from the student's."),
)  # fmt: skip


def folder_of(name: str, seed: int) -> Path:
    return Path("runs", f"{'quick' if QUICK else 'repro'}-{name}-{seed}")


def world_of(name: str) -> list[str]:
    return ["--preset", "tiny-qwen" if name.startswith("q-") else "tiny"]


def flags_of(name: str, seed: int) -> list[str]:
    """The flags of a run without its rate, shortened for QUICK; `@run` is that run's folder."""
    flags = re.sub(r"@([\w-]+)", lambda m: str(folder_of(m[1], seed)), RUNS[name]).split()
    flags = [*world_of(name), *flags]
    s = parsed(*flags)
    if s.stage not in ("merge", "curate", "pretrain") and QUICK:
        flags += ["--steps", str(max(2, s.steps // 10)), "--save-every", str(max(1, s.save_every // 10))]
    flags += ["--eval-prompts", "0"] * (s.stage not in ("reward", "curate"))
    return flags + ["--seed", str(seed)] * (s.stage != "merge")  # nothing is drawn in merging
