"""
How well long documents are read, by position: perplexity of the tokens of the first segment, of the second, of the
next two, the next four, ... with the memory on and off (the gates forced to local attention, nothing retrained), and
of a base model with full attention over windows. A memory that helps makes the difference on - off negative.

    python -m evaluation.by_position converted tuned/merged --text moby_dick.txt --tokens 65536 \
        --base path/to/llama --base-window 2048 --output docs/by_position

prints a Markdown table, and writes docs/by_position.json and docs/by_position.png.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from conversion.gguf_files import is_gguf

from .loading import add_text_arguments, first_tokens, load_model, load_tokenizer, read_texts, segment_length_of
from .losses import memory_off, token_losses, window_losses


# Losses of neighbouring tokens are correlated; means of so many tokens are taken to be independent.
BLOCK = 256

# From the first token to that after the last, both counted from 0.
Bucket = tuple[int, int]
# Of each document `(tokens - 1,)`; entry i is the loss of token i + 1.
Losses = Sequence[torch.Tensor]


class Mean(NamedTuple):
    """
    A mean over tokens.

    Attributes:
        standard_error: `None` where there are not at least two blocks of 256 tokens.
        tokens: how many there are.
    """

    mean: float
    standard_error: float | None
    tokens: int


def doubling_buckets(tokens: int, first: int) -> list[Bucket]:
    """[1, first), [first, 2 first), [2 first, 4 first), ... up to `tokens`."""
    ends, end = [], max(first, 2)
    while end < tokens:
        ends.append(end)
        end *= 2
    return list(zip([1, *ends], [*ends, tokens]))


def by_bucket(losses: Losses, buckets: Sequence[Bucket]) -> list[Mean]:
    """
    Means of the losses of documents, or of differences of losses paired by token, over the tokens in each bucket.

    The standard error is that of the mean of blocks of at least 256 neighbouring tokens of one document, as if the
    blocks were independent: tokens are not, and taken one by one would make it too small.

    Args:
        losses: of each document, `(tokens - 1,)`, as [`token_losses`] gives them; documents may end within a bucket.
        buckets: as [`doubling_buckets`] gives them.
    """
    found = []
    for start, end in buckets:
        parts = [document[start - 1 : end - 1].double() for document in losses]
        values = torch.cat(parts)
        blocks = [
            block.mean() for part in parts if len(part) >= BLOCK for block in part.tensor_split(len(part) // BLOCK)
        ]
        error = torch.stack(blocks).std().item() / math.sqrt(len(blocks)) if len(blocks) > 1 else None
        found.append(Mean(values.mean().item(), error, len(values)))
    return found


def report(readings: dict[str, Losses], pairs: dict[str, tuple[str, str]], segment_length: int) -> dict[str, Any]:
    """
    The numbers of the table and the plot.

    Args:
        readings: losses of the same documents by condition.
        pairs: by model, the conditions with its memory on and off.
        segment_length: where the first bucket ends.

    Returns:
        `buckets`, and `beyond_first_segment` of the same form, `None` if there is nothing.
    """
    tokens = 1 + max(len(document) for document in next(iter(readings.values())))
    buckets = doubling_buckets(tokens, segment_length)
    beyond = [(buckets[1][0], tokens)] if len(buckets) > 1 else []
    rows: list[dict[str, Any]] = [
        {"start": start, "end": end, "conditions": {}, "on_minus_off": {}} for start, end in buckets + beyond
    ]
    for name, losses in readings.items():
        for row, mean in zip(rows, by_bucket(losses, buckets + beyond)):
            row["tokens"] = mean.tokens
            row["conditions"][name] = {
                "nll": mean.mean,
                "perplexity": math.exp(mean.mean),
                "standard_error": mean.standard_error,
            }
    for name, (on, off) in pairs.items():
        differences = [with_memory - without for with_memory, without in zip(readings[on], readings[off])]
        for row, mean in zip(rows, by_bucket(differences, buckets + beyond)):
            row["on_minus_off"][name] = {"nll": mean.mean, "standard_error": mean.standard_error}
    return {"buckets": rows[: len(buckets)], "beyond_first_segment": rows[-1] if beyond else None}


def markdown(found: dict[str, Any]) -> str:
    """The table of a [`report`]: perplexity and (mean NLL), and differences in nats ± standard error."""
    rows = [*found["buckets"], *filter(None, [found["beyond_first_segment"]])]
    differences = rows[0]["on_minus_off"]
    heads = ["position", "tokens", *rows[0]["conditions"], *(f"{name}: on - off, nats" for name in differences)]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for row in rows:
        is_summary = row is found["beyond_first_segment"]
        name = f"all from {row['start']:,}" if is_summary else f"{row['start']:,} to {row['end'] - 1:,}"
        cells = [name, f"{row['tokens']:,}"]
        cells += [f"{mean['perplexity']:.2f} ({mean['nll']:.4f})" for mean in row["conditions"].values()]
        for difference in row["on_minus_off"].values():
            error = difference["standard_error"]
            cells.append(f"{difference['nll']:+.4f}" + (f" ± {error:.4f}" if error is not None else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, Any], pairs: dict[str, tuple[str, str]], file: str | Path) -> None:
    """Draws a [`report`]: perplexity by position, and what the memory adds to the NLL. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    buckets = found["buckets"]
    places = [math.sqrt(bucket["start"] * (bucket["end"] - 1)) for bucket in buckets]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    perplexities, differences = figure.subplots(1, 2)
    colours = {name: f"C{index}" for index, name in enumerate(pairs)}
    model_of = {condition: name for name, conditions in pairs.items() for condition in conditions}
    for condition in buckets[0]["conditions"]:
        is_off = condition in {off for _, off in pairs.values()}
        perplexities.plot(
            places,
            [bucket["conditions"][condition]["perplexity"] for bucket in buckets],
            color=colours[model_of[condition]] if condition in model_of else "black",
            linestyle="--" if is_off else "-",
            marker="o",
            markerfacecolor="white" if is_off else None,
            label=condition,
        )
    perplexities.set(ylabel="perplexity", title="Perplexity by position in the document")
    for name, colour in colours.items():
        means = [bucket["on_minus_off"][name] for bucket in buckets]
        differences.errorbar(
            places,
            [mean["nll"] for mean in means],
            yerr=[mean["standard_error"] or 0.0 for mean in means],
            color=colour,
            marker="o",
            capsize=3,
            label=name,
        )
    differences.axhline(0, color="grey", linewidth=0.8)
    differences.set(ylabel="NLL(memory on) - NLL(memory off), nats", title="What the memory adds (below 0: it helps)")
    for axes in (perplexities, differences):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("position (tokens; buckets at their geometric middle)")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    figure.savefig(file, dpi=150)


