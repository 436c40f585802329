"""On-policy distillation: how does a student learn from several teachers on the states it visits itself?

The student rolls out its own trajectory. The teacher of the sample's task says what it would do in each state,
and the student is pulled towards that. F does this between stochastic policies, Q between velocities:

    F Eq. 2     min KL(pi_student || pi_teacher)            reverse KL, on the student's own samples
    F Eq. 7     v_target(x, t, c) = v_k(x, t, c), k = R(c)  `route`, `target_velocity`
    F Eq. 10    r_t = -w(t) ||v_student - v_target||^2      `dense_reward`, detached
    F Eq. 11    max sum_t min(rho_t r_t, clip(rho_t) r_t)   `literal`; six others in `ESTIMATORS`
    F Eq. 12    + lambda E[w(t) ||v_student - v_anchor||^2] `mar_penalty`
    Q Eq. 14    min sum_n ||v_student - v_teacher||^2       `velocity_matching`, `velocity`; Eq. 19 is the same

The seven estimators, in three lines:
- `literal`, F Eq. 10-11 as printed, learns nothing: its gradient has mean zero (see `literal`).
- `analytic` (the default), `released` and `sampled` have one mean gradient, that of F Eq. 9 at the visited
  states. `analytic` needs tens of times fewer trajectories (tests/helpers/linear_gaussian.py measures it).
- `path` and `sampled_path` also see that an action decides the later states. They follow the KL of whole
  trajectories, with the variance of a policy gradient and a second pass over the states.

docs/PAPERS.md has the argument, the errata of F Eq. 1, 10-12 and Q Eq. 14, 19, and what the papers leave open.

Notation: B samples, T steps, D numbers a sample; v, x (B, ...), times and sigma floats or (B,), losses (B,).
Every loss is one transition's term. The caller takes one mean over samples and steps. ERRATUM (F Eq. 11): the
sum over t = 0..T has T+1 terms and no mean, where Eq. 12 is a mean, so lambda would depend on T.

DEVIATION (F Eq. 9-12): what is added, every estimator and MAR, is the equation's sum over the D numbers divided
by D, under every setting (with the weight w(t): nats per dimension). So lambda means one thing at every resolution.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo import clipped_objective, log_ratio, ratio_terms
from kl import kl_weight
from sde import Time, Transition, flat_reduce, full_precision, per_sample, same_shape, sde_mean


# --------------------------------------------------------------------------------------- who teaches what
def route(tasks: Sequence[str], experts: Mapping[str, str]) -> dict[str, Tensor]:
    """F Eq. 7's R(c), hard routing: {expert: its rows of the batch}, ascending int64, every row exactly once.

    tasks: B task names, one a sample; experts: task -> expert name (two tasks may share one). F routes on the
    prompt c; the prompt's data set says its task. Raises ValueError for a task that no expert teaches.
    """
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

    velocity(expert, rows, x[rows], t) -> (len(rows), ...), with t[rows] if t is (B,). It is called once for
    each expert, so that full-size teachers can take turns on the accelerator (Q §4.3). Raises ValueError unless
    the rows name each of the B samples exactly once and the answers have the shape of their states.
    """
    rows_seen = sorted(row for rows in rows_by_expert.values() for row in rows.tolist())
    if rows_seen != list(range(len(x))):
        raise ValueError(f"every one of the {len(x)} samples needs exactly one expert, got rows {rows_seen}")
    v_target = torch.empty_like(full_precision(x))  # (B, ...)
    for expert, rows in rows_by_expert.items():
        own_t = t[rows] if isinstance(t, Tensor) and t.ndim > 0 else t  # (B,) or one time for all
        v = velocity(expert, rows, x[rows], own_t)
        same_shape(answer=v, states=x[rows])
        v_target[rows] = full_precision(v).to(v_target)
    return v_target


# ------------------------------------------------------------------ one line, several weights (F Eq. 9, Q Eq. 14)
def velocity_matching(v_student: Tensor, v_teacher: Tensor, reduce: str = "sum") -> Tensor:
    """Q Eq. 14: the summand ||v_student - v_teacher||^2, (B,), gradient to the student only.

    DEVIATION (Q Eq. 18): it is an expectation over p_t^theta, which moves with theta; like Q's own training, this
    is the gradient at fixed states. Raises ValueError if shapes differ or `reduce` is unknown.
    """
    same_shape(v_student=v_student, v_teacher=v_teacher)
    return flat_reduce((full_precision(v_student) - full_precision(v_teacher).detach()).square(), reduce)


