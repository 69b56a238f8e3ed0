"""Sizes: the bytes that a stage takes on each tier, buffer by buffer, before any is allocated.

The stores allocate exactly these sizes, which a test checks. Knows plans; no torch.
"""

from __future__ import annotations

from functools import reduce
from math import prod

from flexgen_ray.config import PAGE_TOKENS, PART_TOKENS, SINK_DIMS, TIERS, Budget, Policy
from flexgen_ray.layout.placement import SECTOR, aligned
from flexgen_ray.layout.plan import ATTENTION_WORKSPACE, MASK_BYTES, QUERY_TILE, StagePlan
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.quant.formats import PARTS
from flexgen_ray.quant.frame import Shape
from flexgen_ray.schedule.ops import CELL_SLOTS, EXPERT_STAGING_SLOTS, LAYER_SLOTS, staging_slots
from flexgen_ray.units import format_bytes

FRAGMENTATION = 1.5  # memory that the allocator holds, over live memory; see test_memory.py
EXPERT_ID_BYTES = 8  # of the number of an expert that a token chose
CHOICE_BYTES = 4  # of the index of a token that sparse attention chose
ENDS_BYTES = 16  # of an expert: its number, and where its choices end
INDEX_BYTES = 80  # of a token's choice of an expert: its number and places, and while it is sorted
PREFIX_TILE = 1024  # tokens of a prefix that are attended at a time
# Programs among which a GPU divides the tokens of few rows (kernels/paged_splits.py).
SPLIT_PROGRAMS = 768


def weight_bytes(plan: StagePlan) -> dict[str, int]:
    """Bytes of the stage's weights on each tier."""
    return dict(plan.weights.nbytes)


def streamed_bytes(plan: StagePlan, layer: int) -> dict[str, int]:
    """Bytes of one layer's weights that cross the link once a visit, by the tier they come from."""
    stream = plan.weights.streams[layer]
    return {tier: stream.nbytes(tier) for tier in ("cpu", "disk")}


def weights_slot_bytes(plan: StagePlan) -> list[int]:
    """Bytes of each device slot for streamed weights.

    LAYER_SLOTS slots have room for any decoder layer, and the last slot has room for the head.
    """
    head = plan.config.head_layer
    streamed = {x: sum(streamed_bytes(plan, x).values()) for x in plan.stage.with_weights}
    largest = max((nbytes for layer, nbytes in streamed.items() if layer != head), default=0)
    return [largest] * LAYER_SLOTS + [streamed.get(head, 0)]


def expert_slot_bytes(plan: StagePlan) -> int:
    """Bytes of a device slot for a group of experts that streams; 0 if none does."""
    return plan.weights.largest_group("cpu", "disk")


def staged_group_bytes(plan: StagePlan) -> int:
    """Bytes of a host slot for a group of experts on its way from disk."""
    return plan.weights.largest_group("disk") if plan.stages_disk else 0


def staging_slot_bytes(plan: StagePlan) -> int:
    """Bytes of a staging slot, which has room for a part of any layer's disk weights."""
    if not plan.stages_disk:
        return 0
    return plan.weights.largest("disk", plan.policy.num_gpu_batches)


def staged_bytes(plan: StagePlan) -> int:
    """Bytes of all staging slots."""
    groups = EXPERT_STAGING_SLOTS * staged_group_bytes(plan)
    return staging_slots(plan.policy.num_gpu_batches) * staging_slot_bytes(plan) + groups


def quantized_shapes(plan: StagePlan, layer: int, part: str, group: int = 0) -> dict[str, Shape]:
    """{key: shape} of a layer's quantized weights that a part uses (quant/formats.PARTS).

    group: of experts, where they are in groups.
    """
    shapes, groups = plan.weights.shapes(layer), plan.weights.groups.get(layer, ())
    if part == "experts" and groups:
        shapes = {key: shapes[key] for key in groups[group].keys}
    return plan.weight_format.quantized_weights(shapes, part)


def quantized_values(plan: StagePlan, layer: int, part: str, group: int = 0) -> int:
    """Number of values of these weights, which are dequantized at once."""
    return sum(map(prod, quantized_shapes(plan, layer, part, group).values()))


def dequantized_bytes(plan: StagePlan) -> dict[str, int]:
    """{part: bytes} of the device memory into which a layer's weights are dequantized."""
    weight_format, most = plan.weight_format, dict.fromkeys(PARTS, 0)
    for layer in plan.stage.with_weights if weight_format.is_quantized else ():
        for part in PARTS:
            groups = plan.weights.groups.get(layer, ()) if part == "experts" else ()
            for group in range(len(groups) or 1):
                shapes = quantized_shapes(plan, layer, part, group).values()
                nbytes = sum(aligned(prod(shape) * plan.element_bytes) for shape in shapes)
                most[part] = max(most[part], nbytes)
    return most


