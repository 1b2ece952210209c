"""Whether a plan is inside a site's policy: one small rule a key, and every reason why it is not.

Each rule looks at what the site would *use*: the noise multiplier and the unit of the plan's promise, the steps that
promise covers, the fewest sites with which the coordinator's rules let a round be combined. What a plan says of itself
beyond that (that its noise keeps its ε, that its adapter has the size it states) is not judged here: the promise's
`check` and the site's own layout show it, and they come after, because this costs nothing and bounds what they compute.
Knows no file and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase

from fedtune.config.plan import StudyPlan
from fedtune.data.units import RECORD
from fedtune.privacy.plan import public_count
from fedtune_client.policy.reasons import Case, Reason, at_least, at_most, listed, number, one_of, reason
from fedtune_client.policy.schema import Policy

METRICS = ("off", "noisy", "coarse", "clear")  # from nothing to everything

Rule = Callable[[Case], Reason | None]


def judge(plan: StudyPlan, policy: Policy, *, approved: bool, units: int | None) -> tuple[Reason, ...]:
    """Return every reason why `plan` is outside `policy`; none when it is inside.

    `approved` says whether a person has agreed to this plan's hash, `units` how many privacy units of the data set
    would take part (None: not known, which is too few); only their rounded number is used. Opening hours are not
    judged: they hold for each round, see `fedtune_client.policy.hours`.
    """
    case = Case(plan, policy, approved, units)
    return tuple(found for rule in RULES if (found := rule(case)) is not None)


def base_model(case: Case) -> Reason | None:
    """Require one of the base models allowed, by content."""
    models, found = case.policy.models, case.plan.model.sha256
    if models == "any" or found in {model.sha256 for model in models}:
        return None
    return reason("base-model", "the base model", found, listed(model.name or model.sha256 for model in models))


def data_set(case: Case) -> Reason | None:
    """Require a data set that the policy names."""
    return one_of("data-set", "the data set", case.plan.data.name, case.policy.data)


def purpose(case: Case) -> Reason | None:
    """Require a purpose that the data set may serve."""
    return None if case.data is None else one_of("purpose", "the purpose", case.plan.purpose, case.data.purposes)


def unit(case: Case) -> Reason | None:
    """Require a promise about a unit that is allowed for the data set."""
    return None if case.data is None else one_of("unit", "the privacy unit", case.plan.promise.unit, case.data.units)


def columns(case: Case) -> Reason | None:
    """Require that the plan names no other columns than those allowed."""
    if case.data is None or case.data.columns == "any":
        return None
    other = sorted(_columns(case.plan) - set(case.data.columns))
    return reason("columns", "a column to read", listed(other), listed(case.data.columns)) if other else None


def few_units(case: Case) -> Reason | None:
    """Require units enough for one to disappear among them."""
    if case.data is None or case.data.min_units == 0:
        return None
    if case.units is None:
        return reason("few-units", "the number of units", "not known", f"at least {case.data.min_units}")
    return at_least("few-units", "the number of units", public_count(case.units), case.data.min_units)


def task(case: Case) -> Reason | None:
    """Require one of the tasks allowed."""
    return one_of("task", "the task", case.plan.task.kind, case.policy.tasks)


def privacy_off(case: Case) -> Reason | None:
    """Require privacy, unless the policy allows a study without it in so many words."""
    if case.private or case.policy.privacy.allow_off:
        return None
    return reason("privacy-off", "privacy", "off", "dp")


def noise_floor(case: Case) -> Reason | None:
    """Require the floor of the noise that is added to each clipped sum, in units of the clip norm.

    It is the noise of one step, whatever the sampler: the noise bounds what one update reveals even to a coordinator
    who knows which units were drawn, so nothing is deducted for sampling.
    """
    found, floor = case.plan.promise.noise_multiplier, case.policy.privacy.min_noise_multiplier
    return at_least("noise-floor", "the noise multiplier", found, floor) if case.private else None


def evaluation_noise(case: Case) -> Reason | None:
    """Require that noisy metrics are noisy: by the same floor, and by some noise even in a study without privacy."""
    if case.plan.evaluation.site_metrics != "noisy":
        return None
    found, floor = case.plan.promise.evaluation_noise_multiplier, case.policy.privacy.min_noise_multiplier
    what = "the noise multiplier of held-out metrics"
    if not found > 0:
        return reason("evaluation-noise", what, number(found), "no noisy metrics without noise")
    return at_least("evaluation-noise", what, found, floor)


def seeded_noise(case: Case) -> Reason | None:
    """Require noise from a cryptographic generator, where the site wants that."""
    found, wanted = case.plan.promise.noise, case.policy.privacy.require_secure_noise
    return one_of("seeded-noise", "the source of the noise", found, ("secure",)) if wanted and case.private else None


def study_epsilon(case: Case) -> Reason | None:
    """Require an ε of at most that of one study."""
    found, cap = case.plan.promise.epsilon, case.policy.privacy.study_epsilon
    return at_most("study-epsilon", "the study's ε", found, cap) if case.private else None


def lifetime_epsilon(case: Case) -> Reason | None:
    """Require that this study alone stays below the data set's cap for all; what is spent already, the ledger adds.

    The plan's ε holds at every δ above its own too, so a plan inside the policy's δ is compared with the cap as it is.
    """
    if case.data is None or not case.private:
        return None
    cap = case.data.lifetime_epsilon
    return at_most("lifetime-epsilon", "the study's ε", case.plan.promise.epsilon, cap, "of a lifetime")


def delta(case: Case) -> Reason | None:
    """Require a δ of at most the ceiling."""
    found, ceiling = case.plan.promise.delta, case.policy.privacy.delta
    return at_most("delta", "δ", found, ceiling) if case.private else None


def clip_norm(case: Case) -> Reason | None:
    """Require a clip norm in the range, where there is one."""
    allowed, found = case.policy.privacy.clip_norm, case.plan.promise.clip_norm
    if allowed == "any" or not case.private or allowed.min <= found <= allowed.max:
        return None
    return reason("clip-norm", "the clip norm", number(found), f"{number(allowed.min)} to {number(allowed.max)}")


def rounds(case: Case) -> Reason | None:
    """Require no more rounds than allowed."""
    return at_most("rounds", "the number of rounds", case.plan.federation.rounds, case.policy.training.max_rounds)


def local_steps(case: Case) -> Reason | None:
    """Require no more local steps in a round than allowed."""
    found, most = case.plan.training.local_steps, case.policy.training.max_local_steps
    return at_most("local-steps", "the number of local steps", found, most)


def total_steps(case: Case) -> Reason | None:
    """Require no more steps in all than allowed, also of the promise, which may cover more than the rounds."""
    found = max(case.plan.total_steps, case.plan.promise.max_steps)
    return at_most("total-steps", "the number of steps", found, case.policy.training.max_total_steps)


def max_tokens(case: Case) -> Reason | None:
    """Require examples no longer than allowed."""
    found, most = case.plan.data.max_tokens, case.policy.training.max_tokens
    return at_most("max-tokens", "the tokens of an example", found, most)


def rank(case: Case) -> Reason | None:
    """Require a rank of at most that allowed."""
    return at_most("rank", "the rank", case.plan.lora.rank, case.policy.adapter.max_rank)


def targets(case: Case) -> Reason | None:
    """Require an adapter that sits only where it may.

    `all-linear` covers every choice, since nothing but linear layers can carry an adapter; `auto` covers itself alone.
    A name covers its longer forms (`v_proj` covers `self_attn.v_proj`), because those name fewer modules.
    """
    allowed, wanted = case.policy.adapter.targets, case.plan.lora.targets
    if allowed == "any" or "all-linear" in allowed:
        return None
    if isinstance(wanted, str):
        return one_of("targets", "the target modules", wanted, allowed)
    other = [name for name in wanted if not any(_covers(pattern, name) for pattern in allowed)]
    return reason("targets", "a target module", listed(other), listed(allowed)) if other or not wanted else None


def upload_bytes(case: Case) -> Reason | None:
    """Require updates no larger than allowed, by the size of the adapter that the plan states."""
    found, most = case.plan.adapter.upload_bytes, case.policy.adapter.max_upload_bytes
    return at_most("upload-bytes", "the bytes of an update", found, most)


def sites(case: Case) -> Reason | None:
    """Require enough sites, even if no more are ready than the plan's quorum wants."""
    found, least = _fewest_sites(case.plan), case.policy.federation.min_sites
    return at_least("sites", "the fewest sites to begin with", found, least)


