"""
What a model's memory does while it reads a document in constant memory: how much the gates give to it, how large it
grows, how much it returns beside local attention, and which parts of the document what it returns comes from.

    infini evaluate memory_use tuned/merged --text moby_dick.txt --tokens 65536 --output docs/memory_use

prints Markdown tables by layer and by position, and writes docs/memory_use.json and docs/memory_use.png.
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import logging

from modeling_infini.cache_layer import InfiniCacheLayer
from modeling_infini.memory import FEATURE_MAPS, MemoryState, apply_correction, delta_correction, linear_write

from .by_position import describe
from .loading import first_tokens, load_model, load_tokenizer, read_texts
from .losses import Progress


@dataclass(frozen=True)
class MemoryUse:
    """
    What the memory (M and z) of each head does in one document. The tokens before the document's last segment are cut
    into spans of whole segments; what is read is compared for the queries of the last segment. Local attention sees
    memory slots, too, if there are any.

    Attributes:
        layers: indices of the layers that have a memory; the dimension `layers` below is of these alone.
        spans: from the first token of each span to that after its last.
        local_share: share of local attention in the mix, `(layers, heads)`; of token gates, the mean over the last
            segment.
        memory_norm, normaliser_norm: Frobenius norms of M and z after each span, `(spans, layers, kv_heads)`.
        read_rms, local_rms: root mean square of what the memory returns and of the output of local attention, over the
            tokens of each span and, at last, over those of the last segment, `(spans + 1, layers, heads)`. Without
            the first segment, which reads nothing: NaN in a span that is the first segment alone.
        top_mass: share of what is added to z (summed over its dimensions) that comes from the 1 % of tokens that add
            most, `(layers, kv_heads)`; of the tokens of one segment, at least one of them, in the mean over segments.
        read_change: relative change of what the last segment's queries read, had a span not been written,
            `(spans, layers, heads)`. Keys, values and queries are those of the actual reading: this is the
            direct effect within a layer. M and z are exact; with the delta rule, later writes differ too.
        output_change: the same change after the gate, relative to the mix of local attention and memory.
    """

    layers: list[int]
    spans: list[tuple[int, int]]
    local_share: torch.Tensor
    memory_norm: torch.Tensor
    normaliser_norm: torch.Tensor
    read_rms: torch.Tensor
    local_rms: torch.Tensor
    top_mass: torch.Tensor
    read_change: torch.Tensor
    output_change: torch.Tensor

    @property
    def effective_spans(self) -> torch.Tensor:
        """
        Of how many spans a read is made, `(layers, heads)`: the participation ratio of `read_change`, 1 where a single
        span matters and the number of spans where all matter equally.
        """
        return self.read_change.sum(0) ** 2 / self.read_change.square().sum(0)

    @property
    def read_to_local(self) -> torch.Tensor:
        """What the memory returns beside local attention, before the gate, `(spans + 1, layers, heads)`."""
        return self.read_rms / self.local_rms

    def summary(self) -> dict[str, float]:
        """The document in a few numbers, for logs."""
        return {
            "local_share_min": self.local_share.min().item(),
            "local_share_mean": self.local_share.mean().item(),
            "memory_norm_max": self.memory_norm[-1].max().item(),
            "normaliser_norm_max": self.normaliser_norm[-1].max().item(),
            "read_to_local_mean": self.read_to_local[-1].mean().item(),
            "effective_spans_mean": self.effective_spans.mean().item(),
            "output_change_max": self.output_change.max().item(),
            "top_mass_mean": self.top_mass.mean().item(),
        }

    def to_dict(self) -> dict[str, Any]:
        """All numbers, to six digits, in nested lists in the order of their shapes; `None` for NaN."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["effective_spans"] = self.effective_spans
        return {
            name: _rounded(value.tolist()) if isinstance(value, torch.Tensor) else value
            for name, value in values.items()
        }


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(f"{values:.6g}") if math.isfinite(values) else None


