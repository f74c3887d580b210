"""
Which operators the time of a call goes to.

The parts of the models are put into named ranges, for the time of a profile, from outside: an operator counts for the
innermost range that it runs in.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from modeling_infini import cache_layer, modeling_infini
from modeling_infini.cache_layer import InfiniCacheLayer, LayerPast
from modeling_infini.local_attention import FlashWindow
from modeling_infini.memory import FEATURE_MAPS
from modeling_infini.modeling_infini import InfiniAttention, InfiniDecoderLayer, InfiniMemory

from .timing import clock_of


PREFIX = "group: "
# What InfiniMemory and the memories of a cache do is all of a name that begins so.
MEMORY = "memory"
ATTENTION = "attention"
OTHER = "other"
MOST_OPERATORS = 25
# Launched by Triton, of which the profiler does not say from where.
KERNELS = {
    "_fused_read_kernel": f"{MEMORY}: read",
    "_fused_write_kernel": f"{MEMORY}: write",
    "_fused_rotate_kernel": "RoPE",
    "_fused_norm_kernel": "norms",
}

GROUPS: list[tuple[object, str, str]] = [
    (nn.Linear, "forward", "linear layers"),
    (LlamaRMSNorm, "forward", "norms"),
    (LlamaMLP, "forward", "MLP between its linear layers"),
    (LlamaDecoderLayer, "forward", "residuals"),
    (InfiniDecoderLayer, "forward", "residuals"),
    (LlamaAttention, "forward", "around attention"),
    (InfiniAttention, "forward", "around attention"),
    (modeling_infini, "rotate", "RoPE"),
    (modeling_llama, "apply_rotary_pos_emb", "RoPE"),
    (modeling_infini, "local_attention_mask", "plan and mask"),
    (modeling_infini, "_plan_call", "plan and mask"),
    (InfiniCacheLayer, "update", "window"),
    (LayerPast, "scan", f"{MEMORY}: states"),
    (InfiniCacheLayer, "_write_segments", f"{MEMORY}: states"),
    (InfiniCacheLayer, "_write_token", f"{MEMORY}: states"),
    (cache_layer, "written_states", f"{MEMORY}: layout and casts of what is written"),
    (cache_layer, "linear_write", f"{MEMORY}: write"),
    (cache_layer, "delta_correction", f"{MEMORY}: write"),
    (cache_layer, "write_token", f"{MEMORY}: write"),
    (cache_layer, "read_memory", f"{MEMORY}: write"),
    (cache_layer, "scan", f"{MEMORY}: scan"),
    (InfiniMemory, "token_states", f"{MEMORY}: layout and casts of what is written"),
    (InfiniMemory, "read", f"{MEMORY}: layout and casts of what is read"),
    (modeling_infini, "read_memory", f"{MEMORY}: read"),
    (InfiniMemory, "forward", f"{MEMORY}: gate"),
    (FlashWindow, "attend", ATTENTION),
    (modeling_infini, "attend_by_one", ATTENTION),
    (InfiniAttention, "_local_share", f"{MEMORY}: gate"),
]


def _within(group: str, function: Callable) -> Callable:
    @wraps(function)
    def in_range(*args, **kwargs):
        with record_function(PREFIX + group):
            return function(*args, **kwargs)

    return in_range


@contextmanager
def named_ranges() -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, group in GROUPS:
            stack.enter_context(patch.object(owner, name, _within(group, getattr(owner, name))))
        features = {name: _within(f"{MEMORY}: features", function) for name, function in FEATURE_MAPS.items()}
        stack.enter_context(patch.dict(FEATURE_MAPS, features))
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _within(ATTENTION, ALL_ATTENTION_FUNCTIONS["sdpa"])
        stack.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, "sdpa")
        yield


def _group(event) -> str:
    while event is not None and not event.name.startswith(PREFIX):
        event = event.cpu_parent
    return OTHER if event is None else event.name.removeprefix(PREFIX)


def profile(run: Callable, device: str) -> dict:
    """
    Runs `run` three times: to warm up, to be timed, and with the profiler.

    Returns:
        `seconds` without the profiler; `busy_seconds` of the device, which waits for the host in the rest; `kernels`,
        their number; `memory_share` of the busy time; `groups` and `operators`, `[name, seconds, kernels]` each, the
        longest first. On a CPU, operators stand for kernels.
    """
    clock, is_cpu = clock_of(device), device == "cpu"
    run()
    start = clock()
    run()
    seconds = clock() - start
    activities = [ProfilerActivity.CPU, *([] if is_cpu else [ProfilerActivity.CUDA])]
    with named_ranges(), torch.profiler.profile(activities=activities) as profiler:
        run()
        clock()

    by_group: dict[str, float] = defaultdict(float)
    by_operator: dict[str, float] = defaultdict(float)
    group_kernels: Counter[str] = Counter()
    operator_kernels: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            if (group := KERNELS.get(event.name)) is not None:
                for times, counts, name in (
                    (by_group, group_kernels, group),
                    (by_operator, operator_kernels, event.name),
                ):
                    times[name] += event.device_time_total / 1e6
                    counts[name] += 1
            continue
        if is_cpu:
            kernels = [] if event.name.startswith(PREFIX) else [event.self_cpu_time_total]
        else:
            # The ranges themselves come back as what the device did.
            kernels = [
                kernel.duration
                for kernel in event.kernels
                if not kernel.name.startswith(PREFIX) and kernel.name not in KERNELS
            ]
        if kernels:
            group = _group(event)
            by_group[group] += sum(kernels) / 1e6
            by_operator[event.name] += sum(kernels) / 1e6
            group_kernels[group] += len(kernels)
            operator_kernels[event.name] += len(kernels)

    def longest_first(times: dict[str, float], counts: Counter[str]) -> list[list]:
        return [[name, times[name], counts[name]] for name in sorted(times, key=times.__getitem__, reverse=True)]

    busy = sum(by_group.values())
    of_memory = sum(time for group, time in by_group.items() if group.startswith(MEMORY))
    return {
        "seconds": seconds,
        "busy_seconds": busy,
        "kernels": sum(group_kernels.values()),
        "memory_share": of_memory / busy if busy else 0.0,
        "groups": longest_first(by_group, group_kernels),
        "operators": longest_first(by_operator, operator_kernels)[:MOST_OPERATORS],
    }
