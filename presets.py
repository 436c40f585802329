"""Which numbers does a preset change?

F's and Q's, for the published models (`flow-opd`, which is settings.py's defaults, and `qwen-rl`) and for the tiny
worlds (`tiny`, `tiny-qwen`). A preset has entries for all its stages ("") and for each of them.
"""

FLOW_TASKS, QWEN_TASKS = ("composition", "text", "quality"), ("t2i", "edit")  # F's and Q's
ASSETS = {"tiny": "assets/tiny", "tiny-qwen": "assets/tiny-qwen"}

# What a preset changes for all its stages ("") and for each of them. Learning rates and sizes of the tiny world were
# found on two CPU cores; see the README. flow-opd: F App. A and, where F is silent, Flow-GRPO's recipe. On 8 ranks it
# has 48 groups an epoch and two updates of 24 groups; in OPD every step is one such update, hence 3 groups a rank.
PRESETS: dict[str, dict[str, dict]] = {
    "flow-opd": {
        "": {},
        "curate": dict(train_prompts=2000, eval_prompts=0),
        "sft": dict(lr=1e-4, steps=300),
        "merge": dict(steps=0),
        "opd": dict(lr=1e-4, steps=300, prompts_per_step=3),
    },
    "tiny": {
        "": dict(
            model=f"{ASSETS['tiny']}/base", teachers={t: f"{ASSETS['tiny']}/teacher-{t}" for t in FLOW_TASKS},
            precision="float32",
            micro_batch=0, gradient_checkpointing=False, resolution=24, rank=16, alpha=32.0, lr=1e-3, warmup=5,
            ema_every=1, batch_size=128, prompts_per_step=12, group_size=16, num_steps=6, window="0:5", cfg=1.0,
            advantage_std="batch", beta=0.0, updates=1, train_steps="first", train_prompts=2048, eval_prompts=192,
            eval_steps=10, save_every=25,
        ),
        "pretrain": dict(
            steps=6000, batch_size=64, lr=3e-3, decay=True, warmup=100, weight_decay=0.01, ema_decay=0.999,
            save_every=500,
        ),
        "curate": dict(train_prompts=240, eval_prompts=0),
        "grpo": dict(steps=150, lr=7e-4),
        "sft": dict(steps=100, batch_size=96, lr=1e-3),
        "merge": dict(steps=0),
        # log_prob="sum" is F Eq. 8-11 as written. Under "mean" the literal estimator's noise shrinks by 1/D against
        # MAR, so that the student quietly becomes the anchor and looks as if it had learnt (README, "Three seeds").
        "opd": dict(
            steps=100, lr=3e-3, decay=True, prompts_per_step=24, group_size=4, train_steps="all", log_prob="sum"
        ),
    },
    # Q names its methods and hardly a number: those here are Flow-GRPO's and DiffusionNFT's, scaled to a model of 20
    # billion parameters. DEVIATION: Qwen-Image-2.0 is not public; the published model that edits and draws is the base.
    "qwen-rl": {
        "": dict(
            model="Qwen/Qwen-Image-Edit-2509", tasks="t2i,edit", anchor="", mar=0.0, cfg=4.0, cfg_rescale=True,
            teachers={t: f"./runs/qwen-rl-grpo-{t}" for t in QWEN_TASKS}, text_length=512, micro_batch=4, rank=64,
            alpha=128.0, lr=1e-4, prompts_per_step=4, group_size=12, num_steps=40, window="0:16", guidance="rollout",
            combine="normalised", overlap=True, train_steps="random", train_count=8, mix="joint", log_prob="mean",
        ),
        "curate": dict(train_prompts=2000, eval_prompts=0, overlap=False),
        "grpo": dict(steps=500, beta=0.0, updates=1),
        "nft": dict(steps=500, beta=1e-4, updates=1, advantage_clip=1.0),
        "sft": dict(steps=300, guidance="both"),
        "merge": dict(steps=0),
        "opd": dict(
            steps=500, estimator="velocity", guidance="teacher", group_size=1, prompts_per_step=8,
            train_steps="all", overlap=False,
        ),
    },
    "tiny-qwen": {
        "": dict(
            model=f"{ASSETS['tiny-qwen']}/base", teachers={t: f"{ASSETS['tiny-qwen']}/teacher-{t}" for t in QWEN_TASKS},
            tasks="t2i,edit", anchor="", mar=0.0, precision="float32", micro_batch=0, gradient_checkpointing=False,
            resolution=24, rank=16, alpha=32.0, lr=1e-3, warmup=5, ema_every=1, batch_size=128, prompts_per_step=12,
            group_size=8, num_steps=6, window="0:4", cfg=2.0, guidance="rollout", combine="normalised", mix="joint",
            advantage_std="batch", beta=0.0, updates=1, train_steps="random", train_count=3, train_prompts=2048,
            eval_prompts=192, eval_steps=10, save_every=25,
        ),
        "pretrain": dict(
            steps=6000, batch_size=64, lr=3e-3, decay=True, warmup=100, weight_decay=0.01, ema_decay=0.999,
            save_every=500, guidance="both",
        ),
        "curate": dict(train_prompts=480, eval_prompts=0, threshold=0.4),
        "grpo": dict(steps=80, lr=1.5e-3),
        "nft": dict(steps=80, lr=4e-4, beta=1e-4, advantage_clip=1.0),
        "sft": dict(steps=100, batch_size=96, guidance="both"),
        "merge": dict(steps=0),
        "opd": dict(
            steps=120, lr=3e-3, decay=True, prompts_per_step=24, group_size=4, train_steps="all",
            estimator="velocity", guidance="teacher",
        ),
    },
}  # fmt: skip
