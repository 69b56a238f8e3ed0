"""Counts what a run's ops copy."""

from __future__ import annotations

from collections import Counter

import torch

from flexgen_ray.runtime.handlers import OpHandlers
from flexgen_ray.schedule.ops import Op, OpKind


class Copies:
    """Bytes that each kind of op has copied in each visit, as long as the patches hold."""

    def __init__(self, monkeypatch) -> None:
        self.moved: Counter[tuple[OpKind, int]] = Counter()
        self._op: Op | None = None
        run, copy = OpHandlers.run, torch.Tensor.copy_

        def counting_run(cells, op, *args):
            self._op = op
            run(cells, op, *args)
            self._op = None

        def counting_copy(target, source, *args, **kwargs):
            if self._op is not None:
                self.moved[self._op.kind, self._op.visit] += source.nbytes
            return copy(target, source, *args, **kwargs)

        monkeypatch.setattr(OpHandlers, "run", counting_run)
        monkeypatch.setattr(torch.Tensor, "copy_", counting_copy)
