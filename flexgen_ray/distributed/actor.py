"""The worker as a Ray actor: nothing but the wrapping."""

from __future__ import annotations

import ray

from flexgen_ray.runtime.worker import Worker

StageActor = ray.remote(Worker)
