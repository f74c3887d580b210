"""
Triton kernels for calls on a GPU without gradients: in one pass what the plain functions compute in several.

    fused_read      g * local + (1 - g) * sigma(q) M / (sigma(q) . z)
    fused_write     sigma(K)^T V and the sum of sigma(K)
    fused_rotate    RoPE
    fused_norm      RMS-norm

Products of features are float32 to its last digits: three products of their TF32 parts each. The last two round where
Llama rounds.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from transformers.utils import logging

from .memory import MemoryState


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.get_logger(__name__)

# Of a program at a time: tokens that read, dimensions of their features, and warps. The fastest of those tried on an
# H100, where heads have up to 64 dimensions; and for longer heads, or few tokens.
READ = {"LENGTH_BLOCK": 128, "KEY_BLOCK": 64, "num_warps": 4}
READ_LESS = {"LENGTH_BLOCK": 32, "KEY_BLOCK": 32, "num_warps": 4}
# Tokens that are written, and dimensions of their features.
WRITE = {"LENGTH_BLOCK": 32, "KEY_BLOCK": 64, "num_warps": 4}
# In one part of a segment that is written, at least.
LEAST_PART = 256
# Programs that a write should have at least, for as many multiprocessors.
PROGRAMS = 256
# Of products: float32, by three products of TF32 parts.
PRECISION = "tf32x3"


def _is_plain_call(states: torch.Tensor) -> bool:
    """Whether a call is on a GPU and without gradients. A compiler fuses the plain functions itself."""
    is_cuda = type(states) is torch.Tensor and states.is_cuda and torch.version.hip is None
    return is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


@lru_cache
def _is_ampere(device: torch.device) -> bool:
    """Or newer: TF32, bfloat16 and flash attention came with it."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def _compiles(device: torch.device) -> bool:
    """Whether Triton makes kernels here: by one of them. Images for deployment often have no C compiler."""
    try:
        fused_norm(torch.zeros(1, 16, device=device), torch.ones(16, device=device), 1.0)
    except Exception as error:
        logger.warning(
            f"Triton cannot compile kernels here ({error}): the model reads by plain operations, which are slower. "
            "Triton needs a C compiler and the headers of Python: install them (Debian: gcc, python3-dev)."
        )
        return False
    return True


def has_kernels(states: torch.Tensor) -> bool:
    """Whether the kernels take what is computed of `states`."""
    is_taken = triton is not None and _is_plain_call(states) and states.dtype != torch.float64
    return is_taken and _is_ampere(states.device) and _compiles(states.device)


def has_flash(states: torch.Tensor, head_dim: int) -> bool:
    """Whether PyTorch's flash attention takes heads of the dtype and device of `states`."""
    is_taken = states.dtype in (torch.float16, torch.bfloat16) and head_dim in range(8, 257, 8)
    is_taken = is_taken and _is_plain_call(states) and _is_ampere(states.device)
    # Not in each build of PyTorch, and not where `sdpa_kernel` asks for another.
    return is_taken and torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()