def time_weight(name: str, t: Time, dt: Time, sigma: Time) -> Time:
    """The weight of ||v_student - v_target||^2 at time t; a float, or (B,).

    kl       w(t), F Eq. 9: the true KL of the two policies, in nats
    kl_dt    w(t) dt: the released code, which divides by 2 sigma^2 where F Eq. 8 has 2 sigma^2 dt
    uniform  1, Q Eq. 14
    dt       dt, Q Eq. 18: the integral over time. ERRATUM (Q Eq. 19): it loses dt
    ode      dt^2/2: the squared distance of two ODE steps, halved (DiffusionOPD; in neither paper)
    The first two need sigma > 0. Raises ValueError for sigma = 0 there and for an unknown name.
    """
    if name in ("kl", "kl_dt"):
        w = kl_weight(t, dt, sigma)
        return w if name == "kl" else w * full_precision(dt)
    if name in ("uniform", "dt", "ode"):
        dt = full_precision(dt)
        return {"uniform": 1.0, "dt": dt, "ode": dt**2 / 2}[name]
    raise ValueError(f"weight must be kl, kl_dt, uniform, dt or ode, not {name!r}")


def weighted_gap(
    v_student: Tensor, v_target: Tensor, t: Time, dt: Time, sigma: Time, reduce: str = "sum", weight: str = "kl"
) -> Tensor:
    """F Eq. 9, Q Eq. 14: weight(t) ||v_student - v_target||^2, (B,), gradient to the student only.

    With the weight "kl" this is KL(pi_student || pi_target) in nats, or with the reduction "mean" in nats per
    dimension. Raises as `time_weight` and `velocity_matching`.
    """
    gap_B = velocity_matching(v_student, v_target, reduce)
    return gap_B * per_sample(time_weight(weight, t, dt, sigma), gap_B)


@torch.no_grad()
def dense_reward(
    v_student: Tensor, v_target: Tensor, t: Time, dt: Time, sigma: Time, reduce: str = "sum", weight: str = "kl"
) -> Tensor:
    """F Eq. 10: r_t = -w(t) ||v_student - v_target||^2 <= 0, (B,), no gradient. Raises as `weighted_gap`."""
    return -weighted_gap(v_student, v_target, t, dt, sigma, reduce, weight)


def mar_penalty(
    v_student: Tensor, v_anchor: Tensor, t: Time, dt: Time, sigma: Time, reduce: str = "sum", weight: str = "kl"
) -> Tensor:
    """F Eq. 12's bracket, manifold anchor regularization: w(t) ||v_student - v_anchor||^2, (B,).

    The anchor is a frozen aesthetic teacher; the term is taken on every sample, whatever its task, and counts
    lambda times (0.02, F App. A's beta). ERRATUM (F Eq. 12): v_base in the text, v_aesthetic in the formula.
    Gradient to the student only. `weight` is the estimator's. Raises as `weighted_gap`.
    """
    return weighted_gap(v_student, v_anchor, t, dt, sigma, reduce, weight)


# ------------------------------------------------------------------------------- one transition, as it is learnt
class Visit(NamedTuple):
    """One transition of the student's rollout (`sde.rollout`, kernel "sde"), and how it is judged."""

    step: Transition  # the state x_t, the action a = x_{t-dt}, and v and mean of the policy that drew it, pi_old
    v_target: Tensor  # (B, ...) F Eq. 7, `target_velocity`
    v_anchor: Tensor | None = None  # (B, ...) F Eq. 12; None: without MAR
    future: Tensor | None = None  # (B,) from `credited`, for the two path estimators
    weight: str = "kl"  # of the squared norm, see `time_weight`
    reduce: str = "sum"  # of rho's log-probs: rho, or its D-th root ("mean", the released code)
    clip: float | None = None  # eps of F Eq. 11; it belongs to `reduce`: 1e-4 goes with "mean"
    credit_clip: float = math.inf  # largest absolute reward, in the unit of the losses (5 in the released code)


Estimate = tuple[Tensor, dict[str, Tensor]]  # a loss, (B,), and `grpo.ratio_terms`


def kl_t(at: Visit, v: Tensor) -> Tensor:
    """KL_t of the formulas below: `weighted_gap` to the teacher at this state, per dimension, (B,), gradient to v."""
    return weighted_gap(v, at.v_target, at.step.t, at.step.dt, at.step.sigma, "mean", at.weight)


def log_ratio_of(at: Visit, v: Tensor, reduce: str) -> Tensor:
    """F Eq. 6: log pi_v(a|x_t) - log pi_old(a|x_t), (B,), pi_v the policy if the velocity were v; gradient to v."""
    return log_ratio(at.step, sde_mean(at.step.x.detach(), v, at.step.t, at.step.dt, at.step.sigma), reduce)


