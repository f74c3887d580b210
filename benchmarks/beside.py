"""
This checkout beside another one, as after beside before: what is published, what is kept of a text, and what it costs.

    python -m benchmarks.beside ../before
    python -m benchmarks.beside ../before --sections code state

Both packages are loaded into one process. Their models have the same weights and take turns on one thread. Times are
medians of processor time: it is steadier than the clock's on a machine that others use. Beside the ratio of medians
stand the least and the greatest ratio of two turns.
"""

import argparse
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves
from transformers.dynamic_module_utils import get_relative_import_files

from .sizes import SIZE
from .timing import interleaved_seconds, ratio


SEGMENT_LENGTHS = (256, 512, 2048)
SINKS = {"segment": 0, "sliding": 4}
IS_DELTA = {"linear": False, "delta": True}
LEAST_TOKENS = 2048
# All layers are compiled alike, each in seconds.
COMPILED_LAYERS = 2


class Side(NamedTuple):
    """A checkout, and its package `modeling_infini` under a name of its own."""

    root: Path
    package: ModuleType


def load(root: Path, name: str) -> Side:
    folder = root / "modeling_infini"
    spec = importlib.util.spec_from_file_location(
        f"{name}_modeling_infini", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or not folder.is_dir():
        raise FileNotFoundError(f"{root} is no checkout: it has no folder modeling_infini.")
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    spec.loader.exec_module(package)
    return Side(root, package)


def row(name: str, before: Any, after: Any, share: Any) -> None:
    print(f"| {name} | {before} | {after} | {share} |", flush=True)


def row_of_counts(name: str, before: int, after: int) -> None:
    row(name, f"{before:,}", f"{after:,}", f"{after / before:.3g}" if before else "")


class Bench:
    """
    Args:
        before, after: what is compared.
        size: of the models.
        segment_lengths: N of each line.
        least_tokens: of the texts that are read and trained on; two segments where these are longer.
        seconds: how long the two take turns for a line, after two turns; five turns each at least.
    """

    def __init__(
        self,
        before: Side,
        after: Side,
        size: dict = SIZE,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        least_tokens: int = LEAST_TOKENS,
        seconds: float = 5.0,
    ):
        self.sides = (before, after)
        self.size, self.segment_lengths = size, segment_lengths
        self.least_tokens, self.seconds = least_tokens, seconds

    def models(self, segment_length: int, mode: str, rule: str = "linear", **fields) -> list[Any]:
        """One of each side, of the same random weights."""
        fields = {
            **self.size,
            "segment_length": segment_length,
            "local_attention": mode,
            "num_sink_tokens": SINKS[mode],
            "use_mem_delta_rule": IS_DELTA[rule],
            **fields,
        }
        torch.manual_seed(0)
        before, after = (package.InfiniForCausalLM(package.InfiniConfig(**fields)).eval() for _, package in self.sides)
        after.load_state_dict(before.state_dict())
        return [before, after]

    def ids(self, tokens: int) -> torch.Tensor:
        return torch.randint(0, self.size["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))

    def text(self, segment_length: int) -> torch.Tensor:
        return self.ids(max(self.least_tokens, 2 * segment_length))

    def row_of_times(self, name: str, runs: Sequence[Callable[[], Any]]) -> None:
        named = dict(zip(("before", "after"), runs))
        clock = time.process_time
        first = interleaved_seconds(named, 1, clock=clock)
        rounds = max(5, int(self.seconds / (first["before"][0] + first["after"][0])))
        seconds = interleaved_seconds(named, rounds, warm_up=False, clock=clock)
        before, after = (f"{1000 * median(took):.4g} ms" for took in seconds.values())
        row(name, before, after, ratio(seconds["after"], seconds["before"]))

    def code(self) -> None:
        texts = [published(side.root) for side in self.sides]
        row_of_counts("published files", *(len(files) for files in texts))
        for name, found in (
            ("their lines", ""),
            ("lines with `isinstance(layout`", "isinstance(layout"),
            ("lines with `context_parallel`", "context_parallel"),
        ):
            row_of_counts(name, *(sum(found in line for text in files for line in text) for files in texts))

    @torch.no_grad()
    def logits(self) -> None:
        for mode, rule in itertools.product(SINKS, IS_DELTA):
            segment_length = min(self.segment_lengths)
            ids = self.text(segment_length)
            before, after = (model(ids).logits for model in self.models(segment_length, mode, rule))
            error = (after - before).abs().max() / before.abs().max()
            row(f"largest difference of logits, {mode}, {rule}, N = {segment_length:,}", "", f"{error:.1e}", "")

    @torch.no_grad()
    def state(self) -> None:
        for mode, segment_length in itertools.product(SINKS, self.segment_lengths):
            ids = self.ids(2 * segment_length + 1)
            nbytes = (state_nbytes(model(ids).past_key_values) for model in self.models(segment_length, mode))
            row_of_counts(f"state per sequence in bytes, {mode}, N = {segment_length:,}", *nbytes)

    def prefill(self) -> None:
        @torch.no_grad()
        def run(model: Any, ids: torch.Tensor) -> None:
            model(ids, use_cache=True, logits_to_keep=1)

        self._texts("prefill", run)

    def training(self) -> None:
        def run(model: Any, ids: torch.Tensor) -> None:
            model.train().zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()

        self._texts("training step", run)

    def _texts(self, name: str, run: Callable[[Any, torch.Tensor], None]) -> None:
        for mode, segment_length, rule in itertools.product(SINKS, self.segment_lengths, IS_DELTA):
            ids = self.text(segment_length)
            runs = [partial(run, model, ids) for model in self.models(segment_length, mode, rule)]
            self.row_of_times(f"{name} of {ids.shape[1]:,} tokens, {mode}, {rule}, N = {segment_length:,}", runs)

    def decode(self) -> None:
        self._steps("decode step, eager", lambda model: model)

    def compiled(self) -> None:
        layers = min(COMPILED_LAYERS, self.size["num_hidden_layers"])
        compiled = partial(torch.compile, fullgraph=True)
        self._steps(
            f"decode step, compiled, {layers} layers",
            lambda model: compiled(model.forward),
            num_hidden_layers=layers,
        )

    @torch.no_grad()
    def _steps(self, name: str, step_of: Callable[[Any], Callable], **fields) -> None:
        for mode, segment_length in itertools.product(SINKS, self.segment_lengths):
            torch._dynamo.reset()
            runs = []
            for model in self.models(segment_length, mode, **fields):
                cache = model(self.ids(2 * segment_length + 1)).past_key_values
                runs.append(partial(step_of(model), self.ids(1), past_key_values=cache))
            self.row_of_times(f"{name}, {mode}, N = {segment_length:,}", runs)


SECTIONS = ("code", "state", "logits", "prefill", "training", "decode", "compiled")


def published(root: Path) -> list[list[str]]:
    """The lines of each file that is copied beside a published model."""
    model = root / "modeling_infini" / "modeling_infini.py"
    files = {str(model), *get_relative_import_files(str(model))}
    return [Path(file).read_text(encoding="utf-8").splitlines() for file in sorted(files)]


def state_nbytes(cache: Any) -> int:
    """Bytes of the tensors that the layers of a cache hold, whatever these are called."""
    states = (leaf for layer in cache.layers for leaf in tree_leaves(vars(layer)))
    storages = {state.untyped_storage() for state in states if isinstance(state, torch.Tensor)}
    return sum(storage.nbytes() for storage in storages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line of times (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="tiny models and texts, for a smoke test")
    options = parser.parse_args()
    torch.set_num_threads(1)
    after = Path(__file__).resolve().parent.parent
    sides = load(options.before.resolve(), "before"), load(after, "after")
    if options.short:
        size = {**SIZE, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        bench = Bench(*sides, size=size, segment_lengths=[16], least_tokens=32, seconds=0)
    else:
        bench = Bench(*sides, seconds=options.seconds)
    print("| | before | after | after / before [rounds] |\n|---|--:|--:|--:|")
    for name in options.sections:
        getattr(bench, name)()


if __name__ == "__main__":
    main()