def stage_bytes(plan: StagePlan) -> dict[str, dict[str, int]]:
    """{tier: {buffer: bytes}} of everything that the stage will allocate."""
    weights = weight_bytes(plan)
    cache = _cache_bytes(plan)
    hidden = _hidden_bytes(plan)
    return {
        "gpu": {
            "weights": weights["gpu"],
            "weights in flight": sum(weights_slot_bytes(plan))
            + plan.mixtures.slots * expert_slot_bytes(plan),
            "weights dequantized": sum(dequantized_bytes(plan).values()),
            "sinks": sinks_bytes(plan),
            **cache["gpu"],
            **hidden["gpu"],
            "rows for experts": routed_bytes(plan),
            "workspace": workspace_bytes(plan),
        },
        "cpu": {
            "weights": weights["cpu"],
            "weights in flight": staged_bytes(plan),
            "sinks": sinks_bytes(plan),
            **cache["cpu"],
            **hidden["cpu"],
        },
        "disk": {"weights": weights["disk"], **cache["disk"], **hidden["disk"]},
    }


def routed_bytes(plan: StagePlan) -> int:
    """Bytes of the device memory in which rows wait for experts, with their choices and shares."""
    choice = plan.element_bytes + EXPERT_ID_BYTES
    vectors = 2 if plan.mixtures.slots else 1  # beside what groups take lies what they give
    each = vectors * plan.config.hidden_size * plan.element_bytes
    return plan.routed_tokens * (each + plan.config.experts_per_token * choice)


def experts_bytes(plan: StagePlan) -> int:
    """Bytes that grow with the batches for which experts run at once: rows, and temporaries."""
    return routed_bytes(plan) + expert_workspace_bytes(plan)


def expert_workspace_bytes(plan: StagePlan) -> int:
    """Most bytes of temporaries of experts.

    Choices are gathered, multiplied twice and put back: two vectors of hidden states and one of
    both projections lie there at a time, beside some indices.
    """
    config = plan.config
    if not plan.expert_tokens:
        return 0
    choice = 2 * (config.hidden_size + config.expert_size) * plan.element_bytes + INDEX_BYTES
    if config.expert_bias:
        choice += max(config.hidden_size, 2 * config.expert_size) * plan.element_bytes
    temporaries = plan.expert_tokens * config.experts_per_token * choice
    temporaries += ENDS_BYTES * config.num_experts
    return int(FRAGMENTATION * temporaries)


def sinks_bytes(plan: StagePlan) -> int:
    """Bytes of the sinks of a stage's heads, in float32: both device and host have them."""
    return plan.config.attention_sinks * plan.num_decoder_layers * plan.config.num_heads * 4


def prefix_bytes(plan: StagePlan) -> int:
    """Bytes of the cache, on each of the prefixes' tiers, for prefixes which rows share."""
    return plan.prefix_pages * plan.num_decoder_layers * plan.page_bytes


def _cache_bytes(plan: StagePlan) -> dict[str, dict[str, int]]:
    space, page, layers = plan.space, plan.page_bytes, plan.num_decoder_layers
    counts = [len(plan.layers_of(kind)) for kind in space.kinds]
    gpu, cpu, disk = (
        sum(count * pages for count, pages in zip(counts, pools, strict=True))
        for pools in zip(*space.all_pools, strict=True)
    )
    disk_page = plan.disk_page_bytes
    new_kv = new_kv_bytes(plan)
    vectors = plan.attended_rows * plan.config.q_size * plan.element_bytes
    chosen = plan.choosing_rows * plan.max_kept_tokens * plan.config.num_kv_heads
    slot = (plan.slot_pages + space.prefix_slot) * page + chosen * plan.vector_bytes
    sums = plan.attended_rows * plan.config.num_heads * 4 if plan.merges_parts else 0
    return {
        "gpu": {
            "cache": gpu * page,
            "cache in flight": CELL_SLOTS * slot + arriving_bytes(plan),
        },
        "cpu": {
            "cache": cpu * page,
            "cache tails": layers * space.disk_rows * disk_page,
            "cache in flight": CELL_SLOTS * (2 * space.disk * disk_page + new_kv)
            + CELL_SLOTS * chosen * (plan.vector_bytes + CHOICE_BYTES),
            "host attention": CELL_SLOTS * (2 * vectors + sums),
            "workspace": host_workspace_bytes(plan),
        },
        "disk": {"cache": disk * disk_page},
    }