def _squares(states: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of each head of `(1, tokens, heads, head_dim)`: `(heads,)`."""
    return states.square().sum((0, 1, 3))


class _Layer:
    """
    What is followed of one layer.

    Attributes:
        local, queries, memory, local_share, mix: what the memory was called with at last, and what it returned.
        without: the memory had each span not been written: M `(spans, kv_heads, key_dim, head_dim)` and z.
    """

    local: torch.Tensor
    queries: torch.Tensor
    memory: MemoryState
    local_share: torch.Tensor
    mix: torch.Tensor

    def __init__(self, attention: Any, spans: int):
        self.attention, self.config = attention, attention.config
        weight = attention.head_gates.weight
        dtype = torch.promote_types(attention.o_proj.weight.dtype, torch.float32)
        heads, kv_heads, key_dim = (
            getattr(self.config, name) for name in ("num_attention_heads", "num_key_value_heads", "memory_key_dim")
        )
        self.without = MemoryState(
            weight.new_zeros(spans, kv_heads, key_dim, self.config.head_dim, dtype=dtype),
            weight.new_zeros(spans, kv_heads, key_dim, dtype=dtype),
        )
        self.memory_norm, self.normaliser_norm = (weight.new_zeros(spans, kv_heads, dtype=dtype) for _ in range(2))
        self.read_squares, self.local_squares = (weight.new_zeros(spans + 1, heads, dtype=dtype) for _ in range(2))
        self.tokens = [0] * (spans + 1)
        self.top_mass: list[torch.Tensor] = []

    def keep(self, module: nn.Module, arguments: tuple, mix: torch.Tensor) -> None:
        self.local, self.queries, self.memory, self.local_share = arguments
        self.mix = mix

    @property
    def mean_local_share(self) -> torch.Tensor:
        """Over the tokens of the last call: `(heads,)`."""
        return self.local_share.mean((0, 1))

    def read(self, memory: MemoryState) -> torch.Tensor:
        """What the queries of the last call read from `memory` `(1, kv_heads, ...)`."""
        return self.attention.memory.read(self.queries, memory)

    def add_read(self, span: int) -> None:
        """Adds the sizes of what the last call read and of what it saw."""
        self.read_squares[span] += _squares(self.read(self.memory))
        self.local_squares[span] += _squares(self.local.to(self.local_squares.dtype))
        self.tokens[span] += self.queries.shape[1]

    def add_write(self, span: int, layer: InfiniCacheLayer) -> None:
        """Writes the segment of the last call into the memories without another span."""
        call = layer.record[0]
        keys = call.keys if call.memory_keys is None else call.memory_keys
        keys, values = (states[0].transpose(0, 1).to(layer.memory.dtype) for states in (keys, call.values))
        features, strength = FEATURE_MAPS[self.config.memory_feature_map](keys), None
        if call.write_strength is not None:
            strength = call.write_strength[0].T.unsqueeze(-1).to(layer.memory.dtype)
            values = values * strength
        matrix, normaliser = linear_write(features, values)
        if self.config.use_mem_delta_rule:
            correction = delta_correction(features, self.without.normaliser, self.config.memory_eps, strength)
            matrix = matrix - apply_correction(correction, self.without.matrix)
        is_other = torch.arange(len(self.without.matrix), device=matrix.device) != span
        self.without.matrix.add_(matrix * is_other[:, None, None, None])
        self.without.normaliser.add_(normaliser * is_other[:, None, None])

        self.memory_norm[span] = layer.memory[0].norm(dim=(-2, -1))
        self.normaliser_norm[span] = layer.normaliser[0].norm(dim=-1)
        mass = features.sum(-1)
        self.top_mass.append(mass.topk(max(1, mass.shape[1] // 100)).values.sum(1) / mass.sum(1))

    def changes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Relative changes, without each span, of what the last call read and of its mix: `(spans, heads)` each."""
        read = self.read(self.memory)
        # One span at a time: a read is as large as all queries.
        without = (MemoryState(*states) for states in zip(*(states.split(1) for states in self.without)))
        memory_share = (1 - self.local_share.to(read.dtype)).unsqueeze(-1)
        of_read, of_mix = [], []
        for memory in without:
            change = self.read(memory) - read
            of_read.append(_squares(change))
            of_mix.append(_squares(memory_share * change))
        before = read, self.mix.to(read.dtype)
        changes = torch.stack(of_read), torch.stack(of_mix)
        of_read_and_mix = [(change / _squares(states)).sqrt() for change, states in zip(changes, before)]
        return of_read_and_mix[0], of_read_and_mix[1]

    def root_mean_squares(self, squares: torch.Tensor) -> torch.Tensor:
        """`(spans + 1, heads)`; NaN where nothing was read."""
        return (squares / (squares.new_tensor(self.tokens)[:, None] * self.config.head_dim)).sqrt()


@torch.no_grad()
def memory_use(
    model: PreTrainedModel, input_ids: torch.Tensor, max_spans: int = 32, progress: Progress | None = None
) -> MemoryUse:
    """
    What the memory does while a document is read, segment by segment. It takes the activations of a segment, and M and
    z once for each span, however long the document is.

    Args:
        model: a causal language model with Infini-attention, which may be wrapped by PEFT; in evaluation mode.
        input_ids: `(1, tokens)`, longer than a segment.
        max_spans: into how many spans the segments before the last are cut, if there are so many.

    Raises:
        ValueError: if no layer has a memory, or the document is not longer than a segment, and so reads none.
    """
    if not model.config.layers_with_memory:
        raise ValueError("No layer of the model has a memory (memory_layers=[]): there is nothing to follow.")
    segments = input_ids.split(model.config.segment_length, 1)
    if len(segments) < 2:
        raise ValueError(
            f"A document of {input_ids.shape[1]} tokens has no memory to read: it must be longer than "
            f"segment_length={model.config.segment_length}."
        )
    parts = torch.arange(len(segments) - 1).tensor_split(min(len(segments) - 1, max_spans))
    span_of = [*(span for span, part in enumerate(parts) for _ in part), -1]
    cache = model.new_cache()  # type: ignore[operator]
    layers = [_Layer(module, len(parts)) for module in model.modules() if hasattr(module, "head_gates")]
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.attention.memory.register_forward_hook(layer.keep).remove)
        for index, (span, ids) in enumerate(zip(span_of, segments)):
            for state in cache.layers:
                # The record has what is written.
                state.record = []
            model(input_ids=ids.to(model.device), past_key_values=cache, logits_to_keep=1)
            for layer in layers:
                if index > 0:
                    layer.add_read(span)
                if span >= 0:
                    layer.add_write(span, cache.layers[layer.attention.layer_idx])
            if progress is not None:
                progress(ids.shape[1])
    changes = [layer.changes() for layer in layers]
    bounds = [int(part[0]) * model.config.segment_length for part in parts]
    return MemoryUse(
        layers=[layer.attention.layer_idx for layer in layers],
        spans=list(zip(bounds, [*bounds[1:], (len(segments) - 1) * model.config.segment_length])),
        local_share=torch.stack([layer.mean_local_share.cpu() for layer in layers]),
        memory_norm=_stacked([layer.memory_norm for layer in layers]),
        normaliser_norm=_stacked([layer.normaliser_norm for layer in layers]),
        read_rms=_stacked([layer.root_mean_squares(layer.read_squares) for layer in layers]),
        local_rms=_stacked([layer.root_mean_squares(layer.local_squares) for layer in layers]),
        top_mass=torch.stack([torch.stack(layer.top_mass).mean(0).cpu() for layer in layers]),
        read_change=_stacked([read for read, _ in changes]),
        output_change=_stacked([output for _, output in changes]),
    )


