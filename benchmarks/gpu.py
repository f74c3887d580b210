"""
What reading, decoding and training cost on one GPU, in bfloat16 with random weights, beside other models.

    python -m benchmarks.gpu --output FOLDER
    python -m benchmarks.gpu --output FOLDER --part decode --sizes 8b
    python -m benchmarks.gpu --render FOLDER                            # table.md and plots of what is there
    python -m benchmarks.gpu --output FOLDER --short --device cpu       # tiny models: does it run?

What is measured comes in cells, the most important ones first. After each cell FOLDER/results.json is saved, so that a
run may be broken off. A run leaves out the cells that the file has from the same card. Measure other code into another
folder.
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from modeling_infini import InfiniCache

from . import gpu_report, machine, scale
from .__main__ import SHORT
from .contenders import Contender, infini, key_value_nbytes, llama, lucidrains, mistral, state_nbytes
from .gpu_profile import profile
from .prefill import needed_flops
from .suite import ALL_HEADS, DELTA, LINEAR, LLAMA, LUCIDRAINS, MISTRAL, SLIDING
from .timing import clock_of, interleaved_seconds


DTYPE = torch.bfloat16
# SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B.
SIZES: dict[str, dict] = {
    "135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1.2b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8b": scale.SIZE,
}
SHORT_SIZE = {**SHORT, "num_key_value_heads": 1, "tie_word_embeddings": True}
SHORT_SCALE = 128
SEGMENT_LENGTH = 2048

# The same model by another kernel, cache or way to launch a step.
CUDNN = ", cuDNN's attention"
PREALLOCATED = ", preallocated cache"
GRAPH = ", CUDA graph"
COMPILED = ", compiled"
CHUNKS = "Infini, segment, linear, chunks of 4 segments"
# All others have the weights of `LINEAR`.
OWN_WEIGHTS = (LINEAR, ALL_HEADS, LUCIDRAINS)

LONGEST_SECONDS = 20.0  # What would take longer is left out.
ONCE_SECONDS = 4.0  # What takes longer is measured once, with no run to warm up.
MOST_ROUNDS, LEAST_ROUNDS = 10, 2
ROUNDS_SECONDS = 1.5  # After which no round is added.
STEPS = 16
PROFILED_STEPS = 20


class Cell(NamedTuple):
    """`most_seconds`: an upper bound of what it takes; a run with less time left does not start it."""

    part: str
    size: str
    tokens: int = 0
    batch: int = 1
    most_seconds: float = 40.0

    @property
    def key(self) -> str:
        return f"{self.part}, {self.size}, {self.tokens:,} tokens, batch {self.batch}"


def _cells(part: str, size: str, *shapes: tuple[int, int], most_seconds: float = 40.0) -> list[Cell]:
    return [Cell(part, size, tokens, batch, most_seconds) for tokens, batch in shapes]


def plan(parts: list[str], sizes: list[str]) -> list[Cell]:
    """All cells of these parts and sizes, the most important ones first; and the limits that they are compared to."""
    k = 1024
    cells = [
        *_cells("prefill", "1.2b", (2 * k, 1), (32 * k, 1), (128 * k, 1)),
        *_cells("decode", "1.2b", (32 * k, 64)),
        *_cells("profile of prefill", "1.2b", (32 * k, 1), most_seconds=70),
        *_cells("forward", "1.2b", (k // 2, 1), (2 * k, 1), (k // 2, 8), (2 * k, 8)),
        *_cells("profile of decode", "1.2b", (32 * k, 64)),
        *_cells("decode", "1.2b", (32 * k, 1), (32 * k, 8), (16 * k, 64), (32 * k, 32)),
        *_cells("graph", "1.2b", (32 * k, 64), (32 * k, 1)),
        *_cells("training", "1.2b", (2 * k, 1), (8 * k, 1), (32 * k, 1)),
        *_cells("prefill", "1.2b", (8 * k, 1), (2 * k, 8), (32 * k, 8), (512 * k, 1), (1024 * k, 1)),
        *_cells("decode", "1.2b", (2 * k, 64), (128 * k, 8), (2 * k, 1), (128 * k, 1)),
        *_cells("prefill", "8b", (2 * k, 1), (32 * k, 1), (128 * k, 1)),
        *_cells("forward", "8b", (2 * k, 1)),
        *_cells("decode", "8b", (32 * k, 1), (32 * k, 8), (128 * k, 1), (2 * k, 64)),
        *_cells("prefill", "135m", (2 * k, 1), (8 * k, 1), (32 * k, 1), (128 * k, 1), (32 * k, 8), (1024 * k, 1)),
        *_cells("forward", "135m", (k // 2, 1), (2 * k, 1), (2 * k, 8)),
        *_cells("decode", "135m", (32 * k, 64), (32 * k, 1), (128 * k, 8)),
        *_cells("training", "135m", (2 * k, 1), (8 * k, 1), (32 * k, 1)),
        *_cells("profile of decode", "1.2b", (32 * k, 1)),
        *_cells("prefill", "1.2b", (128 * k, 8)),
        *_cells("decode", "1.2b", (128 * k, 64)),
        *_cells("profile of prefill", "8b", (32 * k, 1), most_seconds=120),
        *_cells("compiled", "1.2b", (32 * k, 1), (32 * k, 64), most_seconds=180),
    ]
    wanted = [cell for cell in cells if cell.part.split()[0] in parts and cell.size in sizes]
    used = dict.fromkeys(cell.size for cell in wanted) if wanted else dict.fromkeys(sizes)
    return [*(Cell("limits", size) for size in used), *wanted]


PARTS = ("limits", "prefill", "forward", "decode", "training", "profile", "graph", "compiled")


class PreallocatedLayer(DynamicLayer):
    """Keys and values that a step writes in place, where `DynamicLayer` copies all of them into longer tensors."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int):
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states, value_states, *args, **kwargs):
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self, *args) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        self.length += tokens_to_remove


