"""Messages between the stages of a ring: which ops send one, and which ops wait for one.

The order within a stage is dependencies.py's subject; messages are all that orders ops of different
stages. Knows no transport and no contents of messages.
"""

from __future__ import annotations

from flexgen_ray.schedule.ops import Op, OpKind

# A message is identified by the op that waits for it: (kind, stage, visit, batch).
Message = tuple[OpKind, int, int, int]

_MESSAGES = {  # {sending kind: waiting kind}
    OpKind.COMPOSE: OpKind.RECV_ROWS,
    OpKind.RECV_ROWS: OpKind.RECV_ROWS,
    OpKind.SEND: OpKind.RECV,
    OpKind.ACCEPT: OpKind.RECV_TOKENS,
}
_AWAITING = frozenset(_MESSAGES.values())


def awaited_message(stage: int, op: Op, num_blocks: int) -> Message | None:
    """The message that an op of this stage waits for, or None.

    A block's first visit waits for no tokens, since none have been sampled yet.
    """
    if op.kind not in _AWAITING or (op.kind is OpKind.RECV_TOKENS and op.visit < num_blocks):
        return None
    return op.kind, stage, op.visit, op.batch


def sent_message(stage: int, op: Op, num_blocks: int) -> Message | None:
    """The message that an op of this stage sends when it ends, or None.

    Rows and hidden states go to the next stage; sampled tokens go to the first stage, for the
    block's next visit.
    """
    kind = _MESSAGES.get(op.kind)
    if kind is None:
        return None
    if kind is OpKind.RECV_TOKENS:
        return kind, 0, op.visit + num_blocks, op.batch
    return kind, stage + 1, op.visit, op.batch