def _stacked(layers: list[torch.Tensor]) -> torch.Tensor:
    """`(spans, ...)` of each layer to `(spans, layers, ...)` on the CPU."""
    return torch.stack([layer.cpu() for layer in layers], 1)


class MemoryUseCallback(TrainerCallback):
    """
    Logs [`MemoryUse.summary`] of one document, as `memory/...`, after each evaluation:
    `trainer.add_callback(MemoryUseCallback(trainer, input_ids))`.

    Args:
        input_ids: `(1, tokens)`, as of [`memory_use`].
    """

    def __init__(self, trainer: Trainer, input_ids: torch.Tensor):
        self.trainer, self.input_ids = trainer, input_ids

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        summary = memory_use(model, self.input_ids).summary()
        self.trainer.log({f"memory/{name}": value for name, value in summary.items()})


def markdown(use: MemoryUse) -> str:
    """Two tables: by layer, in the mean over heads; and by position, in the mean over layers and heads."""
    heads = [
        "layer",
        "local share: mean (min)",
        "norm of M",
        "norm of z",
        "read / local, RMS",
        f"effective spans of {len(use.spans)}",
        "z from the top 1 % of tokens",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for index, (layer, share) in enumerate(zip(use.layers, use.local_share)):
        cells = [
            str(layer),
            f"{share.mean():.3f} ({share.min():.3f})",
            f"{use.memory_norm[-1, index].mean():.4g}",
            f"{use.normaliser_norm[-1, index].mean():.4g}",
            f"{use.read_to_local[-1, index].mean():.3f}",
            f"{use.effective_spans[index].mean():.1f}",
            f"{use.top_mass[index].mean():.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    heads = ["tokens", "norm of M", "norm of z", "read / local, RMS", "left out: change of the read", "of the mix"]
    lines += ["", f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for index, (start, end) in enumerate(use.spans):
        ratio = use.read_to_local[index].mean().item()
        cells = [
            f"{start:,} to {end - 1:,}",
            f"{use.memory_norm[index].mean():.4g}",
            f"{use.normaliser_norm[index].mean():.4g}",
            "" if math.isnan(ratio) else f"{ratio:.3f}",
            f"{use.read_change[index].mean():.2%}",
            f"{use.output_change[index].mean():.3%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| last segment | | | {use.read_to_local[-1].mean():.3f} | | |")
    return "\n".join(lines)


def plot(use: MemoryUse, file: str | Path) -> None:
    """Draws gates, norms by position, what each span changes, and what reads are made of. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    ((shares, norms), (changes, effective)) = figure.subplots(2, 2)
    ends = [end for _, end in use.spans]
    image = shares.imshow(use.local_share, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    shares.set(title="Share of local attention", xlabel="head", ylabel="layer with memory")
    figure.colorbar(image, ax=shares)
    for values, name in ((use.memory_norm, "M"), (use.normaliser_norm, "z")):
        means = values.flatten(1).mean(1)
        norms.plot(ends, means, marker=".", label=f"{name}, mean")
        norms.fill_between(ends, values.flatten(1).amin(1), values.flatten(1).amax(1), alpha=0.2)
    norms.set(title="Norms of the state (band: all layers and heads)", xlabel="tokens read", yscale="log")
    norms.grid(alpha=0.3)
    norms.legend()
    image = changes.imshow(use.read_change.mean(-1).T, aspect="auto", extent=(0, ends[-1], len(use.local_share), 0))
    changes.set(
        title="Change of the last segment's reads without a span",
        xlabel="span left out (tokens)",
        ylabel="layer with memory",
    )
    figure.colorbar(image, ax=changes)
    effective.plot(use.layers, use.effective_spans.mean(1), marker=".", label=f"effective spans of {len(use.spans)}")
    effective.plot(use.layers, use.read_to_local[-1].mean(1), marker=".", label="read / local, RMS")
    effective.set(title="What the last segment reads", xlabel="layer", yscale="log")
    effective.grid(alpha=0.3)
    effective.legend()
    figure.savefig(file, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub id of an Infini-attention model")
    parser.add_argument("--text", type=Path, help="a text file (default: the King James Bible)")
    parser.add_argument("--tokens", type=int, default=16384, help="how much of it is read (default: %(default)s)")
    parser.add_argument(
        "--spans", type=int, default=32, help="parts of the text that are left out, at most (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as they are saved)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--output", help="where to write OUTPUT.json and OUTPUT.png")
    options = parser.parse_args(arguments)
    if options.output and importlib.util.find_spec("matplotlib") is None:
        parser.error("--output draws a plot: pip install matplotlib")
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    model = load_model(options.model, dtype=options.dtype, device_map=options.device)
    if not hasattr(model.config, "segment_length"):
        parser.error(f"{options.model} has no memory: it is no Infini-attention model")
    texts = read_texts(None if options.text is None else [options.text])
    ((name, ids),) = first_tokens(load_tokenizer(options.model), texts, options.tokens).items()
    with tqdm(total=ids.shape[1], unit="token", unit_scale=True, desc=name, file=sys.stderr) as progress:
        use = memory_use(model, ids, options.spans, progress.update)
    print(markdown(use))
    if options.output:
        settings = {
            **vars(options),
            "text": name,
            "tokens": ids.shape[1],
            "model": describe(model, options.model),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        found = {"settings": settings, "summary": use.summary(), **use.to_dict()}
        Path(f"{options.output}.json").write_text(json.dumps(found) + "\n")
        plot(use, f"{options.output}.png")


if __name__ == "__main__":
    main()