def _device_of(states: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    is_current = states.device.index == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device_of(states)


if triton is not None:

    @triton.jit
    def _features(states, EXPONENTIAL: tl.constexpr):
        states = states.to(tl.float32)
        if EXPONENTIAL:
            return tl.exp(states)
        return tl.exp(tl.minimum(states, 0.0)) + tl.maximum(states, 0.0)

    @triton.jit
    def _fused_read_kernel(
        queries,
        matrix,
        normaliser,
        local,
        local_share,
        mixed,
        length,
        heads,
        groups,
        value_dim,
        eps,
        query_segment,
        query_token,
        query_head,
        local_segment,
        local_token,
        local_head,
        share_segment,
        share_token,
        KEY_DIM: tl.constexpr,
        EXPONENTIAL: tl.constexpr,
        PRECISION: tl.constexpr,
        LENGTH_BLOCK: tl.constexpr,
        KEY_BLOCK: tl.constexpr,
        VALUE_BLOCK: tl.constexpr,
    ):
        # One axis: CUDA takes 65,535 programs of any other, and segments times heads may be more.
        blocks = tl.cdiv(length, LENGTH_BLOCK)
        of_head = tl.program_id(0) // blocks
        segment, head = (of_head // heads).to(tl.int64), of_head % heads
        memory = segment * (heads // groups) + head // groups
        tokens = tl.program_id(0) % blocks * LENGTH_BLOCK + tl.arange(0, LENGTH_BLOCK)
        values = tl.arange(0, VALUE_BLOCK)
        is_token, is_value = tokens < length, values < value_dim
        numerator = tl.zeros((LENGTH_BLOCK, VALUE_BLOCK), tl.float32)
        denominator = tl.zeros((LENGTH_BLOCK,), tl.float32)
        for start in range(0, KEY_DIM, KEY_BLOCK):
            keys = start + tl.arange(0, KEY_BLOCK)
            is_key = keys < KEY_DIM
            place = queries + segment * query_segment + head * query_head + tokens[:, None] * query_token
            states = tl.load(place + keys[None, :], mask=is_token[:, None] & is_key[None, :], other=0.0)
            features = _features(states, EXPONENTIAL)
            place = matrix + memory * KEY_DIM * value_dim + keys[:, None] * value_dim
            part = tl.load(place + values[None, :], mask=is_key[:, None] & is_value[None, :], other=0.0)
            numerator = tl.dot(features, part, numerator, input_precision=PRECISION)
            of_keys = tl.load(normaliser + memory * KEY_DIM + keys, mask=is_key, other=0.0)
            denominator += tl.sum(features * of_keys[None, :], 1)
        read = numerator / tl.maximum(denominator, eps)[:, None]
        is_here = is_token[:, None] & is_value[None, :]
        place = local + segment * local_segment + head * local_head + tokens[:, None] * local_token
        of_local = tl.load(place + values[None, :], mask=is_here, other=0.0).to(tl.float32)
        share = tl.load(local_share + segment * share_segment + tokens * share_token + head, mask=is_token, other=1.0)
        result = of_local + (1 - share.to(tl.float32))[:, None] * (read - of_local)
        place = mixed + ((segment * length + tokens[:, None]) * heads + head) * value_dim
        tl.store(place + values[None, :], result.to(mixed.dtype.element_ty), mask=is_here)

    @triton.jit
    def _fused_write_kernel(
        keys,
        values,
        written,
        matrix,
        normaliser,
        length,
        kv_heads,
        key_dim,
        value_dim,
        key_segment,
        key_token,
        key_head,
        value_segment,
        value_token,
        value_head,
        written_segment,
        PART_LENGTH: tl.constexpr,
        HAS_WRITTEN: tl.constexpr,
        EXPONENTIAL: tl.constexpr,
        PRECISION: tl.constexpr,
        LENGTH_BLOCK: tl.constexpr,
        KEY_BLOCK: tl.constexpr,
        VALUE_BLOCK: tl.constexpr,
    ):
        memory = tl.program_id(0).to(tl.int64)
        segment, head = memory // kv_heads, memory % kv_heads
        part = tl.program_id(2)
        of_key = tl.program_id(1) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
        of_value = tl.arange(0, VALUE_BLOCK)
        is_key, is_value = of_key < key_dim, of_value < value_dim
        added = tl.zeros((KEY_BLOCK, VALUE_BLOCK), tl.float32)
        total = tl.zeros((KEY_BLOCK,), tl.float32)
        for start in range(0, PART_LENGTH, LENGTH_BLOCK):
            tokens = part * PART_LENGTH + start + tl.arange(0, LENGTH_BLOCK)
            is_token = tokens < length
            place = keys + segment * key_segment + head * key_head + tokens[None, :] * key_token
            is_here = is_key[:, None] & is_token[None, :]
            features = _features(tl.load(place + of_key[:, None], mask=is_here, other=0.0), EXPONENTIAL)
            if HAS_WRITTEN:
                is_token = is_token & (
                    tl.load(written + segment * written_segment + tokens, mask=is_token, other=0) != 0
                )
            features = tl.where(is_key[:, None] & is_token[None, :], features, 0.0)
            place = values + segment * value_segment + head * value_head + tokens[:, None] * value_token
            is_here = is_token[:, None] & is_value[None, :]
            states = tl.load(place + of_value[None, :], mask=is_here, other=0.0).to(tl.float32)
            added = tl.dot(features, states, added, input_precision=PRECISION)
            total += tl.sum(features, 1)
        memory += part * tl.num_programs(0)
        place = matrix + (memory * key_dim + of_key[:, None]) * value_dim
        tl.store(place + of_value[None, :], added, mask=is_key[:, None] & is_value[None, :])
        tl.store(normaliser + memory * key_dim + of_key, total, mask=is_key)

    @triton.jit
    def _fused_rotate_kernel(
        states,
        cos,
        sin,
        rotated,
        rows,
        slots,
        heads,
        half,
        state_segment,
        state_slot,
        state_head,
        rotated_segment,
        rotated_slot,
        rotated_head,
        angle_segment,
        angle_slot,
        ROW_BLOCK: tl.constexpr,
        HALF_BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        of_half = tl.arange(0, HALF_BLOCK)
        is_here = (row < rows)[:, None] & (of_half < half)[None, :]
        head, slot, segment = row % heads, row // heads % slots, row // heads // slots
        left = (segment * state_segment + slot * state_slot + head * state_head)[:, None] + of_half[None, :]
        angle = (segment * angle_segment + slot * angle_slot)[:, None] + of_half[None, :]
        dtype = cos.dtype.element_ty
        first = tl.load(states + left, mask=is_here, other=0.0).to(dtype).to(tl.float32)
        second = tl.load(states + left + half, mask=is_here, other=0.0).to(dtype).to(tl.float32)
        first_cos = (first * tl.load(cos + angle, mask=is_here, other=0.0).to(tl.float32)).to(dtype)
        second_cos = (second * tl.load(cos + angle + half, mask=is_here, other=0.0).to(tl.float32)).to(dtype)
        second_sin = (second * tl.load(sin + angle, mask=is_here, other=0.0).to(tl.float32)).to(dtype)
        first_sin = (first * tl.load(sin + angle + half, mask=is_here, other=0.0).to(tl.float32)).to(dtype)
        place = (segment * rotated_segment + slot * rotated_slot + head * rotated_head)[:, None] + of_half[None, :]
        result = (first_cos.to(tl.float32) + second_sin.to(tl.float32)).to(dtype)
        tl.store(rotated + place, result.to(rotated.dtype.element_ty), mask=is_here)
        result = (second_cos.to(tl.float32) + first_sin.to(tl.float32)).to(dtype)
        tl.store(rotated + place + half, result.to(rotated.dtype.element_ty), mask=is_here)

    @triton.jit
    def _fused_norm_kernel(
        states, weight, normed, rows, dim, eps, row_stride, ROW_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        of_dim = tl.arange(0, DIM_BLOCK)
        is_here = (row < rows)[:, None] & (of_dim < dim)[None, :]
        loaded = tl.load(states + row[:, None] * row_stride + of_dim[None, :], mask=is_here, other=0.0)
        wide = loaded.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, 1) / dim + eps)
        rounded = (wide * inverse[:, None]).to(loaded.dtype).to(tl.float32)
        scale = tl.load(weight + of_dim, mask=of_dim < dim, other=0.0).to(tl.float32)
        result = scale[None, :] * rounded
        tl.store(normed + row[:, None] * dim + of_dim[None, :], result.to(normed.dtype.element_ty), mask=is_here)


def _last_contiguous(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()


def fused_read(
    local: torch.Tensor,
    queries: torch.Tensor,
    memory: MemoryState,
    local_share: torch.Tensor,
    eps: float,
    is_exponential: bool,
) -> torch.Tensor:
    """
    g * local + (1 - g) * sigma(q) M / (sigma(q) . z), with the denominator clamped at `eps`.

    Args:
        local: `(G, length, heads, value_dim)`.
        queries: as the feature map gets them, `(G, length, heads, key_dim)`.
        memory: `(G, kv_heads, ...)`, float32; groups of query heads share a KV head's.
        local_share: g, `(G or 1, length or 1, heads)`.
        is_exponential: whether sigma is exp, and not elu + 1.

    Returns:
        `(G, length, heads, value_dim)`, in the dtype of `local`.
    """
    segments, length, heads, value_dim = local.shape
    kv_heads, key_dim = memory.normaliser.shape[1:]
    local, queries = _last_contiguous(local), _last_contiguous(queries)
    local_share = _last_contiguous(local_share).expand(segments, length, heads)
    matrix, normaliser = memory.matrix.contiguous(), memory.normaliser.contiguous()
    blocks = READ if value_dim <= 64 and length > READ_LESS["LENGTH_BLOCK"] else READ_LESS
    mixed = torch.empty(local.shape, dtype=local.dtype, device=local.device)
    with _device_of(local):
        _fused_read_kernel[(triton.cdiv(length, blocks["LENGTH_BLOCK"]) * segments * heads,)](
            queries,
            matrix,
            normaliser,
            local,
            local_share,
            mixed,
            length,
            heads,
            heads // kv_heads,
            value_dim,
            eps,
            *queries.stride()[:3],
            *local.stride()[:3],
            *local_share.stride()[:2],
            KEY_DIM=key_dim,
            EXPONENTIAL=is_exponential,
            PRECISION=PRECISION,
            VALUE_BLOCK=max(16, triton.next_power_of_2(value_dim)),
            **blocks,
        )
    return mixed


def fused_write(
    keys: torch.Tensor, values: torch.Tensor, written: torch.Tensor | None, is_exponential: bool
) -> MemoryState:
    """
    What the linear rule adds to M and z: sigma(K)^T V and the sum of sigma(K).

    Args:
        keys: as the feature map gets them, `(G, length, kv_heads, key_dim)`.
        values: V, `(G, length, kv_heads, value_dim)`, scaled by their write strengths if there are any.
        written: `(G or 1, length)` bool, which of them are written; `None`: all.
        is_exponential: whether sigma is exp, and not elu + 1.

    Returns:
        `(G, kv_heads, ...)`, float32.
    """
    segments, length, kv_heads, key_dim = keys.shape
    value_dim = values.shape[-1]
    keys, values = _last_contiguous(keys), _last_contiguous(values)
    key_blocks = triton.cdiv(key_dim, WRITE["KEY_BLOCK"])
    parts = min(triton.cdiv(length, LEAST_PART), triton.cdiv(PROGRAMS, segments * kv_heads * key_blocks))
    # Powers of two, for each of which the kernel is compiled.
    part_length = max(WRITE["LENGTH_BLOCK"], triton.next_power_of_2(triton.cdiv(length, parts)))
    parts = triton.cdiv(length, part_length)
    matrix = torch.empty(parts, segments, kv_heads, key_dim, value_dim, dtype=torch.float32, device=keys.device)
    normaliser = torch.empty(parts, segments, kv_heads, key_dim, dtype=torch.float32, device=keys.device)
    with _device_of(keys):
        _fused_write_kernel[segments * kv_heads, key_blocks, parts](
            keys,
            values,
            written,
            matrix,
            normaliser,
            length,
            kv_heads,
            key_dim,
            value_dim,
            *keys.stride()[:3],
            *values.stride()[:3],
            0 if written is None or written.shape[0] == 1 else written.stride(0),
            PART_LENGTH=part_length,
            HAS_WRITTEN=written is not None,
            EXPONENTIAL=is_exponential,
            PRECISION=PRECISION,
            VALUE_BLOCK=max(16, triton.next_power_of_2(value_dim)),
            **WRITE,
        )
    return MemoryState(matrix.sum(0), normaliser.sum(0)) if parts > 1 else MemoryState(matrix[0], normaliser[0])


def fused_rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    x cos + rotate_half(x) sin, computed in the dtype of the angles.

    Args:
        states: x, `(G, slots, heads, head_dim)`.
        cos, sin: `(G or 1, slots, head_dim)`; sin with the signs of rotate_half.

    Returns:
        As `states`.
    """
    segments, slots, heads, head_dim = states.shape
    states = _last_contiguous(states)
    rotated = torch.empty_like(states)
    cos, sin = (table.contiguous() for table in (cos, sin))
    half_block = triton.next_power_of_2(head_dim // 2)
    rows, row_block = segments * slots * heads, max(1, 1024 // half_block)
    with _device_of(states):
        _fused_rotate_kernel[(triton.cdiv(rows, row_block),)](
            states,
            cos,
            sin,
            rotated,
            rows,
            slots,
            heads,
            head_dim // 2,
            *states.stride()[:3],
            *rotated.stride()[:3],
            0 if cos.shape[0] == 1 else cos.stride(0),
            cos.stride(1),
            ROW_BLOCK=row_block,
            HALF_BLOCK=half_block,
            # A fused product and sum would not round the product.
            enable_fp_fusion=False,
        )
    return rotated


def fused_norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps), of x `(..., dim)` and `weight` `(dim,)`; the quotient in the dtype of x."""
    dim = states.shape[-1]
    rows = _last_contiguous(states.reshape(-1, dim))
    normed = torch.empty(states.shape, dtype=torch.promote_types(states.dtype, weight.dtype), device=states.device)
    dim_block = triton.next_power_of_2(dim)
    row_block = max(1, 1024 // dim_block)
    with _device_of(states):
        _fused_norm_kernel[(triton.cdiv(len(rows), row_block),)](
            rows,
            weight,
            normed,
            len(rows),
            dim,
            eps,
            rows.stride(0),
            ROW_BLOCK=row_block,
            DIM_BLOCK=dim_block,
        )
    return normed
