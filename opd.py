"""On-policy distillation: how does a student learn from several teachers on the states it visits itself?

The student rolls out its own trajectory, the teacher of the sample's task says what *it* would have done in
each state, and the student is pulled towards that. F does it between stochastic policies, Q between the
velocities:

    F Eq. 2     min KL(pi_student || pi_teacher)            reverse KL, on the student's own samples
    F Eq. 7     v_target(x, t, c) = v_k(x, t, c), k = R(c)  `route`, `target_velocity`
    F Eq. 10    r_t = -w(t) ||v_student - v_target||^2      `dense_reward`, detached
    F Eq. 11    max sum_t min(rho_t r_t, clip(rho_t) r_t)   `opd_loss("literal", ...)`
    F Eq. 12    + lambda E[w(t) ||v_student - v_anchor||^2] `mar_penalty`
    Q Eq. 14    min sum_n ||v_student - v_teacher||^2       `velocity_matching`; Eq. 19 is the same

Below, KL_t is F Eq. 9 at the state x_t, rho = pi_student(a|x_t) / pi_old(a|x_t) with the action a = x_{t-dt},
[.] is detached and clip(rho r) = min(rho r, clip(rho, 1-eps, 1+eps) r). One setting chooses the loss of a
transition; all but the last need a stochastic step (sigma > 0):

    literal       -clip(rho [-KL_t])                       F Eq. 10-11 as printed
    released      -clip(rho (-KL_t))                       the authors' code: the reward is not detached
    analytic      KL_t                                     the default
    sampled       -clip(rho [log pi_target(a|x_t) - log pi_old(a|x_t)])   the LLM recipe that F cites
    path          KL_t - clip(rho [-later states' KL])     exact gradient of the KL of whole trajectories
    sampled_path  -clip(rho [reward-to-go of `sampled`])   the same by pure policy gradient
    velocity      ||v_student - v_target||^2               Q Eq. 14, on ODE states, weight 1 at every time

ERRATUM (F Eq. 10-11): the reward depends on the *state* alone. For any f, E_a[grad log pi(a|x) f(x)] = 0, so
once it is "strictly detached" the policy gradient is noise around zero: `literal` learns nothing. What trains
in the released code is the missing detach: rho grad KL_t is the direct gradient of F Eq. 9, plus that noise.
`sampled` has the same mean, because its reward looks at the action; `analytic` is the same mean with the
action integrated out, which needs tens of times fewer trajectories (tests/linear_gaussian.py measures it).

The released log-prob is a mean over D, which gives that noise one more factor 1/D than grad KL_t has: at
D = 65,536 `released` is `analytic` but for the clip.

None of these sees that today's action decides tomorrow's states: they descend the KL with the visited states
held fixed. Only the two `path` forms carry that second part, grad log pi(a|x_t) times what comes later, and
follow the KL of whole trajectories. The price is the variance of a policy gradient and a second pass over the
states, since the future is unknown when the step is taken.

ERRATUM (F Eq. 11): "averaged over ... all T steps", but the prefactor is 1/(BG) and the sum runs over the T+1
values t = 0..T, although T steps have T actions; Eq. 12's expectation *is* an average over t. So lambda has
no meaning across step counts until both use one of the two. Here every function returns one transition's
term, (B,), and the caller takes one mean over samples and steps for both.
ERRATUM (F Eq. 12): the anchor is v_base in the text, v_aesthetic in the formula; its weight lambda is beta =
0.02 in App. A. F Eq. 1 has data at t=1, F Eq. 5-9 hold with data at t=0 only (see sde.py).
ERRATUM (Q Eq. 14, 19): with t_0 = 1 and t_N ~ 0, n = 1..N counts the finished image, where an N-step ODE
evaluates no velocity, and skips the pure noise, where it does. The states to use are n = 0..N-1. And Eq. 18's
dt is lost in Eq. 19: the plain sum is the integral only on a uniform grid; on a shifted one it favours high
noise.

Notation: B samples, T steps, D numbers a sample; v, x (B, ...), times and sigma floats or (B,), losses (B,).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from grpo import clipped_objective
from kl import velocity_kl
from sde import Time, flat_reduce, full_precision, log_prob, same_shape, sde_mean

# What each estimator needs besides the two velocities: the ratio needs the action, `path` what came after it.
NEEDS = {
    "literal": ("x", "x_next"),
    "released": ("x", "x_next"),
    "analytic": (),
    "sampled": ("x", "x_next"),
    "path": ("x", "x_next", "future"),
    "sampled_path": ("x", "x_next", "future"),
    "velocity": (),
}
ESTIMATORS = tuple(NEEDS)
# Known at the moment of the step: backward may run inside the rollout, with no stored trajectory.
SINGLE_PASS = tuple(name for name, needs in NEEDS.items() if "future" not in needs)
NEEDS_ODE = ("velocity",)  # Q's objective is defined on the states of the deterministic sampler


# --------------------------------------------------------------------------------------- who teaches what
def route(tasks: Sequence[str], experts: Mapping[str, str]) -> dict[str, Tensor]:
    """F Eq. 7's R(c), hard routing: which rows of a batch does each expert label?

    tasks: B task names, one a sample; experts: task -> expert name (two tasks may share one). Returns expert
    -> its rows, ascending int64, in order of first appearance; every row occurs exactly once. F routes on the
    prompt c; the prompt's data set is what says its task. Raises ValueError for a task that no expert
    teaches."""
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(tasks):
        if task not in experts:
            raise ValueError(f"no expert for task {task!r}; there are experts for {sorted(experts)}")
        rows.setdefault(experts[task], []).append(row)
    return {expert: torch.tensor(own) for expert, own in rows.items()}


@torch.no_grad()
def target_velocity(
    rows_by_expert: Mapping[str, Tensor],
    velocity: Callable[[str, Tensor, Tensor, Time], Tensor],
    x: Tensor,
    t: Time,
) -> Tensor:
    """F Eq. 7: v_target, (B, ...), float32 at least, no gradient: each row from its own teacher.

    velocity(expert, rows, x[rows], t) -> (len(rows), ...), with t[rows] where t is (B,). It is called once an
    expert, so that full-size teachers can take turns on the accelerator (Q §4.3) and move once a call.
    Raises ValueError unless the rows name each of the B samples exactly once and the answers fit them."""
    rows_seen = sorted(row for rows in rows_by_expert.values() for row in rows.tolist())
    if rows_seen != list(range(len(x))):
        raise ValueError(f"every one of the {len(x)} samples needs exactly one expert, got rows {rows_seen}")
    v_target = torch.empty_like(full_precision(x))  # (B, ...)
    for expert, rows in rows_by_expert.items():
        per_row = isinstance(t, Tensor) and t.ndim > 0
        v = velocity(expert, rows, x[rows], t[rows] if per_row else t)
        if v.shape != x[rows].shape:
            raise ValueError(f"expert {expert!r} returned {tuple(v.shape)} for states {tuple(x[rows].shape)}")
        v_target[rows] = full_precision(v).to(v_target)
    return v_target


# --------------------------------------------------------------------------------- rewards along a trajectory
@torch.no_grad()
def dense_reward(
    v_student: Tensor,
    v_target: Tensor,
    t: Time,
    dt: Time,
    sigma: Time,
    reduce: str = "sum",
    scale: str = "true",
) -> Tensor:
    """F Eq. 10: r_t = -w(t) ||v_student - v_target||^2 <= 0, nats, (B,), no gradient.

    A fine thing to log; as the reward of a policy gradient it is a baseline, not a signal (see `literal`).
    Raises as `kl.velocity_kl`."""
    return -velocity_kl(v_student, v_target, t, dt, sigma, reduce, scale)


@torch.no_grad()
def sampled_reward(
    x_next: Tensor,
    mean_target: Tensor,
    mean_old: Tensor,
    std: Time,
    reduce: str = "sum",
) -> Tensor:
    """F Eq. 2's log-ratio at one action: log pi_target(a|x_t) - log pi_old(a|x_t), (B,), no gradient.

    Its mean over a ~ pi_old is -KL(pi_old || pi_target): the dense reward, but one that looks at the action.
    Raises ValueError where shapes differ or std is 0."""
    same_shape(mean_target=mean_target, mean_old=mean_old)
    return log_prob(x_next, mean_target, std, reduce) - log_prob(x_next, mean_old, std, reduce)


def reward_to_go(per_step_TB: Tensor, inclusive: bool = True) -> Tensor:
    """Suffix sums over the steps (F Eq. 2, 11), (T, B) -> (T, B), float32 at least; gradients flow: detach them.

    inclusive: this and all later steps (`future` of "sampled_path", from `sampled_reward`). Otherwise the
    later steps only, 0 at the last (`future` of "path", from the KLs): an action cannot change the KL of the
    state it was taken in, so that crediting it with that KL would add variance and no signal (causality)."""
    steps_TB = full_precision(per_step_TB)
    suffix_TB = steps_TB.flip(0).cumsum(0).flip(0)  # sum_{s >= t} r_s
    return suffix_TB if inclusive else torch.cat([suffix_TB[1:], torch.zeros_like(suffix_TB[:1])])


# ------------------------------------------------------------------------------------------------- the losses
def velocity_matching(v_student: Tensor, v_teacher: Tensor, reduce: str = "sum") -> Tensor:
    """Q Eq. 14's summand ||v_student - v_teacher||^2, (B,), gradient to the student only.

    DEVIATION: Q Eq. 18 is an expectation over p_t^theta, which moves with theta; like Q's own training, this
    is the gradient at fixed states. Raises ValueError where shapes differ or `reduce` is unknown."""
    same_shape(v_student=v_student, v_teacher=v_teacher)
    return flat_reduce((full_precision(v_student) - full_precision(v_teacher).detach()).square(), reduce)


def mar_penalty(
    v_student: Tensor,
    v_anchor: Tensor,
    t: Time,
    dt: Time,
    sigma: Time,
    reduce: str = "sum",
    scale: str = "true",
) -> Tensor:
    """F Eq. 12's bracket, manifold anchor regularization: w(t) ||v_student - v_anchor||^2 in nats, (B,).

    The KL to a frozen aesthetic teacher, on *every* sample whatever its task; weigh it by lambda (0.02).
    Gradient to the student only, and direct: F got this term right where its Eq. 11 went wrong. Raises as
    `velocity_kl`."""
    return velocity_kl(v_student, v_anchor.detach(), t, dt, sigma, reduce, scale)


def opd_loss(
    estimator: str, *, v_student: Tensor, v_target: Tensor, t: Time, dt: Time, sigma: Time,
    x: Tensor | None = None, x_next: Tensor | None = None, log_prob_old: Tensor | None = None,
    future: Tensor | None = None, clip: float | None = None, reduce: str = "sum", scale: str = "true",
) -> Tensor:  # fmt: skip
    """F Eq. 10-11, Q Eq. 14: the loss of one transition, (B,), to be minimised; estimators: see the top.

    v_student, x, x_next: (B, ...), from a step of `sde.rollout` (kernel "sde"); v_target: the teacher at x.
    log_prob_old: (B,) of x_next under the policy that sampled it, same `reduce`. None says that it is this
        student: rho is exactly 1, and its gradient is grad log pi.
    future: (B,) from `reward_to_go`, path estimators only, in the same `reduce` and `scale`.
    clip: eps of F Eq. 11, or None. It belongs to `reduce`: 1e-4 goes with "mean".
    reduce: of KLs, norms and log-probs. scale: of the KL alone (`kl.velocity_kl`).
    The gradient reaches v_student only. Raises ValueError for an unknown estimator, a missing argument (by
    name) and unequal shapes. ERRATUM (released code): a (B, 1) reward times a (B,) ratio is (B, B), so that
    every sample is credited with the mean of the batch, and nothing complains."""
    _check_given(estimator, x=x, x_next=x_next, future=future)
    v_target = v_target.detach()
    if estimator == "velocity":
        return velocity_matching(v_student, v_target, reduce)
    kl = velocity_kl(v_student, v_target, t, dt, sigma, reduce, scale)  # (B,), gradient to the student
    if estimator == "analytic":
        return kl

    def log_policy(v):  # log pi_v(a|x_t), (B,)
        return log_prob(x_next.detach(), sde_mean(x.detach(), v, t, dt, sigma), sigma * dt**0.5, reduce)

    log_prob_new = log_policy(v_student)
    log_prob_old = (log_prob_new if log_prob_old is None else full_precision(log_prob_old)).detach()
    same_shape(log_prob=log_prob_new, log_prob_old=log_prob_old)
    ratio = torch.exp(log_prob_new - log_prob_old)  # rho, (B,)
    if estimator == "path":
        # grad E[sum_t KL_t] = E[sum_t grad KL_t + grad log pi(a_t|x_t) sum_{s>t} KL_s]. DEVIATION: under
        # "mean" the log-prob and the later KLs are both divided by D; one D back keeps the parts in step.
        dims = v_student.shape[1:].numel() if reduce == "mean" else 1
        return kl - dims * clipped_objective(ratio, -future.detach(), clip)
    if estimator == "literal":
        credit = -kl.detach()  # ERRATUM (F Eq. 10): only rho has a gradient, and its mean is zero
    elif estimator == "released":
        credit = -kl  # DEVIATION (F Eq. 10), as in the authors' code: grad kl, plus the same noise
    elif estimator == "sampled":
        credit = log_policy(v_target) - log_prob_old
    else:
        credit = future.detach()
    return -clipped_objective(ratio, credit, clip)


def _check_given(estimator: str, **given: Tensor | None) -> None:
    """Raise ValueError for an unknown estimator, or naming the arguments that it needs and did not get."""
    if estimator not in NEEDS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}, not {estimator!r}")
    missing = [name for name in NEEDS[estimator] if given[name] is None]
    if missing:
        raise ValueError(f"estimator {estimator!r} needs {' and '.join(missing)}")