def surrogate(at: Visit, v: Tensor, credit: Tensor, scale: int = 1) -> Estimate:
    """F Eq. 11: -A - scale (min(rho A, clip(rho) A) - A), A the clamped credit, (B,); scale 1 is the equation.

    rho = pi_v(a|x_t) / pi_old(a|x_t), or its D-th root; exactly 1 if v is what drew the action. Gradients flow
    through rho and the credit.
    """
    rho = log_ratio_of(at, v, at.reduce).exp()
    credit = full_precision(credit).clamp(-at.credit_clip, at.credit_clip)
    objective = clipped_objective(rho, credit, at.clip)
    return -credit - scale * (objective - credit), ratio_terms(rho, credit, objective)


def policy_gradient(at: Visit, v: Tensor, credit: Tensor) -> Estimate:
    """F Eq. 11 with a detached credit, (B,): at rho = 1 its gradient is -credit grad log pi(a|x_t).

    credit: (B,), per dimension. The D-th root of rho has 1/D of rho's gradient: D gives it back, so that `reduce`
    decides where the clip acts and nothing else.
    """
    return surrogate(at, v, credit.detach(), v[0].numel() if at.reduce == "mean" else 1)


@torch.no_grad()
def sampled_reward(at: Visit) -> Tensor:
    """F Eq. 2's log-ratio at one action, [log pi_target(a|x_t) - log pi_old(a|x_t)] / D, (B,), no gradient.

    Times weight(t)/w(t), so that its mean over a ~ pi_old is -KL_t under every weight: F Eq. 10's reward, but one
    that looks at the action.
    """
    step, ratio_B = at.step, log_ratio_of(at, at.v_target, "mean")
    weight = time_weight(at.weight, step.t, step.dt, step.sigma) / kl_weight(step.t, step.dt, step.sigma)  # 1 with "kl"
    return ratio_B * per_sample(weight, ratio_B)


# ------------------------------------------------------------------------------------------------ the estimators
# Each takes a visit and the student's velocity v with its gradient, and returns a loss, (B,), to be minimised, and
# `grpo.ratio_terms` if it has a ratio. [.] is detached; KL_t, and log-probs outside of rho, are per dimension. All but
# `velocity` and `analytic` need sigma > 0. The gradient reaches v only. Raises: ValueError for unequal shapes.
# ERRATUM (F's code): a (B, 1) reward times a (B,) ratio is (B, B), so that every sample is credited with the mean
# of the batch.
def literal(at: Visit, v: Tensor) -> Estimate:
    """-clip(rho [-KL_t]): F Eq. 10-11 as printed.

    ERRATUM (F Eq. 10-11): the reward is detached and depends on the state alone, not on the action. For any f,
    E_a[grad log pi(a|x) f(x)] = 0, so the gradient is noise around zero.
    """
    step = at.step
    return policy_gradient(at, v, dense_reward(v, at.v_target, step.t, step.dt, step.sigma, "mean", at.weight))


def released(at: Visit, v: Tensor) -> Estimate:
    """-clip(rho (-KL_t)): the authors' code.

    DEVIATION (F Eq. 10): it learns because the detach is missing. rho grad KL_t is the gradient of F Eq. 9;
    KL_t grad rho is the noise of `literal`. As in their code, that noise is D times smaller if rho is the D-th
    root ("mean"): the only gradient at rho = 1 that `reduce` changes, and its mean is zero either way.
    """
    return surrogate(at, v, -kl_t(at, v))


def analytic(at: Visit, v: Tensor) -> Estimate:
    """KL_t: F Eq. 9 itself, the default. The mean of `sampled` with the action integrated out."""
    return kl_t(at, v), {}


def sampled(at: Visit, v: Tensor) -> Estimate:
    """-clip(rho [log pi_target(a|x_t) - log pi_old(a|x_t)]): the recipe of language models that F cites."""
    return policy_gradient(at, v, sampled_reward(at))


def path(at: Visit, v: Tensor) -> Estimate:
    """KL_t - clip(rho [-sum_{s>t} KL_s]): the exact gradient of the KL of whole trajectories.

    grad E[sum_t KL_t] = E[sum_t grad KL_t + grad log pi(a_t|x_t) sum_{s>t} KL_s]. It is exact if the noise begins
    with the first step and no noisy step before the last trained one is left out: then no state depends on theta
    except through actions that are credited.
    """
    loss_B, stats = policy_gradient(at, v, -at.future)
    return kl_t(at, v) + loss_B, stats


def sampled_path(at: Visit, v: Tensor) -> Estimate:
    """-clip(rho [sum_{s>=t} sampled reward_s]): the same mean by policy gradient alone."""
    return policy_gradient(at, v, at.future)


def velocity(at: Visit, v: Tensor) -> Estimate:
    """||v - v_target||^2 / D: Q Eq. 14, which is `analytic` with weight 1, for the states of the ODE.

    ERRATUM (Q Eq. 14, 19): with t_0 = 1 and t_N ~ 0, n = 1..N counts the finished image, where an N-step ODE
    evaluates no velocity, and leaves out the pure noise. The states to use are n = 0..N-1.
    """
    return analytic(at._replace(weight="uniform"), v)