def preallocated_cache(model: Any, tokens: int, batch: int) -> DynamicCache:
    """As after so many tokens, with room for some steps."""
    config, cache = model.config, DynamicCache(config=model.config)
    shape = (batch, config.num_key_value_heads, tokens + 4 * STEPS, config.head_dim)
    cache.layers = [
        PreallocatedLayer(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), tokens)
        for _ in range(config.num_hidden_layers)
    ]
    return cache


def contenders(size: dict, segment_length: int) -> dict[str, Contender]:
    ours = partial(infini, dtype=DTYPE, segment_length=segment_length)
    all_heads = {**size, "num_key_value_heads": size["num_attention_heads"]}
    return {
        LINEAR: ours(size),
        SLIDING: ours(size, local_attention="sliding"),
        DELTA: ours(size, use_mem_delta_rule=True),
        CHUNKS: ours(size, detach_every_num_segments=4),
        LLAMA: llama(size, DTYPE),
        MISTRAL: mistral(size, segment_length, DTYPE),
        # As infini-transformer-pytorch does it.
        ALL_HEADS: ours(all_heads, detach_every_num_segments=2),
        LUCIDRAINS: lucidrains(all_heads, segment_length, DTYPE),
    }


def model_of(name: str) -> str:
    """The contender that a name with the ways to run it is of."""
    for way in (CUDNN, PREALLOCATED, GRAPH, COMPILED):
        name = name.replace(way, "")
    return name