def name_and_source(argument: str) -> tuple[str, str]:
    """`name=source`, or a source that goes by the name of its folder or file."""
    name, separator, source = argument.partition("=")
    if separator and not Path(argument).exists():
        return name, source
    path = Path(argument).resolve()
    return path.stem if is_gguf(path) else path.name, argument


def describe(model: PreTrainedModel, source: str) -> dict[str, Any]:
    """What a reader of the numbers needs to know about a model."""
    fields = ("segment_length", "local_attention", "num_sink_tokens", "use_mem_delta_rule")
    described = {"source": source, "dtype": str(model.dtype).removeprefix("torch.")}
    described |= {name: getattr(model.config, name) for name in fields if hasattr(model.config, name)}
    local_shares = getattr(model, "local_shares", None)
    if local_shares is not None:
        described["mean_local_share"] = local_shares().mean().item()
    return described


def measure(
    models: dict[str, str],
    ids: dict[str, torch.Tensor],
    *,
    base: tuple[str, str] | None = None,
    base_window: int = 2048,
    chunk_length: int = 1024,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """
    Reads documents with each model, memory on and off, and with the base model; one model is in memory at a time.

    Args:
        models: sources of Infini-attention models by name.
        ids: of each document `(1, tokens)`, by name.
        base: name and source of a model with full attention.
        base_window: number of tokens of its windows.
        chunk_length: number of tokens that the others read in a call.
        options: of `from_pretrained`.

    Returns:
        The [`report`], with the models and the tokens read per second; and the conditions of each model, on and off.

    Raises:
        ValueError: if a model has no memory, or the base model cannot read such windows.
    """
    readings: dict[str, Losses] = {}
    pairs: dict[str, tuple[str, str]] = {}
    described: dict[str, Any] = {}
    speeds: dict[str, float] = {}
    total = sum(document.shape[1] - 1 for document in ids.values())
    # Before hours of reading, since it fails where a model has no memory.
    segment_length = min(segment_length_of(source) for source in models.values())
    passes = 2 * len(models) + (base is not None)
    with tqdm(total=passes * total, unit="token", unit_scale=True, file=sys.stderr) as progress:

        def read(condition: str, losses_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
            progress.set_description(condition)
            start = time.perf_counter()
            readings[condition] = [losses_of(document) for document in ids.values()]
            speeds[condition] = total / (time.perf_counter() - start)

        if base is not None:
            name, source = base
            model = load_model(source, **options)
            described[name] = describe(model, source)
            windows = partial(window_losses, model, window=base_window, progress=progress.update)
            read(f"{name}: full attention, windows of {base_window:,}", windows)
        for name, source in models.items():
            model = load_model(source, **options)
            described[name] = describe(model, source)
            on, off = pairs[name] = f"{name}: memory on", f"{name}: memory off"
            stream = partial(token_losses, model, chunk_length=chunk_length, progress=progress.update)
            with memory_off(model):
                read(off, stream)
            read(on, stream)
    found = report(readings, pairs, segment_length)
    return found | {"models": described, "tokens_per_second": speeds}, pairs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or Hub ids of Infini-attention models, or name=folder")
    add_text_arguments(parser, tokens=16384)
    parser.add_argument("--base", help="a folder, .gguf file or Hub id of a model with full attention, or name=folder")
    parser.add_argument(
        "--base-window",
        type=int,
        default=2048,
        help="its windows overlap by a half, so that each token is given at least half of one (default: %(default)s)",
    )
    parser.add_argument("--chunk-length", type=int, default=1024, help="tokens read in a call (default: %(default)s)")
    parser.add_argument("--tokenizer", help="where all models get theirs (default: from the first model)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as they are saved)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--output", help="where to write OUTPUT.json and OUTPUT.png")
    options = parser.parse_args(arguments)
    models = [name_and_source(model) for model in options.models]
    base = None if options.base is None else name_and_source(options.base)
    names = [name for name, _ in (*models, *filter(None, [base]))]
    if len(set(names)) < len(names):
        parser.error(f"the names {', '.join(names)} must differ: give name=folder")
    if options.output and importlib.util.find_spec("matplotlib") is None:
        parser.error("--output draws a plot: pip install matplotlib")
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    tokenizer = options.tokenizer or models[0][1]
    ids = first_tokens(load_tokenizer(tokenizer), read_texts(options.text), options.tokens)
    if empty := [name for name, document in ids.items() if document.shape[1] < 2]:
        parser.error(f"nothing to score: fewer than 2 tokens in {', '.join(empty)}")
    found, pairs = measure(
        dict(models),
        ids,
        base=base,
        base_window=options.base_window,
        chunk_length=options.chunk_length,
        dtype=options.dtype,
        device_map=options.device,
    )
    print(markdown(found))
    if options.output:
        settings = {
            **vars(options),
            "text": [str(file) for file in options.text or []],
            "tokenizer": tokenizer,
            "block": BLOCK,
            "tokens_by_text": {name: document.shape[1] for name, document in ids.items()},
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{options.output}.json").write_text(json.dumps({"settings": settings, **found}, indent=2) + "\n")
        plot(found, pairs, f"{options.output}.png")


if __name__ == "__main__":
    main()
