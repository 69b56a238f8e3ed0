"""Where prefixes lie: on the GPU, in host memory, or, without room, nowhere."""

from __future__ import annotations

from dataclasses import replace

from strategies import llama

from flexgen_ray import Placement, Policy, SamplingParams
from flexgen_ray.config import Budget, Workload
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import check_budget, stage_bytes, tier_totals
from flexgen_ray.planner.choose import PlanningProblem, choose_policy
from flexgen_ray.planner.stage_policies import StagePolicies
from flexgen_ray.request import Request
from flexgen_ray.runtime.prefixes import find_prefixes, measure_sharing
from flexgen_ray.runtime.worker import Machine

MODEL = llama(4, 64, 4, 2, 96, 300)
HOST = Policy(4, 2, cache=Placement(0, 1, 0), weights=Placement(0, 1, 0))
HEADER = [7] * 640
REQUESTS = [Request(i, [*HEADER, 1 + i, 2], SamplingParams(max_tokens=8)) for i in range(40)]


def problem(budget: Budget) -> PlanningProblem:
    shared = find_prefixes(REQUESTS)
    sharing = measure_sharing(REQUESTS, shared)
    workload = Workload(len(REQUESTS), 642, 650, mean_seq_len=10, sharing=sharing)
    machines = [Machine("here", "cpu", "CPU", 2**31, 2**31, 2**31, 1, False)]
    return PlanningProblem(MODEL, "float32", workload, machines, [budget], REQUESTS, shared=shared)


def bytes_of(plan: StagePlan) -> Budget:
    return tier_totals(stage_bytes(plan))


def test_prefixes_lie_on_the_gpu_or_else_in_host_memory_or_else_nothing_is_shared():
    """Whatever the memory, what fits without sharing still runs."""
    many, policies = Budget(2**30, 2**30, 2**30), StagePolicies((HOST,))
    (roomy,) = choose_policy(problem(many), policies).stages
    assert roomy.prefix_tier == "gpu" and roomy.prefix_pages == 40
    plain, seen = problem(many).without_sharing().stage_plans(policies)[0], set()
    least, most = bytes_of(plain).gpu, bytes_of(roomy).gpu * 11 // 10
    for step in range(13):
        budget = replace(many, gpu=least + (most - least) * step // 12)
        (plan,) = choose_policy(problem(budget), policies).stages
        check_budget(plan, budget)
        seen.add(plan.prefix_tier if plan.prefix_pages else "none")
    assert seen == {"none", "cpu", "gpu"}


def test_filled_tiers_share_prefixes_only_if_these_fit():
    for gpu in (6 * 2**20, 2**30):
        budget = Budget(gpu, 2**23, 2**30)
        (plan,) = choose_policy(problem(budget)).stages
        check_budget(plan, budget)
        assert (plan.prefix_pages > 0) is (gpu == 2**30)