def sites_per_round(case: Case) -> Reason | None:
    """Require enough updates in each round, even if no more answer than the plan's quorum wants."""
    federation = case.plan.federation
    asked = min(_fewest_sites(case.plan), federation.sites_per_round or federation.sites)
    found = max(1, math.ceil(federation.quorum * asked))
    least = case.policy.federation.min_sites_per_round
    return at_least("sites-per-round", "the fewest updates that a round combines", found, least)


def secure_aggregation(case: Case) -> Reason | None:
    """Require secure aggregation, which no plan has: a site that wants it takes part in none."""
    if not case.policy.federation.require_secure_aggregation:
        return None
    return reason("secure-aggregation", "secure aggregation", "off", "required")


def site_metrics(case: Case) -> Reason | None:
    """Require that held-out metrics leave the site in no clearer form than allowed."""
    found, most = case.plan.evaluation.site_metrics, case.policy.evaluation.site_metrics
    return one_of("site-metrics", "what is told of held-out metrics", found, METRICS[: METRICS.index(most) + 1])


def not_approved(case: Case) -> Reason | None:
    """Require that a person has agreed to exactly this plan, where the site wants that."""
    if case.approved or not case.policy.require_approval:
        return None
    return reason("not-approved", "approval by a person", "none", f"fedtune client approve {case.plan.sha256}")


RULES: tuple[Rule, ...] = (
    base_model,
    data_set,
    purpose,
    unit,
    columns,
    few_units,
    task,
    privacy_off,
    noise_floor,
    evaluation_noise,
    seeded_noise,
    study_epsilon,
    lifetime_epsilon,
    delta,
    clip_norm,
    rounds,
    local_steps,
    total_steps,
    max_tokens,
    rank,
    targets,
    upload_bytes,
    sites,
    sites_per_round,
    secure_aggregation,
    site_metrics,
    not_approved,
)


def _columns(plan: StudyPlan) -> set[str]:
    """Return every column that a plan names."""
    others = {plan.promise.unit} - {RECORD} | {plan.data.partition.column or ""} - {""}
    return {*plan.task.used} | others


def _fewest_sites(plan: StudyPlan) -> int:
    """Return with how many sites ready a study begins."""
    return max(1, math.ceil(plan.federation.quorum * plan.federation.sites))


def _covers(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