def reward_to_go(per_step_TB: Tensor, inclusive: bool = True) -> Tensor:
    """sum_{s>=t} r_s (F Eq. 2, 11), or sum_{s>t} r_s if not inclusive; (T, B) -> (T, B), float32 at least."""
    steps_TB = full_precision(per_step_TB)
    suffix_TB = steps_TB.flip(0).cumsum(0).flip(0)  # sum_{s>=t} r_s
    return suffix_TB if inclusive else torch.cat([suffix_TB[1:], torch.zeros_like(suffix_TB[:1])])


@torch.no_grad()
def credited(estimator: str, visits: Sequence[Visit]) -> list[Visit]:
    """Visits with the `future` that their actions are credited with, (B,), no gradient, if the estimator looks at it.

    visits: the trained transitions of a trajectory in order. path: the KLs of later states. An action cannot change
    the KL of the state it was taken in, so that term would add variance and no signal. sampled_path: the
    `sampled_reward` of this and later actions.
    """
    if estimator == "path":
        credit = reward_to_go(torch.stack([kl_t(at, at.step.v) for at in visits]), inclusive=False)
    elif estimator == "sampled_path":
        credit = reward_to_go(torch.stack([sampled_reward(at) for at in visits]))
    else:
        return list(visits)
    return [at._replace(future=future) for at, future in zip(visits, credit, strict=True)]


Estimator = Callable[[Visit, Tensor], Estimate]
ESTIMATORS: dict[str, Estimator] = {
    f.__name__: f for f in (literal, released, analytic, sampled, path, sampled_path, velocity)
}
NEEDS_FUTURE = ("path", "sampled_path")  # a second pass over the stored trajectory; the others train as they walk


# --------------------------------------------------------------------------------- which states are learnt from
# In neither paper. The S states of a trajectory cost alike and teach differently. Of each trajectory, k are learnt
# from: drawn with p_n and weighed by 1/p_n, so that the mean gradient stays that of all S states.
def state_probabilities(size_S: Tensor, floor: float = 0.1) -> Tensor:
    """p_n = (1 - floor) size_n / sum size + floor / S, (S,), float64, sum 1.

    size_S >= 0: the root mean square of the gradient at each state, in any unit; 0 if it is not known, then it counts
    as the mean of the others. The variance of a drawn state's weighted gradient is least with p_n proportional to it.
    The floor keeps every p_n >= floor / S, so that no draw weighs more than 1 / (k floor).
    """
    size_S = size_S.double()
    known = size_S > 0
    size_S = torch.where(known, size_S, size_S[known].mean() if known.any() else 1.0)
    return (1 - floor) * size_S / size_S.sum() + floor / len(size_S)


def state_weights(p_S: Tensor, count: int, u_B: Tensor) -> Tensor:
    """W, (S, B), float32: for every row b, sum_n W_nb L_n has the mean over all states, 1/S sum_n L_n, as its mean.

    Row b draws k = `count` of the S states at the places (u_b + j) / k, j = 0..k-1, of the cumulated p_S, with u_b
    uniform in [0, 1) (systematic sampling). State n is drawn c_n times, the mean of c_n is k p_n, and
    W_nb = c_n / (k S p_n). Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    p_S, places = p_S.double(), (u_B.double()[:, None] + torch.arange(count)) / count  # (B, k)
    n = torch.bucketize(places, p_S.cumsum(0)[:-1], right=True)  # (B, k) in 0..S-1
    c_SB = torch.nn.functional.one_hot(n, len(p_S)).sum(1).T
    return (c_SB / (count * len(p_S) * p_S[:, None])).float()


@torch.no_grad()
def state_size_sq(at: Visit, v: Tensor) -> Tensor:
    """weight(t)^2 ||v - v_target||^2 / D, (B,), no gradient: the squared gradient of KL_t by v, times D/4."""
    kl_B = kl_t(at, v)
    return kl_B * per_sample(time_weight(at.weight, at.step.t, at.step.dt, at.step.sigma), kl_B)


def running_size(size_S: Tensor, total_S: Tensor, count_S: Tensor, decay: float = 0.9) -> Tensor:
    """size <- sqrt(decay size^2 + (1 - decay) total / count), (S,), the sizes of `state_probabilities`.

    total_S: sums of `state_size_sq` over count_S rows of one step. A state seen for the first time gets the root of its
    mean, one that was not seen keeps its size.
    """
    mean_S = total_S / count_S
    moved_S = torch.where(size_S > 0, decay * size_S.square() + (1 - decay) * mean_S, mean_S).sqrt()
    return torch.where(count_S > 0, moved_S, size_S)
