"""Which layers each stage of a pipeline has, and where each stage keeps what.

The shape of a block is the whole pipeline's; placement is each stage's own, as its hardware is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexgen_ray.config import Budget, Policy, Workload
from flexgen_ray.files.text_files import read_yaml
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import check_budgets
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.planner.fill import fill_tiers
from flexgen_ray.schedule.zigzag import StageLayers

AUTO = "auto"  # in place of a file: as if no policy were given
# What every stage must agree on, for all of them follow the first one's rows.
SHAPE = ("gpu_batch_size", "num_gpu_batches", "max_batch_tokens", "blocks_in_flight")


@dataclass(frozen=True)
class StagePolicies:
    """One policy for every stage, or each stage's own; layers: how many decoder layers each has.

    Raises ValueError if stages differ in a block's shape.
    """

    policies: tuple[Policy, ...]
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in SHAPE:
            values = {getattr(policy, name) for policy in self.policies}
            if len(values) > 1:
                raise ValueError(f"policy: {name} differs between stages; it is the pipeline's")
        if self.layers is not None and len(self.policies) not in (1, len(self.layers)):
            raise ValueError(
                f"policy: {len(self.policies)} stages have policies, {len(self.layers)} have layers"
            )

    def compressed(self, **lossy: int | float | None) -> StagePolicies:
        """Each policy with what is given of the lossy options (Policy.compressed)."""
        policies = tuple(policy.compressed(**lossy) for policy in self.policies)
        return replace(self, policies=policies)

    def with_default_bits(self, **bits: int | None) -> StagePolicies:
        """Each policy with these for the bits that it doesn't give."""

        def complete(policy: Policy) -> Policy:
            missing = {name: it for name, it in bits.items() if getattr(policy, name) is None}
            return policy.compressed(**missing)

        return replace(self, policies=tuple(map(complete, self.policies)))

    def for_stages(self, num_stages: int) -> list[Policy]:
        """A policy a stage; ValueError if the file is for another number of stages."""
        if len(self.policies) not in (1, num_stages):
            raise ValueError(
                f"the policy is for {len(self.policies)} stages, but there are {num_stages}; "
                f"use --pipeline-parallel-size {len(self.policies)}, or a policy without `stages`"
            )
        found = self.policies * (num_stages if len(self.policies) == 1 else 1)
        blocks = self.policies[0].blocks_in_flight or num_stages
        if blocks < num_stages:
            raise ValueError(
                f"policy: blocks_in_flight is {blocks}; {num_stages} stages need as many, or all "
                "but some would wait"
            )
        return [replace(policy, blocks_in_flight=blocks) for policy in found]

    @staticmethod
    def parse(policy: Policy | StagePolicies | str | Path | None) -> StagePolicies | None:
        """What a user may give: one policy for every stage, several, a file of either, or auto."""
        if str(policy) == AUTO:
            return None
        if isinstance(policy, Policy):
            return StagePolicies((policy,))
        if isinstance(policy, StagePolicies | None):
            return policy
        return StagePolicies.from_yaml(policy)

    @staticmethod
    def from_yaml(path: str | Path) -> StagePolicies:
        """A policy's keys for all stages; `stages`: a list with what differs, and `layers`.

        ValueError (bad content) and OSError (no such file) name the path.
        """
        values = read_yaml(path) or {}
        try:
            if not isinstance(values, dict):
                raise ValueError("the file must hold keys and values, such as `gpu_batch_size: 8`")
            stages = values.pop("stages", None)
            if stages is None:
                return StagePolicies((Policy.from_dict(values),))
            are_dicts = isinstance(stages, list) and all(isinstance(it, dict) for it in stages)
            if not stages or not are_dicts:
                raise ValueError("stages must be a list of keys and values, one entry a stage")
            counts = [stage.pop("layers", None) for stage in stages]
            policies = tuple(Policy.from_dict(values | stage) for stage in stages)
            return StagePolicies(policies, _layers(counts))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _layers(counts: list) -> tuple[int, ...] | None:
    if all(count is None for count in counts):
        return None
    if any(not isinstance(count, int) or isinstance(count, bool) for count in counts):
        raise ValueError(f"layers are {counts}; give every stage a number of decoder layers")
    return tuple(counts)


def plan_stages(
    config: ModelConfig,
    policies: StagePolicies | None,
    workload: Workload,
    dtype: str,
    budgets: list[Budget],
    stages_disk: bool,
    hops_on_device: bool = False,
    base: Policy = Policy(),  # noqa: B008 - frozen
) -> list[StagePlan]:
    """A plan a stage, as many as there are budgets; without policies the tiers are filled, the rest
    as in the base.

    Raises ValueError, naming the stage, for what doesn't fit.
    """
    count = len(budgets)
    counts = policies.layers if policies and policies.layers else split_layers_evenly(config, count)
    stages = StageLayers.split(config.num_layers, counts)
    if len(stages) != count:
        raise ValueError(f"the policy's layers are for {len(stages)} stages, but there are {count}")
    given = (
        policies.for_stages(count) if policies else [replace(base, blocks_in_flight=count)] * count
    )
    plans = [
        StagePlan(
            config,
            stage,
            policy,
            workload,
            dtype,
            stages_disk,
            policy.blocks_in_flight or 1,
            hops_on_device,
        )
        for stage, policy in zip(stages, given, strict=True)
    ]
    if policies is None:
        filled = fill_tiers(plans, budgets)
        plans = [replace(plan, policy=policy) for plan, policy in zip(plans, filled, strict=True)]
    check_budgets(plans, budgets)
    return plans


def split_layers_evenly(config: ModelConfig, num_stages: int) -> Sequence[int]:
    """As alike as can be, the first with one more; ValueError if there are too few layers."""
    if num_stages > config.num_layers:
        raise ValueError(
            f"{num_stages} stages are more than the model's {config.num_layers} layers; use fewer"
        )
    each, more = divmod(config.num_layers, num_stages)
    return [each + (stage < more) for stage in range(num_stages)]
