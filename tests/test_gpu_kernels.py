"""The kernels of a GPU, by Triton's interpreter on a CPU, beside the plain functions; and where they are taken."""

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from einops import rearrange
from tiny import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_infini import cache_layer, gpu_kernels, local_attention, modeling_infini
from modeling_infini.local_attention import FlashWindow, attend_by_one, rotate
from modeling_infini.memory import FEATURE_MAPS, MemoryState, linear_write, read_memory
from modeling_infini.streams import AlignedLayout


# segments, length, heads, kv_heads, key_dim, value_dim
SHAPES = {
    "one token": (3, 1, 6, 3, 64, 64),
    "one short of a block": (2, 127, 4, 2, 32, 32),
    "one more than a block": (1, 129, 2, 1, 16, 16),
    "several parts": (1, 300, 2, 2, 64, 64),
    "no powers of two": (2, 65, 4, 4, 24, 40),
    "long heads": (1, 40, 2, 1, 256, 128),
}


# Triton decides when it is imported whether kernels are interpreted: they are in a process of its own.
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by the test above")


def test_kernels_by_the_interpreter():
    triton = Path(sys.prefix) / "triton"
    if importlib.util.find_spec("triton") is None and not triton.exists():
        pytest.skip(f"Triton is neither installed nor in {triton}, where make puts it")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not interpreter", __file__]
    paths = os.pathsep.join([*sys.path, str(triton)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "_device_of", lambda states: nullcontext())
    return gpu_kernels


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def of_heads(states: torch.Tensor) -> torch.Tensor:
    """With the strides of attention's outputs and of windows, whose heads come before their tokens."""
    return states.transpose(1, 2).contiguous().transpose(1, 2)


@interpreted
@pytest.mark.parametrize("is_exponential", [False, True], ids=["elu", "exp"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_reads_and_writes_agree_with_float64(kernels, shape, is_exponential):
    segments, length, heads, kv_heads, key_dim, value_dim = shape
    torch.manual_seed(0)
    feature_map = FEATURE_MAPS["exp" if is_exponential else "elu"]
    keys, values = torch.randn(segments, length, kv_heads, key_dim), torch.randn(segments, length, kv_heads, value_dim)
    for written in (None, torch.rand(segments, length) > 0.2, torch.rand(1, length) > 0.2):
        features = feature_map(keys.double().transpose(1, 2).contiguous())
        if written is not None:
            features = features * written[:, None, :, None]
        expected = linear_write(features, values.double().transpose(1, 2))
        found = kernels.fused_write(of_heads(keys), values, written, is_exponential)
        for mine, other in zip(found, expected):
            assert mine.dtype == torch.float32
            assert mine.shape == other.shape
            assert torch.allclose(mine.double(), other, rtol=1e-5, atol=1e-5 * other.abs().max().item())

    queries, local = torch.randn(segments, length, heads, key_dim), torch.randn(segments, length, heads, value_dim)
    memory = MemoryState(torch.randn(segments, kv_heads, key_dim, value_dim), torch.rand(segments, kv_heads, key_dim))
    memory.matrix[0], memory.normaliser[0] = 0, 0
    grouped = rearrange(queries, "g l (h r) d -> g h (r l) d", h=kv_heads).double().contiguous()
    read = read_memory(feature_map(grouped), MemoryState(*(state.double() for state in memory)), 1e-6)
    read = rearrange(read, "g h (r l) d -> g l (h r) d", l=length)
    for share in (torch.rand(1, 1, heads), torch.rand(segments, 1, heads), torch.rand(segments, length, heads)):
        found = kernels.fused_read(of_heads(local), of_heads(queries), memory, share, 1e-6, is_exponential)
        expected = torch.lerp(local.double(), read, 1 - share.double().unsqueeze(-1))
        assert found.is_contiguous()
        assert error(found, expected) < 1e-6


@interpreted
@torch.no_grad()
def test_no_grid_is_larger_than_cuda_takes(kernels, monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    for name in ("_fused_read_kernel", "_fused_write_kernel"):
        monkeypatch.setattr(kernels, name, Kernel())
    states = torch.empty(2**15, 40, 4, 8, device="meta")
    memory = kernels.fused_write(states, states, None, False)
    kernels.fused_read(states, states, memory, torch.empty(1, 1, 4, device="meta"), 1e-6, False)
    assert len(grids) == 2
    assert all(max(grid[1:], default=1) <= 65_535 for grid in grids)


@interpreted
@torch.no_grad()
def test_a_share_of_one_leaves_the_local_output_as_it_is(kernels):
    local, queries = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 4, 16)
    memory = MemoryState(torch.randn(2, 2, 16, 16), torch.rand(2, 2, 16))
    assert torch.equal(kernels.fused_read(local, queries, memory, torch.ones(1, 1, 4), 1e-6, False), local)


@interpreted
@pytest.mark.parametrize("head_dim", [2, 16, 80])
@torch.no_grad()
def test_rope_is_the_plain_one_bit_for_bit(kernels, head_dim):
    states = torch.randn(3, 7, 4, head_dim)
    for angles in (1, 3):
        cos, sin = torch.randn(2, angles, 7, head_dim).unbind()
        expected = rotate(states, (cos, sin))
        for strided in (states, of_heads(states)):
            found = kernels.fused_rotate(strided, cos, sin)
            assert torch.equal(found, expected)
            assert found.stride() == strided.stride()


@interpreted
@pytest.mark.parametrize("dim", [8, 80, 576])
@torch.no_grad()
def test_the_norm_is_llamas(kernels, dim):
    norm = LlamaRMSNorm(dim)
    norm.weight.copy_(torch.rand(dim))
    states = torch.randn(2, 5, dim)
    assert error(kernels.fused_norm(states, norm.weight, norm.variance_epsilon), norm(states)) < 1e-6
    strided = torch.randn(2, dim, 5).transpose(1, 2)
    assert error(kernels.fused_norm(strided, norm.weight, norm.variance_epsilon), norm(strided)) < 1e-6


@interpreted
def test_without_a_compiler_everything_is_plain(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_is_plain_call", lambda states: True)
    monkeypatch.setattr(kernels, "_is_ampere", lambda device: True)
    warnings = []
    monkeypatch.setattr(kernels.logger, "warning", warnings.append)

    def fail(*args):
        raise RuntimeError("Failed to find C compiler.")

    states = torch.randn(2, 3)
    for norm, is_taken in ((kernels.fused_norm, True), (fail, False)):
        monkeypatch.setattr(kernels, "fused_norm", norm)
        kernels._compiles.cache_clear()
        assert [kernels.has_kernels(states) for _ in range(2)] == [is_taken] * 2
    kernels._compiles.cache_clear()
    assert len(warnings) == 1
    assert "Failed to find C compiler" in warnings[0]


def by_kernels(patch) -> set[str]:
    """Lets float32 models take the kernels, and says which of them they took."""
    taken = set()

    def counted(name):
        def run(*args):
            taken.add(name)
            return getattr(gpu_kernels, name)(*args)

        return run

    for module in (modeling_infini, cache_layer, local_attention):
        patch.setattr(module, "has_kernels", lambda states: True)
        for name in ("fused_read", "fused_write", "fused_rotate"):
            if hasattr(module, name):
                patch.setattr(module, name, counted(name))
    return taken


@interpreted
def test_a_model_reads_by_the_kernels(kernels, monkeypatch):
    """In float32, where its norms are the plain ones. With every call that would take them on a GPU."""
    ids = torch.randint(0, 31, (2, 3 * 8 + 3))
    for fields in (
        {},
        {"local_attention": "sliding", "num_sink_tokens": 2},
        {"memory_feature_map": "exp", "token_gates": True, "memory_write_gate": True},
        {"memory_norm_init_scale": 2.0, "learned_delta_update": False},
    ):
        model = tiny_model(segment_length=8, **fields)

        def read(cuts, model=model):
            cache, parts = model.new_cache(), []
            with torch.no_grad():
                for part in ids.tensor_split(cuts, 1):
                    parts.append(model(part, past_key_values=cache).logits)
            return torch.cat(parts, 1), cache

        for cuts in ((), (5, 6, 20)):
            expected, expected_cache = read(cuts)
            with monkeypatch.context() as patch:
                calls = by_kernels(patch)
                found, cache = read(cuts)
            assert calls == {"fused_read", "fused_write", "fused_rotate"}
            assert error(found, expected) < 1e-5
            for mine, other in zip(cache.layers, expected_cache.layers):
                assert error(mine.memory, other.memory) < 1e-5
                assert error(mine.normaliser, other.normaliser) < 1e-5


def window_by_a_mask(
    queries, keys, values, query_ends, key_ends, longest, longest_key, *, scale, window_size, **others
):
    """What PyTorch's varlen_attn says that it does: queries stand at the end of their keys."""
    attended = torch.empty_like(queries)
    for start, end, first, last in zip(query_ends, query_ends[1:], key_ends, key_ends[1:]):
        groups = queries.shape[1] // keys.shape[1]
        own = queries[start:end].transpose(0, 1)
        k, v = (states[first:last].repeat_interleave(groups, 1).transpose(0, 1) for states in (keys, values))
        distance = torch.arange(own.shape[1]).unsqueeze(1) + k.shape[1] - own.shape[1] - torch.arange(k.shape[1])
        is_seen = (distance <= window_size[0]) & (distance >= -window_size[1])
        scores = (own @ k.transpose(1, 2) * scale).masked_fill(~is_seen, -torch.inf)
        attended[start:end] = (scores.softmax(-1) @ v).transpose(0, 1)
    return attended


@pytest.mark.parametrize("cuts", [(), (8,), (3, 8, 24), (20, 21), (11, 14, 16)])
def test_flash_windows_are_the_masks(monkeypatch, cuts):
    model = tiny_model(segment_length=8, local_attention="sliding").double()
    ids, calls = torch.randint(0, 31, (2, 45)), []

    def flash(*args, **options):
        calls.append(args)
        return window_by_a_mask(*args, **options)

    def read():
        cache = model.new_cache()
        with torch.no_grad():
            return torch.cat([model(part, past_key_values=cache).logits for part in ids.tensor_split(cuts, 1)], 1)

    expected = read()
    assert not calls
    monkeypatch.setattr(local_attention, "varlen_attn", flash)
    monkeypatch.setattr(local_attention, "has_flash", lambda states, head_dim: True)
    assert torch.allclose(read(), expected, rtol=1e-10, atol=1e-12)
    assert calls


def test_a_first_segment_that_sees_a_window_is_one_flash_window(monkeypatch):
    """As on the first rank of a sequence that is split over several: nothing is before it, and nothing after it."""
    config = tiny_model(segment_length=8, local_attention="sliding").config
    config._attn_implementation = "sdpa"
    monkeypatch.setattr(local_attention, "has_flash", lambda states, head_dim: True)
    lengths = []

    def flash(queries, *others, **options):
        lengths.append(len(queries))
        return window_by_a_mask(queries, *others, **options)

    monkeypatch.setattr(local_attention, "varlen_attn", flash)
    for start, length in ((0, 8), (0, 3), (2, 5)):
        layout = AlignedLayout((2, length), start, config, torch.device("cpu"), reads_past=True)
        queries, own = torch.randn(2, length, 4, 6), torch.randn(2, 2, start + length, 2, 6)
        keys, values = torch.cat([torch.randn(2, 2, 8, 2, 6), own], 2)
        window = FlashWindow.of(config, layout, queries)
        found = window.attend(queries, keys, values, 0.3)
        ends = [torch.arange(0, 3 * size, size) for size in (length, start + length)]
        expected = window_by_a_mask(
            queries.flatten(0, 1), *own.flatten(1, 2), *ends, length, start + length, scale=0.3, window_size=(7, 0)
        )
        assert torch.allclose(found.flatten(0, 1), expected)
    # CUDA's refuses calls without queries.
    assert min(lengths) > 0


def test_a_single_query_needs_no_copies_of_keys():
    queries, keys, values = torch.randn(3, 1, 6, 8), torch.randn(3, 9, 2, 8), torch.randn(3, 9, 2, 8)
    mask = torch.rand(3, 1, 1, 9) > 0.3
    repeated = (states.repeat_interleave(3, 2).transpose(1, 2) for states in (keys, values))
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(1, 2), *repeated, attn_mask=mask, scale=0.3
    )
    assert torch.allclose(attend_by_one(queries, keys, values, mask, 0.3), expected.transpose(1, 2), atol=1e-6)


def test_flash_windows_leave_the_choice_of_kernels_to_the_user(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "_is_plain_call", lambda states: True)
    monkeypatch.setattr(gpu_kernels, "_is_ampere", lambda device: True)
    states = torch.randn(2, 3).bfloat16()
    for is_built in (True, False):
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda is_built=is_built: is_built)
        assert gpu_kernels.has_flash(states, 64) == is_built
        with sdpa_kernel(SDPBackend.MATH):
            assert not gpu_kernels.has_flash(states, 64)


def test_on_a_cpu_everything_is_plain():
    states = torch.randn(2, 3)
    with torch.no_grad():
        assert not gpu_kernels.has_kernels(states)
        assert not gpu_kernels.has_flash(states.bfloat16(), 64)