def new_kv_bytes(plan: StagePlan) -> int:
    """Bytes on the host of what leaves the device in a cell: new keys and values.

    Queries come with them in a pass whose rows bring one token each.
    """
    rows = plan.stored_rows * plan.qkv_size * plan.element_bytes
    return max(plan.stored_tokens * plan.kv_bytes, rows)


def host_workspace_bytes(plan: StagePlan) -> int:
    """Most bytes of temporaries on the host.

    The largest of: what attending some rows takes, one moved row, one tile's gathered embeddings;
    and beside these the indices of the values that sparse attention gathers.
    """
    attention = _decoding_bytes(plan, on_cpu=True) if plan.attends_on_host else 0
    moved = plan.most_pages * plan.page_bytes if plan.off_device_rows else 0
    chosen_vectors = plan.choosing_rows * plan.max_kept_tokens * plan.config.num_kv_heads
    gathered = 3 * plan.tile_tokens * plan.config.hidden_size * plan.element_bytes
    return max(attention, moved, gathered if _gathers(plan) else 0) + 2 * 8 * chosen_vectors


def _hidden_bytes(plan: StagePlan) -> dict[str, dict[str, int]]:
    config = plan.config
    token = config.hidden_size * plan.element_bytes
    gpu, cpu, disk = plan.hidden_tokens
    slots = plan.hidden_slots
    sent = 0 if plan.stage.is_last else slots * plan.cell_tokens * token
    hidden = 0 if plan.hidden_stays else config.hidden_size
    work = plan.cell_tokens * (hidden + plan.qkv_size) + plan.policy.gpu_batch_size * config.q_size
    packed = plan.cell_tokens * plan.kv_bytes if plan.policy.cache_bits else 0
    hops: dict[str, dict[str, int]] = {"gpu": {}, "cpu": {}}
    arrived = CELL_SLOTS * plan.cell_tokens * token * _has_arrivals(plan)
    hops[plan.arrival_tier]["hidden states arrived"] = arrived
    hops[plan.hop_tier]["hidden states sent"] = sent
    return {
        "gpu": {
            **hops["gpu"],
            "hidden states": slots * gpu * token,
            "cell": CELL_SLOTS * (work * plan.element_bytes + packed + merged_bytes(plan)),
        },
        "cpu": {
            "hidden states": slots * cpu * token,
            "hidden states in flight": 2 * CELL_SLOTS * aligned(disk * token, SECTOR),
            **hops["cpu"],
        },
        "disk": {"hidden states": slots * aligned(disk * token, SECTOR)},
    }


def merged_bytes(plan: StagePlan) -> int:
    """Bytes of a cell by which parts of attention merge.

    They are the queries of rows that share prefixes, the attention to these and the sums of both
    parts, the last in float32.
    """
    vectors = plan.policy.gpu_batch_size * plan.config.num_heads
    each = (plan.config.head_dim + 2) * 4 + plan.config.head_dim * plan.element_bytes
    return vectors * each if plan.merges_parts else 0


def _has_arrivals(plan: StagePlan) -> bool:
    """True if hidden states arrive in a buffer: embeddings, or those of the stage before."""
    return _gathers(plan) or not plan.stage.is_first


def _gathers(plan: StagePlan) -> bool:
    """True if embeddings are looked up on the host."""
    return plan.stage.is_first and plan.weights.places[0]["embed_tokens.weight"].tier != "gpu"


def workspace_bytes(plan: StagePlan) -> int:
    """Most bytes of temporaries on the device: a tile's MLP or projection, attention, logits."""
    # Tables of pages and rotations are made once a pass.
    config, rows = plan.config, plan.policy.gpu_batch_size
    tables = 2 * len(plan.kinds) * rows * (plan.longest_pages + 1) * 4
    if plan.workload.sharing is not None:
        tables += len(plan.kinds) * rows * plan.workload.sharing.most_tokens // PAGE_TOKENS * 4
    ropes = {config.rope_of(layer) for layer in plan.stage.decoders} - {None}
    rotations = len(ropes) * rows * config.head_dim * plan.element_bytes
    of_passes = 2 * plan.num_batches * (tables + rotations) + 4 * plan.marked_pages
    # On a GPU these lanes have a stream each, and the allocator keeps a stream's memory for it.
    ahead, finishing = _op_bytes(plan)
    temporaries = ahead + finishing if plan.stages_disk else max(ahead, finishing)
    others = int(FRAGMENTATION * (temporaries + of_passes + _dense_bytes(plan)))
    return others + expert_workspace_bytes(plan)


