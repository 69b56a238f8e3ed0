"""The policies that a user may give: one for every stage of a pipeline, or each stage's own.

The shape of a block is the whole pipeline's. Placement may differ from stage to stage, as their
hardware does. The module knows files and policies; not whether they fit (choose.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexgen_ray.config import Policy
from flexgen_ray.files.text_files import read_yaml
from flexgen_ray.models.config import ModelConfig

AUTO = "auto"  # in place of a file: choose, as if no policy were given
# Fields on which every stage must agree, since all of them process the first stage's rows;
# expert_slots sets how many tokens a pass takes, so it is among them.
SHAPE = (
    "gpu_batch_size",
    "num_gpu_batches",
    "max_batch_tokens",
    "blocks_in_flight",
    "expert_slots",
)


@dataclass(frozen=True)
class StagePolicies:
    """One policy for every stage, or each stage's own.

    layers: number of decoder layers of each stage; None divides them evenly.
    Raises ValueError if stages differ in a block's shape.
    """

    policies: tuple[Policy, ...]
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in SHAPE:
            values = {getattr(policy, name) for policy in self.policies}
            if len(values) > 1:
                raise ValueError(
                    f"policy: {name} differs between stages; it must be the same for all"
                )
        if self.layers is not None and len(self.policies) not in (1, len(self.layers)):
            raise ValueError(
                f"policy: {len(self.policies)} stages have policies, {len(self.layers)} have layers"
            )

    def compressed(self, **lossy: int | float | None) -> StagePolicies:
        """Each policy with those of these lossy options that are not None (Policy.compressed)."""
        policies = tuple(policy.compressed(**lossy) for policy in self.policies)
        return replace(self, policies=policies)

    def with_default_bits(self, **bits: int | None) -> StagePolicies:
        """Each policy with these bits where it sets none."""

        def complete(policy: Policy) -> Policy:
            missing = {name: it for name, it in bits.items() if getattr(policy, name) is None}
            return policy.compressed(**missing)

        return replace(self, policies=tuple(map(complete, self.policies)))

    def for_stages(self, num_stages: int) -> list[Policy]:
        """A policy for each stage.

        Raises ValueError if the policies are for another number of stages, or have fewer blocks in
        flight than stages.
        """
        if len(self.policies) not in (1, num_stages):
            raise ValueError(
                f"the policy is for {len(self.policies)} stages, but there are {num_stages}; "
                f"use --pipeline-parallel-size {len(self.policies)}, or a policy without `stages`"
            )
        policies = self.policies * (num_stages if len(self.policies) == 1 else 1)
        blocks = self.policies[0].blocks_in_flight or num_stages
        if blocks < num_stages:
            raise ValueError(
                f"policy: blocks_in_flight is {blocks}; {num_stages} stages need at least "
                f"{num_stages}, or some stages would always wait"
            )
        return [replace(policy, blocks_in_flight=blocks) for policy in policies]

    @staticmethod
    def parse(policy: Policy | StagePolicies | str | Path | None) -> StagePolicies | None:
        """The policies that a user gave: one, several, or a file of either; None for "auto"."""
        if str(policy) == AUTO:
            return None
        if isinstance(policy, Policy):
            return StagePolicies((policy,))
        if isinstance(policy, StagePolicies | None):
            return policy
        return StagePolicies.from_yaml(policy)

    @staticmethod
    def from_yaml(path: str | Path) -> StagePolicies:
        """Read a policy's keys for all stages, and `stages`: a list of what differs, and `layers`.

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
                raise ValueError("stages must be a list of keys and values, one entry for a stage")
            counts = [stage.pop("layers", None) for stage in stages]
            policies = tuple(Policy.from_dict(values | stage) for stage in stages)
            return StagePolicies(policies, _parse_layers(counts))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _parse_layers(counts: list) -> tuple[int, ...] | None:
    if all(count is None for count in counts):
        return None
    if any(not isinstance(count, int) or isinstance(count, bool) for count in counts):
        raise ValueError(f"layers are {counts}; give every stage a number of decoder layers")
    return tuple(counts)


def split_layers_evenly(config: ModelConfig, num_stages: int) -> Sequence[int]:
    """Layers of each stage, as equal as possible, the first stages with one more.

    Raises ValueError if there are fewer layers than stages.
    """
    if num_stages > config.num_layers:
        raise ValueError(
            f"{num_stages} stages are more than the model's {config.num_layers} layers; use fewer"
        )
    each, more = divmod(config.num_layers, num_stages)
    return [each + (stage < more) for stage in range(num_stages)]