def message(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"


class Bench:
    """
    Attributes:
        device: `"cuda"` or `"cpu"`.
        card: its name, which the cells of a file are told apart by.
        results: by card and key, what was measured.
        models: those of the size that is measured.
    """

    def __init__(self, folder: Path, device: str, is_short: bool, segment_length: int):
        self.device, self.is_short = device, is_short
        self.segment_length = 16 if is_short else segment_length
        self.card = torch.cuda.get_device_name() if device == "cuda" else platform.machine() or "CPU"
        self.clock = clock_of(device)
        self.file = folder / "results.json"
        self.results: dict[str, dict] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.size_name, self.models = "", {}

    # What was measured

    @property
    def cells(self) -> dict[str, dict]:
        return self.results.setdefault(self.card, {"versions": {}, "cells": {}})["cells"]

    def save(self) -> None:
        self.results[self.card]["versions"] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "segment_length": self.segment_length,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial_file = self.file.with_suffix(".partial")
        partial_file.write_text(json.dumps(self.results, indent=1) + "\n")
        partial_file.replace(self.file)

    def limits(self, cell: Cell) -> dict:
        """What `limits` has measured; empty if it failed."""
        found = self.cells.get(Cell("limits", cell.size).key, {})
        return found if "matmul_flops" in found else {}

    # Models and inputs

    def size(self, cell: Cell) -> dict:
        return SHORT_SIZE if self.is_short else SIZES[cell.size]

    def length(self, cell: Cell) -> int:
        return cell.tokens // SHORT_SCALE if self.is_short else cell.tokens

    def ids(self, cell: Cell, length: int) -> torch.Tensor:
        """`(batch, length)`, the same ones each time."""
        generator = torch.Generator().manual_seed(0)
        shape = (cell.batch, length)
        return torch.randint(0, self.size(cell)["vocab_size"], shape, generator=generator).to(self.device)

    def contender(self, cell: Cell, name: str) -> Contender:
        return contenders(self.size(cell), self.segment_length)[model_of(name)]

    def model(self, cell: Cell, name: str) -> Any:
        name = model_of(name)
        if self.size_name != cell.size:
            self.models.clear()
            self.free()
            self.size_name = cell.size
        if name not in self.models:
            with torch.device(self.device):
                model = self.contender(cell, name).build()
            if name not in OWN_WEIGHTS:
                # One set of weights for all: as parameters, so that tied ones stay tied.
                own = self.model(cell, LINEAR).state_dict(keep_vars=True)
                model.load_state_dict(own, strict=False, assign=True)
            self.models[name] = model
        return self.models[name]

    def kernel(self, name: str) -> AbstractContextManager:
        """Llama by its fastest kernels; ours as sdpa chooses, since windows have masks."""
        if self.device == "cpu":
            return nullcontext()
        if CUDNN in name:
            return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if model_of(name) == LLAMA else nullcontext()

    def free(self) -> None:
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    @contextmanager
    def caught(self, outcome: dict) -> Iterator[None]:
        """Puts what goes wrong into `outcome`; what leaves the GPU of no use is raised again."""
        failure = None
        try:
            yield
        except torch.OutOfMemoryError as error:
            outcome["left_out"] = "does not fit"
            failure = message(error)
        except Exception as error:
            outcome["error"] = failure = message(error)
            if isinstance(error, getattr(torch, "AcceleratorError", ())):
                # Raises where the GPU is lost to this process; a graph that cannot be captured leaves it as it was.
                torch.zeros(1, device=self.device).item()
        if failure is not None:
            print(f"    {failure}", flush=True)

    # Measuring

    def first(self, run: Callable, weights: nn.Module) -> dict:
        """The first run: its seconds, and the peak of a process that has no more than this model."""
        outcome: dict = {}
        with self.caught(outcome):
            if self.device == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            start = self.clock()
            run()
            outcome["seconds"] = [self.clock() - start]
            if self.device == "cuda":
                extra = torch.cuda.max_memory_allocated() - before
                outcome["peak_nbytes"] = weights_nbytes(weights) + extra
        return outcome

    def rounds(self, runs: dict[str, Callable]) -> dict[str, list[float]]:
        """Seconds of runs that take turns, in as many rounds as there is time for."""
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        start = self.clock()
        least, most = (1, 1) if self.is_short else (LEAST_ROUNDS, MOST_ROUNDS)
        for count in range(most if runs else 0):
            if count >= least and self.clock() - start > ROUNDS_SECONDS:
                break
            for name, took in interleaved_seconds(runs, 1, warm_up=False, clock=self.clock).items():
                seconds[name] += took
        return seconds

    def compare(self, cell: Cell, names: list[str], make: Callable[[str], Callable]) -> dict[str, dict]:
        """
        Each contender once, and then those that ran in turns.

        Args:
            make: the run of a contender, from its name.
        """
        outcomes: dict[str, dict] = {}
        runs = {}
        for name in names:
            outcomes[name] = outcome = {}
            predicted = self.predicted_seconds(cell, name)
            if predicted > LONGEST_SECONDS:
                outcome |= {"left_out": f"would take {predicted:.0f} s", "extrapolated_seconds": predicted}
                continue
            with self.caught(outcome):
                run = partial(self._run_by, name, make(name))
                # For the clock of the first run: kernels are loaded, and algorithms chosen.
                outcome |= self.first(run, self.model(cell, name))
                if not predicted and outcome.get("seconds", [0.0])[0] >= ONCE_SECONDS:
                    # Triton's kernels were compiled in it.
                    outcome |= self.first(run, self.model(cell, name))
                if "seconds" in outcome and outcome["seconds"][0] < ONCE_SECONDS:
                    runs[name] = run
        with self.caught(outcomes.setdefault("all in turns", {})):
            for name, seconds in self.rounds(runs).items():
                outcomes[name]["seconds"] = seconds
        if not outcomes["all in turns"]:
            del outcomes["all in turns"]
        return outcomes

    def _run_by(self, name: str, run: Callable) -> None:
        with self.kernel(name):
            run()

    def predicted_seconds(self, cell: Cell, name: str) -> float:
        """From shorter texts: a T + b T² for full attention, a T for others; 0 if there are none."""
        points, tokens = {}, self.length(cell)
        for other in self.cells.values():
            is_like = (other["part"], other["size"]) == (cell.part, cell.size) and other["tokens"] <= tokens
            seconds = other.get("contenders", {}).get(name, {}).get("seconds")
            if is_like and seconds:
                points[other["tokens"]] = median(seconds) / other["batch"]
        if cell.part != "prefill" or not points:
            return 0.0
        return cell.batch * extrapolated(points, tokens, is_quadratic=model_of(name) == LLAMA)


def extrapolated(points: dict[int, float], tokens: int, is_quadratic: bool) -> float:
    """Seconds for `tokens`, from those for fewer."""
    (*_, longest) = sorted(points)
    linear = points[longest] * tokens / longest
    if not is_quadratic:
        return linear
    if len(points) == 1:
        return linear * tokens / longest
    before = sorted(points)[-2]
    slope = (points[longest] / longest - points[before] / before) / (longest - before)
    return linear + max(slope, 0.0) * (tokens - longest) * tokens


def weights_nbytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@torch.no_grad()
def limits(bench: Bench, cell: Cell) -> dict:
    tokens, width, nbytes = (64, 64, 2**16) if bench.is_short else (16_384, 8192, 2**32)
    repeats = 1 if bench.is_short else 20
    return {
        "matmul_flops": machine.matmul_flops(bench.size(cell), tokens, DTYPE, repeats, device=bench.device),
        "square_matmul_flops": machine.square_matmul_flops(width, DTYPE, bench.device, repeats),
        "read_bandwidth": machine.read_bandwidth(nbytes, device=bench.device),
        "copy_bandwidth": machine.copy_bandwidth(nbytes, bench.device),
    }


def _most_flops(limits: dict) -> float:
    """Of the products that were measured: those of a shape's own layers may be too short for the clock."""
    return max(limits["matmul_flops"], limits["square_matmul_flops"])


@torch.no_grad()
def prefill(bench: Bench, cell: Cell) -> dict:
    """Reading texts into a cache, where the last logits are asked for."""
    length = bench.length(cell)
    ids = bench.ids(cell, length)
    names = [LINEAR, LLAMA, SLIDING]
    if cell.batch == 1 and cell.tokens <= 32_768:
        names += [DELTA, MISTRAL]
        if cell.size == "135m":
            names += [ALL_HEADS, LUCIDRAINS]
        if bench.device == "cuda":
            names.append(LINEAR + CUDNN)
    if bench.device == "cuda" and cell.batch == 1 and cell.size != "8b":
        names.append(LLAMA + CUDNN)

    def make(name: str) -> Callable:
        return partial(bench.contender(cell, name).prefill, bench.model(cell, name), ids)

    outcomes = bench.compare(cell, names, make)
    found: dict = {"contenders": outcomes}
    if bound := bench.limits(cell):
        for name in (name for name in names if name in (LINEAR, SLIDING)):
            local_attention = "sliding" if name == SLIDING else "segment"
            flops = cell.batch * needed_flops(bench.size(cell), length, bench.segment_length, local_attention)
            if seconds := outcomes[name].get("seconds"):
                outcomes[name]["share_of_matmul"] = flops / median(seconds) / _most_flops(bound)
        if cell.size == "8b" and not bench.is_short:
            device = scale.Device(flops=_most_flops(bound), bandwidth=bound["read_bandwidth"])
            assumed = scale.Assumptions(matmul_share=1.0)
            found["predicted_seconds"] = {
                SLIDING: cell.batch * scale.infini_prefill_seconds(length, device, assumed),
                LLAMA: cell.batch * scale.full_prefill_seconds(length, device, assumed),
            }
    return found


@torch.no_grad()
def forward(bench: Bench, cell: Cell) -> dict:
    """A text of at most one segment, which both models read by the same operations."""
    ids = bench.ids(cell, bench.length(cell))

    def compared(use_cache: bool) -> dict[str, dict]:
        def make(name: str) -> Callable:
            return partial(bench.model(cell, name), ids, use_cache=use_cache, logits_to_keep=1)

        return bench.compare(cell, [LINEAR, SLIDING, LLAMA], make)

    return {"contenders": compared(False), "contenders_with_cache": compared(True)}


def in_place(step: Callable, cache: InfiniCache) -> Callable:
    """A step whose states stay where they are in memory: those that it makes anew are copied back."""

    def advance() -> Any:
        before = [layer.states() for layer in cache.layers]
        output = step()
        for layer, states in zip(cache.layers, before):
            for name, state in states.items():
                if (after := getattr(layer, name)) is not state:
                    state.copy_(after)
                    setattr(layer, name, state)
        return output

    return advance


class Steps:
    """Decode steps of a contender after so many tokens; each run is of as many, and full attention takes them back."""

    def __init__(self, bench: Bench, cell: Cell, name: str, count: int):
        self.model, self.count = bench.model(cell, name), count
        length = bench.length(cell)
        if PREALLOCATED in name:
            self.cache = preallocated_cache(self.model, length, cell.batch)
        else:
            self.cache = bench.contender(cell, name).state_after(self.model, length, cell.batch)
        self.is_full = model_of(name) == LLAMA
        self.nbytes = state_nbytes(self.cache)
        self.ids = bench.ids(cell, 1)
        call: Callable = self.model.forward
        if COMPILED in name:
            # In a smoke test, the graph alone.
            backend = "eager" if bench.is_short else "inductor"
            call = torch.compile(call, fullgraph=True, dynamic=False, backend=backend)
        self.step = partial(call, self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        if GRAPH in name:
            self.step = self._captured(self.step)

    def __call__(self) -> None:
        for _ in range(self.count):
            self.step()
        if self.is_full:
            self.cache.crop(-self.count)

    def _captured(self, step: Callable) -> Callable:
        """
        A step as one launch, which goes on from where it left its states. Full attention repeats one and the same
        step, whose length the graph has.
        """

        def taken_back() -> None:
            step()
            self.cache.crop(-1)

        advance = taken_back if self.is_full else in_place(step, self.cache)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                advance()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            advance()
        self.is_full = False
        return graph.replay


@torch.no_grad()
def decode(bench: Bench, cell: Cell) -> dict:
    """A decode step; contenders one after the other, since the caches of some fill the GPU."""
    return _decoded(bench, cell, [LINEAR, LLAMA + PREALLOCATED, SLIDING, LLAMA, MISTRAL])


@torch.no_grad()
def graph(bench: Bench, cell: Cell) -> dict:
    """As `decode`, each step one launch."""
    if bench.device == "cpu":
        return {}
    return _decoded(bench, cell, [LINEAR + GRAPH, LLAMA + PREALLOCATED + GRAPH, SLIDING + GRAPH])


@torch.no_grad()
def compiled(bench: Bench, cell: Cell) -> dict:
    """As `decode`, of our step compiled: launched by the host, and as a CUDA graph."""
    names = [LINEAR + COMPILED]
    if bench.device == "cuda":
        names += [LINEAR + COMPILED + GRAPH, SLIDING + COMPILED + GRAPH]
    return _decoded(bench, cell, names)


def _decoded(bench: Bench, cell: Cell, names: list[str]) -> dict:
    outcomes: dict[str, dict] = {}
    count = 2 if bench.is_short else STEPS
    bandwidth = bench.limits(cell).get("read_bandwidth")
    for name in names:
        outcomes[name] = outcome = {}
        with bench.caught(outcome), bench.kernel(name):
            steps = Steps(bench, cell, name, count)
            outcome |= bench.first(steps, steps.model)
            if "seconds" in outcome:
                outcome["seconds"] = [took / count for took in bench.rounds({name: steps})[name]]
                outcome["state_nbytes"] = steps.nbytes
                if "peak_nbytes" in outcome:
                    outcome["peak_nbytes"] += steps.nbytes
                if bandwidth:
                    read = weights_nbytes(steps.model) + steps.nbytes
                    outcome["share_of_bandwidth"] = read / median(outcome["seconds"]) / bandwidth
        steps = None
        bench.free()
    found: dict = {"contenders": outcomes}
    size, weights = bench.size(cell), weights_nbytes(bench.model(cell, LINEAR))
    kept = [of["state_nbytes"] for name, of in outcomes.items() if model_of(name) == LINEAR and "state_nbytes" in of]
    if kept:
        full = cell.batch * key_value_nbytes(size, bench.length(cell), DTYPE)
        found["ratio_by_bytes"] = (weights + full) / (weights + kept[0])
    if cell.size == "8b" and not bench.is_short and bandwidth:
        device = scale.Device(bandwidth=bandwidth)
        states = {SLIDING: scale.state_nbytes(), LLAMA + PREALLOCATED: scale.full_nbytes(cell.tokens)}
        found["predicted_seconds"] = {
            name: scale.decode_seconds(cell.batch * nbytes, device) for name, nbytes in states.items()
        }
    return found


def training(bench: Bench, cell: Cell) -> dict:
    """Forward, loss and backward; with gradient checkpointing from 32,768 tokens on."""
    ids = bench.ids(cell, bench.length(cell))
    is_checkpointed = cell.tokens >= 32_768
    names = [LINEAR, LLAMA, SLIDING, DELTA, CHUNKS]
    if cell.size == "135m" and not is_checkpointed:
        names += [ALL_HEADS, LUCIDRAINS]

    def make(name: str) -> Callable:
        model, contender = bench.model(cell, name), bench.contender(cell, name)
        model.train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})

        def run() -> None:
            contender.train(model, ids)
            model.zero_grad()

        return run

    try:
        return {"contenders": bench.compare(cell, names, make), "gradient_checkpointing": is_checkpointed}
    finally:
        for name in names:
            if (model := bench.models.get(name)) is not None:
                model.zero_grad()
                model.eval()
                if is_checkpointed:
                    model.gradient_checkpointing_disable()