def _dense_bytes(plan: StagePlan) -> int:
    """Bytes of copies without gaps that cross the link in place of views, on streams of their own.

    A prompt's pages take most; queries and attention of decoding rows beside it less.
    """
    if not plan.stages_disk:
        return 0
    vectors = plan.attended_rows * plan.config.q_size * plan.element_bytes
    tokens = min(plan.cell_tokens, plan.off_device_rows * plan.max_prefill_len)
    return tokens * plan.kv_bytes + 2 * vectors


def arriving_bytes(plan: StagePlan) -> int:
    """Bytes of the device memory in which a row from disk arrives as it lies there."""
    return plan.most_pages * plan.disk_page_bytes if plan.stages_disk and plan.uses_disk else 0


def scored_tokens_at_a_time(plan: StagePlan, top: int) -> int:
    """Tokens that are scored at a time: as many as the workspace has room for.

    Each takes logits in two precisions; beside them lie the scores of a whole pass, each with the
    `top` likeliest tokens.
    """
    scores = plan.cell_tokens * (16 + 12 * top)
    ahead, finishing = _op_bytes(plan)
    room = finishing if plan.stages_disk else max(ahead, finishing)
    room -= 48 * plan.config.vocab_size + scores
    return max(1, room // (8 * plan.config.vocab_size))


def _op_bytes(plan: StagePlan) -> tuple[int, int]:
    """Most bytes of temporaries that one op needs on the device, of device_ahead and of device."""
    config, element = plan.config, plan.element_bytes
    # Queries and keys are normed beside the product, and with an offset in float32.
    normed = plan.qkv_size * ((4 if config.norm_offset else 2) if config.qk_norm else 1)
    angles = config.head_dim * (element + 3 * 4) if config.rope else 0
    beside = config.hidden_size * (2 * element + 3 * 4) + angles
    projected = max(3 * config.q_size, normed) * element
    finished = max((_mlp_bytes(plan, layer) for layer in plan.stage.decoders), default=0)
    projection = plan.tile_tokens * (projected + beside)
    tile = plan.tile_tokens * beside + finished
    rows = plan.policy.gpu_batch_size
    longest, chunk = plan.max_seq_len, min(plan.cell_tokens, plan.max_prefill_len)
    # Keys and values of one row are gathered, and those of some KV heads repeated.
    attention = longest * 4 * config.kv_size * element
    one_head, one_page = plan.repeated_bytes(longest), PAGE_TOKENS * longest * MASK_BYTES
    if config.attention_sinks:
        # Queries and results take some dimensions more; a prefix's sinks are weighed in float32.
        wide = config.head_dim + SINK_DIMS
        attention += (chunk + 1) * config.num_heads * (3 * wide * element + 8)
    attention += min(config.num_kv_heads * one_head, max(ATTENTION_WORKSPACE, one_head))
    attention += chunk * config.q_size * (2 * element + 4)
    mask = min(QUERY_TILE, chunk) * longest * MASK_BYTES
    attention += min(mask, max(ATTENTION_WORKSPACE, one_page))
    attention += _decoding_bytes(plan, on_cpu=not plan.stages_disk)
    attention += split_bytes(config) * plan.stages_disk
    if plan.prefix_pages:
        # Keys and values of a tile, gathered, dequantized and in float32; scores of some queries,
        # with their weights as they are multiplied.
        attention += PREFIX_TILE * config.kv_size * (4 * element + 2 * 4)
        attention += 2 * prefix_rows_at_a_time(plan) * config.num_heads * (PREFIX_TILE + 64) * 4
    # The weights of the chosen tokens stay until their values have arrived.
    chosen_tokens = CELL_SLOTS * plan.choosing_rows * plan.max_kept_tokens
    attention += chosen_tokens * 4 * config.num_heads
    # Logits of all rows in two precisions; one row's distribution, sorted and summed in float64.
    logits = config.vocab_size * (8 * rows + 48)
    return max(projection, attention), max(tile, logits)


def _mlp_bytes(plan: StagePlan, layer: int) -> int:
    """Most bytes that a tile of tokens takes in a layer's MLP, or before its experts."""
    config, element, tokens = plan.config, plan.element_bytes, plan.tile_tokens
    if not config.has_experts(layer):
        return tokens * config.intermediate_size * (3 if config.gated_mlp else 2) * element
    shared = tokens * (3 * config.shared_expert_size + 2 * config.hidden_size) * element
    own = config.hidden_size * element
    return tokens * own + max(_router_bytes(plan), shared)


def _router_bytes(plan: StagePlan) -> int:
    """Bytes of a router's scores of a tile of tokens and of its choices.

    Corrected scores lie beside the others, with marks of groups, and the router's matrix is
    converted to float32; so are hidden states, where the norm had its temporaries.
    """
    config, element = plan.config, plan.element_bytes
    scores, converted = config.num_experts * (element + 4), 0
    if config.corrects_choice:
        scores = config.num_experts * 2 * 4 + config.expert_groups * 16
        converted = 4 * config.num_experts * config.hidden_size * (element < 4)
    chosen = config.experts_per_token * (EXPERT_ID_BYTES + 4)
    return plan.tile_tokens * (scores + chosen) + converted


def _decoding_bytes(plan: StagePlan, on_cpu: bool) -> int:
    """Most bytes of temporaries of attending decoding rows, but for those of a GPU's kernel.

    On a CPU they are those of some rows that are copied, or the kernel's results of long rows'
    parts: heads of each part, with 64 numbers at most beside each head's own.
    """
    copied, parts = plan.rows_at_a_time * plan.attended_row_bytes, 0
    if on_cpu and not plan.is_sparse and plan.max_seq_len > PART_TOKENS:
        # A row of several parts has half a part's tokens in each, or more.
        cached = sum(plan.space.pages) * PAGE_TOKENS
        sharing = plan.workload.sharing
        if sharing is not None:
            cached += plan.policy.gpu_batch_size * sharing.most_tokens
        rows = plan.policy.gpu_batch_size * -(-plan.max_seq_len // PART_TOKENS)
        parts = min(rows, 2 * cached // PART_TOKENS)
    return max(copied, parts * plan.config.num_heads * (plan.config.head_dim + 64) * 4)


def prefix_rows_at_a_time(plan: StagePlan) -> int:
    """Rows whose scores of a tile of a prefix's tokens are computed at a time."""
    most = ATTENTION_WORKSPACE // (2 * plan.config.num_heads * PREFIX_TILE * 4)
    return max(1, min(most, plan.policy.gpu_batch_size))


def split_bytes(config: ModelConfig) -> int:
    """Most bytes of partial results, where a GPU divides rows' tokens among programs."""
    programs = 2 * SPLIT_PROGRAMS * config.num_heads // config.num_kv_heads
    return programs * (config.head_dim + 2) * 4


def tier_totals(sizes: dict[str, dict[str, int]]) -> Budget:
    """Bytes of all buffers together, by tier."""
    return Budget(**{tier: sum(sizes[tier].values()) for tier in TIERS})


def check_budgets(plans: list[StagePlan], budgets: list[Budget]) -> None:
    """Check every stage; raises ValueError that also names the stage."""
    for number, (plan, budget) in enumerate(zip(plans, budgets, strict=True)):
        try:
            check_budget(plan, budget)
        except ValueError as error:
            raise ValueError(
                f"stage {number}: {error}" if len(plans) > 1 else str(error)
            ) from error


_LEVERS = {
    "gpu": ("gpu_batch_size", "max_batch_tokens", "weights.gpu", "cache.gpu", "activations.gpu"),
    "cpu": ("gpu_batch_size", "num_gpu_batches", "weights.cpu", "cache.cpu", "activations.cpu"),
    "disk": ("weights.disk", "cache.disk", "activations.disk"),
}


def check_budget(plan: StagePlan, budget: Budget) -> None:
    """Raise ValueError with tier, need, budget and remedy if the plan doesn't fit its budget."""
    sizes = stage_bytes(plan)
    need = tier_totals(sizes)
    for tier in TIERS:
        if getattr(need, tier) > getattr(budget, tier):
            largest = sorted(sizes[tier].items(), key=lambda item: -item[1])[:3]
            parts = ", ".join(f"{what} {format_bytes(size)}" for what, size in largest if size)
            raise ValueError(
                f"the policy needs {format_bytes(getattr(need, tier))} on the {tier} tier "
                f"({parts}) but its budget is {format_bytes(getattr(budget, tier))}; "
                f"{_remedy(plan.policy, tier)}"
            )


def _remedy(policy: Policy, tier: str) -> str:
    """Fields of the policy that can still be lowered, with their values, and options to raise."""
    levers = []
    for lever in _LEVERS[tier]:
        value: float = reduce(getattr, lever.split("."), policy)  # type: ignore[assignment,arg-type]
        if value > (0 if "." in lever else 1):
            levers.append(f"{lever} ({value:.3g})")
    lower = f"lower {', '.join(levers)}, or " if levers else ""
    elsewhere = " or choose another --offload-dir" if tier == "disk" else ""
    return f"{lower}raise --{tier}-memory{elsewhere}"
