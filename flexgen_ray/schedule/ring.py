"""What the stages of a ring wait for from each other, beyond what each waits for from itself.

A message is named by the kind of op that waits for it, that op's stage, visit and batch.
"""

from __future__ import annotations

from flexgen_ray.schedule.ops import Op, OpKind

Message = tuple[OpKind, int, int, int]

_MESSAGES = {
    OpKind.COMPOSE: OpKind.RECV_ROWS,
    OpKind.RECV_ROWS: OpKind.RECV_ROWS,
    OpKind.SEND: OpKind.RECV,
    OpKind.ACCEPT: OpKind.RECV_TOKENS,
}
_AWAITING = frozenset(_MESSAGES.values())


def awaited_message(stage: int, op: Op, num_blocks: int) -> Message | None:
    """What an op of this stage waits for; the first visit of a block for no tokens."""
    if op.kind not in _AWAITING or (op.kind is OpKind.RECV_TOKENS and op.visit < num_blocks):
        return None
    return op.kind, stage, op.visit, op.batch


def sent_message(stage: int, op: Op, num_blocks: int) -> Message | None:
    """What the end of an op of this stage tells: the next stage or, of tokens, the first."""
    kind = _MESSAGES.get(op.kind)
    if kind is None:
        return None
    if kind is OpKind.RECV_TOKENS:
        return kind, 0, op.visit + num_blocks, op.batch
    return kind, stage + 1, op.visit, op.batch