@torch.no_grad()
def profile_of_prefill(bench: Bench, cell: Cell) -> dict:
    ids = bench.ids(cell, bench.length(cell))

    def make(name: str) -> Callable:
        return partial(bench.contender(cell, name).prefill, bench.model(cell, name), ids)

    return _profiled(bench, [LINEAR, SLIDING, LLAMA], make)


@torch.no_grad()
def profile_of_decode(bench: Bench, cell: Cell) -> dict:
    """Of 20 steps."""
    count = 2 if bench.is_short else PROFILED_STEPS
    return _profiled(bench, [LINEAR, SLIDING, LLAMA + PREALLOCATED], lambda name: Steps(bench, cell, name, count))


def _profiled(bench: Bench, names: list[str], make: Callable[[str], Callable]) -> dict:
    outcomes: dict[str, dict] = {}
    for name in names:
        outcomes[name] = outcome = {}
        with bench.caught(outcome), bench.kernel(name):
            outcome |= profile(make(name), bench.device)
        bench.free()
    return {"profiles": outcomes}


MEASURES: dict[str, Callable[[Bench, Cell], dict]] = {
    "limits": limits,
    "prefill": prefill,
    "forward": forward,
    "decode": decode,
    "graph": graph,
    "training": training,
    "profile of prefill": profile_of_prefill,
    "profile of decode": profile_of_decode,
    "compiled": compiled,
}


def has_failed(measured: dict) -> bool:
    """Whether anything in a cell is an error; what does not fit is none."""
    if "error" in measured:
        return True
    return any(has_failed(part) for part in measured.values() if isinstance(part, dict))


def measure(bench: Bench, cells: list[Cell], retry: bool, limit_seconds: float, start: float) -> None:
    for cell in cells:
        if cell.key in bench.cells and not (retry and has_failed(bench.cells[cell.key])):
            continue
        elapsed = time.monotonic() - start
        if elapsed + (0 if bench.is_short else cell.most_seconds) > limit_seconds:
            print(f"{elapsed:4.0f} s: no time left for {cell.key}", flush=True)
            continue
        print(f"{elapsed:4.0f} s: {cell.key}", flush=True)
        measured: dict = {"part": cell.part, "size": cell.size, "tokens": bench.length(cell), "batch": cell.batch}
        try:
            with bench.caught(measured):
                measured |= MEASURES[cell.part](bench, cell)
        finally:
            measured["cell_seconds"] = time.monotonic() - start - elapsed
            bench.cells[cell.key] = measured
            bench.save()
        print(gpu_report.lines(measured), flush=True)
        bench.free()


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where results.json is, or will be")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="(default: all)")
    parser.add_argument("--limit-seconds", type=float, default=540, help="when to end (default: %(default)s)")
    parser.add_argument("--retry", action="store_true", help="measure cells again in which something failed")
    parser.add_argument("--segment-length", type=int, default=SEGMENT_LENGTH, metavar="N")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--short", action="store_true", help="tiny models and texts, for a smoke test")
    parser.add_argument("--render", type=Path, metavar="FOLDER", help="measure nothing: tables and plots of a folder")
    arguments = parser.parse_args()
    if (arguments.output is None) == (arguments.render is None):
        parser.error("give one of --output FOLDER and --render FOLDER")
    if arguments.output is not None:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            parser.error("there is no GPU here. To see whether it runs, add --short --device cpu.")
        torch.manual_seed(0)
        # What is imported need not be looked at each time that memory is freed.
        gc.freeze()
        bench = Bench(arguments.output, arguments.device, arguments.short, arguments.segment_length)
        print(f"{bench.card}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
        try:
            cells = plan(arguments.part, arguments.sizes)
            measure(bench, cells, arguments.retry, arguments.limit_seconds, start)
        finally:
            print(f"{time.monotonic() - start:.0f} s in all", flush=True)
    if arguments.render is not None:
        gpu_report.draw_all(arguments.render)
    print(gpu_report.render(arguments.output or arguments.render))


if __name__ == "__main__":
    main()
