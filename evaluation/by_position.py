"""
How well long documents are read, by position: perplexity of the tokens of the first segment, of the second, of the
next two, the next four, ... with the memory on, off (the gates forced to local attention, no slots, nothing
retrained), with the memory of another text in its place, and with full attention over windows.

    infini evaluate by_position converted tuned/merged --text moby_dick.txt --foreign emma.txt --tokens 65536 \
        --output docs/by_position

prints a Markdown table, and writes docs/by_position.json and docs/by_position.png.

- on - off below 0: the memory helps.
- foreign - off: what the memory of no matter which text does. Only what own memory does beyond that is of this text.
- bound - off: what there is to win, by full attention of the base over the last 1,024 to 2,048 tokens; and how much of
  it the memory wins, (on - off) / (bound - off).
- longer window - off (`--longer-window`): what the bytes of the memory would win as a longer window.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from infini_transformers.conversion.gguf_files import is_gguf
from infini_transformers.conversion.shared_base import base_of

from .examples import opening_ids
from .loading import (
    add_text_arguments,
    config_of,
    first_tokens,
    load_model,
    load_tokenizer,
    read_texts,
    segment_length_of,
)
from .losses import foreign_losses, longer_window, memory_off, require_window, window_losses, window_of_state
from .retrieval import MEMORY_OFF, weights_digest


# Losses of neighbouring tokens are correlated; means of so many tokens are taken to be independent.
BLOCK = 256
BASE_WINDOW = 2048

# The fields that say what a memory is.
DESCRIBED = (
    "segment_length",
    "local_attention",
    "num_sink_tokens",
    "memory_layers",
    "use_mem_delta_rule",
    "memory_feature_map",
    "token_gates",
    "num_memory_slots",
    "slot_layers",
)

# From the first token to that after the last, both counted from 0.
Bucket = tuple[int, int]
# By document `(tokens - 1,)`; entry i is the loss of token i + 1.
Losses = Mapping[str, torch.Tensor]
# Of a model: what it was read by, as columns name it, for "on", "off", "foreign", "bound", and for parts that are off.
Conditions = dict[str, str]


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


def by_bucket(losses: Sequence[torch.Tensor], buckets: Sequence[Bucket]) -> list[Mean]:
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


def report(readings: Mapping[str, Losses], models: Mapping[str, Conditions], segment_length: int) -> dict[str, Any]:
    """
    The numbers of the table and the plot.

    Args:
        readings: losses of the same documents by condition.
        models: the conditions of each model; "off" is compared with all others that it has.
        segment_length: where the first bucket ends.

    Returns:
        `buckets`; `beyond_first_segment` of the same form, `None` if there is nothing; and the same `by_text`, where
        there are several.
    """
    documents = next(iter(readings.values()))
    tokens = 1 + max(map(len, documents.values()))
    buckets = doubling_buckets(tokens, segment_length)
    rows = _rows(readings, models, list(documents), buckets)
    beyond, by_text = None, {}
    if len(buckets) > 1:
        rest = [(buckets[1][0], tokens)]
        (beyond,) = _rows(readings, models, list(documents), rest)
        longer = [name for name, losses in documents.items() if len(losses) >= buckets[1][0]]
        if len(documents) > 1:
            by_text = {name: _rows(readings, models, [name], rest)[0] for name in longer}
    return {"buckets": rows, "beyond_first_segment": beyond, "by_text": by_text}


def _rows(
    readings: Mapping[str, Losses], models: Mapping[str, Conditions], names: Sequence[str], buckets: Sequence[Bucket]
) -> list[dict[str, Any]]:
    """Of the documents `names`, for each bucket."""
    rows: list[dict[str, Any]] = [
        {"start": start, "end": end, "conditions": {}, "minus_off": {}, "won": {}} for start, end in buckets
    ]
    for condition in dict.fromkeys(condition for conditions in models.values() for condition in conditions.values()):
        for row, mean in zip(rows, by_bucket([readings[condition][name] for name in names], buckets)):
            row["tokens"] = mean.tokens
            row["conditions"][condition] = {
                "nll": mean.mean,
                "perplexity": math.exp(mean.mean),
                "standard_error": mean.standard_error,
            }
    for model, conditions in models.items():
        off = readings[conditions["off"]]
        for row in rows:
            row["minus_off"][model] = {}
        for role, condition in conditions.items():
            if role == "off":
                continue
            differences = [readings[condition][name] - off[name] for name in names]
            for row, mean in zip(rows, by_bucket(differences, buckets)):
                row["minus_off"][model][role] = {"nll": mean.mean, "standard_error": mean.standard_error}
        for row in rows:
            row["won"][model] = _won(**row["minus_off"][model])
    return rows


def _won(on: dict[str, Any], bound: dict[str, Any] | None = None, **others: Any) -> float | None:
    """Of what the bound wins, the share that the memory wins; `None` where the bound does not win for sure."""
    if bound is None or bound["standard_error"] is None or bound["nll"] >= -2 * bound["standard_error"]:
        return None
    return on["nll"] / bound["nll"]


def markdown(found: dict[str, Any]) -> str:
    """The table of a [`report`]: perplexity and (mean NLL), and differences in nats ± standard error."""
    rows = {f"{row['start']:,} to {row['end'] - 1:,}": row for row in found["buckets"]}
    if (beyond := found["beyond_first_segment"]) is not None:
        rows[f"all from {beyond['start']:,}"] = beyond
    rows |= {f"{name} from {row['start']:,}": row for name, row in found["by_text"].items()}
    differences = found["buckets"][0]["minus_off"]
    heads = ["position", "tokens", *found["buckets"][0]["conditions"]]
    for model, roles in differences.items():
        heads += [f"{model}: {role} - off, nats" for role in roles]
        heads += [f"{model}: (on - off) / (bound - off)"] * ("bound" in roles)
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name, row in rows.items():
        cells = [name, f"{row['tokens']:,}"]
        cells += [f"{mean['perplexity']:.2f} ({mean['nll']:.4f})" for mean in row["conditions"].values()]
        for model, roles in row["minus_off"].items():
            for difference in roles.values():
                error = difference["standard_error"]
                cells.append(f"{difference['nll']:+.4f}" + (f" ± {error:.4f}" if error is not None else ""))
            if "bound" in roles:
                won = row["won"][model]
                cells.append("" if won is None else f"{won:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, Any], models: Mapping[str, Conditions], file: str | Path) -> None:
    """Draws a [`report`]: perplexity by position, and what each condition adds to the NLL. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    buckets = found["buckets"]
    places = [math.sqrt(bucket["start"] * (bucket["end"] - 1)) for bucket in buckets]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    perplexities, differences = figure.subplots(1, 2)
    styles = {"on": "-", "off": "--", "foreign": ":", "bound": "-.", "longer window": (0, (5, 1, 1, 1, 1, 1))}
    drawn = set()
    for index, (model, conditions) in enumerate(models.items()):
        for role, condition in conditions.items():
            style = {"color": f"C{index}", "linestyle": styles.get(role, (0, (1, 4))), "marker": "o"}
            # Models of the same weights have one bound.
            if condition not in drawn:
                drawn.add(condition)
                means = [bucket["conditions"][condition]["perplexity"] for bucket in buckets]
                perplexities.plot(places, means, label=condition, **style)
            if role != "off":
                means = [bucket["minus_off"][model][role] for bucket in buckets]
                differences.errorbar(
                    places,
                    [mean["nll"] for mean in means],
                    yerr=[mean["standard_error"] or 0.0 for mean in means],
                    capsize=3,
                    label=f"{model}: {role}",
                    **style,
                )
    perplexities.set(ylabel="perplexity", title="Perplexity by position in the document")
    differences.axhline(0, color="grey", linewidth=0.8)
    differences.set(ylabel="NLL - NLL(memory off), nats", title="Beside the memory off (below 0: better)")
    for axes in (perplexities, differences):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("position (tokens; buckets at their geometric middle)")
        axes.grid(alpha=0.3)
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
    described = {"source": source, "dtype": str(model.dtype).removeprefix("torch.")}
    described |= {name: getattr(model.config, name) for name in DESCRIBED if hasattr(model.config, name)}
    if layers := getattr(model.config, "layers_with_memory", None):
        described["mean_local_share"] = model.local_shares()[layers].mean().item()  # type: ignore[operator]
    return described


def read_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], tokens: int, foreign: Path | None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    The first tokens of texts, and whose memory is the foreign one of each: that of the next text, or that of
    `foreign`. A single text without it is given the memory of what follows in it: as it is about the same things, the
    help of the own memory beyond that is a lower bound of what is text-specific.

    Returns:
        Ids `(1, tokens)` by name, and by the name of each text the name of the other.

    Raises:
        ValueError: if there is no other text, or too little of it.
    """
    documents = first_tokens(tokenizer, dict(texts), tokens)
    names = list(documents)
    if foreign is not None:
        ((other, text),) = read_texts([foreign]).items()
        if other in documents:
            raise ValueError(f"--foreign must be another text than {other}, or go by another name.")
        sources = [other] * len(names)
        documents |= first_tokens(tokenizer, {other: text}, tokens)
    elif len(names) == 1:
        other = f"{names[0]} from token {tokens:,} on"
        sources = [other]
        later = first_tokens(tokenizer, dict(texts), 2 * tokens)[names[0]][:, tokens:]
        if later.shape[1] < tokens:
            raise ValueError(
                f"{names[0]} has no {tokens:,} tokens beyond the first {tokens:,}, of which a memory could be put in "
                "the place of its own. Take fewer --tokens, or name another text by --foreign or by a second --text."
            )
        documents[other] = torch.cat([opening_ids(tokenizer).unsqueeze(0), later], 1)[:, :tokens]
    else:
        sources = names[1:] + names[:1]
    if empty := [name for name, document in documents.items() if document.shape[1] < 2]:
        raise ValueError(f"nothing to score: fewer than 2 tokens in {', '.join(empty)}")
    return documents, dict(zip(names, sources))


def measure(
    models: Mapping[str, str],
    documents: Mapping[str, torch.Tensor],
    memory_of: Mapping[str, str],
    *,
    base: str | None = None,
    base_window: int | None = None,
    chunk_length: int = 1024,
    parts: bool = False,
    with_longer_window: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Conditions]]:
    """
    Reads documents with each model, with the memory on, off and another's, and with full attention; one model is in
    memory at a time, and the base that shares its weights.

    Args:
        models: sources of Infini-attention models by name.
        documents: ids `(1, tokens)` by name.
        memory_of: as of [`foreign_losses`]; its keys are the documents that are scored.
        base: source of the model with full attention; by default, of each model that was converted, its own weights
            with the attention of its base.
        base_window: number of tokens of its windows; by default 2,048, or as many as it has positions for.
        chunk_length: number of tokens in a call of the others, at most.
        parts: also read models that have slots with the matrix off, and with the slots off.
        with_longer_window: also read each model as [`longer_window`] has it.
        options: of `from_pretrained`.

    Returns:
        The [`report`], with the models and the tokens read per second; and the conditions of each model.

    Raises:
        ValueError: if a model is no Infini-attention model, a document whose memory is taken has not a segment, or the
            base cannot read such windows, or a longer window of the same state.
    """
    scored = {name: documents[name] for name in memory_of}
    total = sum(document.shape[1] - 1 for document in scored.values())
    with_others = total + sum(document.shape[1] - 1 for document in documents.values())
    # Before hours of reading, since it fails where a model has no memory.
    lengths = [segment_length_of(source) for source in models.values()]
    for name in set(memory_of.values()):
        if documents[name].shape[1] <= max(lengths):
            raise ValueError(
                f"{name} has {documents[name].shape[1]:,} tokens, not a segment of {max(lengths):,}: it leaves no "
                "memory to put in another's place. Name a longer text by --foreign."
            )
    dtype = options.get("dtype", "auto") if with_longer_window else None
    _require_windows(list(models.values()), base, base_window, dtype)
    readings: dict[str, Losses] = {}
    found: dict[str, Conditions] = {}
    described: dict[str, Any] = {}
    speeds: dict[str, float] = {}
    bounds: dict[tuple[str, int], str] = {}
    with tqdm(unit="token", unit_scale=True, file=sys.stderr) as progress:

        def read(condition: str, tokens: int, losses_of: Callable[..., Any], *arguments: Any) -> Any:
            progress.set_description(condition)
            progress.reset(tokens)
            start = time.perf_counter()
            losses = losses_of(*arguments)
            speeds[condition] = tokens / (time.perf_counter() - start)
            return losses

        def read_bound(name: str, model: PreTrainedModel) -> str:
            window = base_window or min(BASE_WINDOW, model.config.max_position_embeddings)
            # Conversions of one model have one bound.
            key = weights_digest(model), window
            if key not in bounds:
                condition = bounds[key] = f"{name}: full attention, windows of {window:,}"
                losses_of = partial(_losses_of_each, window_losses, model, window=window, progress=progress.update)
                readings[condition] = read(condition, total, losses_of, scored)
            return bounds[key]

        bound_of_all = None
        if base is not None:
            name, source = name_and_source(base)
            model = load_model(source, **options)
            described[name] = describe(model, source)
            bound_of_all = read_bound(name, model)
        for name, source in models.items():
            model = load_model(source, **options)
            described[name] = describe(model, source)
            stream = partial(foreign_losses, model, chunk_length=chunk_length, progress=progress.update)
            on, foreign = f"{name}: memory on", f"{name}: foreign memory"
            own, readings[foreign] = read(f"{on}, {foreign}", with_others, stream, documents, memory_of)
            readings[on] = {text: own[text] for text in scored}
            found[name] = {"on": on, "off": f"{name}: memory off", "foreign": foreign}
            has_parts = parts and model.config.num_memory_slots > 0
            for part in MEMORY_OFF if has_parts else ("all",):
                role = "off" if part == "all" else f"{part} off"
                condition = found[name].setdefault(role, f"{name}: {role}")
                with memory_off(model, **MEMORY_OFF[part]):
                    readings[condition], _ = read(condition, total, stream, scored, {})
            if with_longer_window:
                with longer_window(model) as length:
                    condition = found[name]["longer window"] = f"{name}: memory off, window of {length:,}"
                    readings[condition], _ = read(condition, total, stream, scored, {})
            if bound_of_all is not None:
                found[name]["bound"] = bound_of_all
            elif "model_type" in (model.config.converted_from or {}):
                found[name]["bound"] = read_bound(name, base_of(model))  # type: ignore[arg-type]
    return report(readings, found, min(lengths)) | {"models": described, "tokens_per_second": speeds}, found


def _require_windows(models: Sequence[str], base: str | None, base_window: int | None, dtype: Any) -> None:
    """
    Raises ValueError for windows that a model has no positions for.

    Args:
        dtype: in which the bytes of a longer window are counted; `None`: there is none.
    """
    configs = [config_of(source) for source in models]
    converted = [config for config in configs if "model_type" in (config.converted_from or {})]
    for config in converted if base is None else [config_of(name_and_source(base)[1])]:
        if base_window is not None:
            require_window(config, base_window)
    for config in configs if dtype is not None else ():
        window_of_state(config, config.dtype if dtype == "auto" else dtype)


def _losses_of_each(losses_of: Callable, model: PreTrainedModel, documents: Losses, **options: Any) -> Losses:
    return {name: losses_of(model, document, **options) for name, document in documents.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or Hub ids of Infini-attention models, or name=folder")
    add_text_arguments(parser, tokens=16384)
    parser.add_argument(
        "--foreign",
        type=Path,
        help="a text file whose memory is put in the place of each text's own (default: that of the next text; of a "
        "single one, that of its own tokens after those that are read)",
    )
    parser.add_argument(
        "--base",
        help="a folder, .gguf file or Hub id of a model with full attention, or name=folder (default: each converted "
        "model's own weights with full attention)",
    )
    parser.add_argument(
        "--base-window",
        type=int,
        help="its windows overlap by a half, so that each token is given at least half of one (default: "
        f"{BASE_WINDOW}, or as many as it has positions for)",
    )
    parser.add_argument(
        "--parts", action="store_true", help="also read models that have slots with the slots, or the matrix, off"
    )
    parser.add_argument(
        "--longer-window",
        action="store_true",
        help="also read each model with the memory off and a longer window: what the memory's bytes would win as keys "
        "and values of more tokens",
    )
    parser.add_argument(
        "--chunk-length", type=int, default=1024, help="tokens read in a call, at most (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", help="where all models get theirs (default: from the first model)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as they are saved)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--output", help="where to write OUTPUT.json and OUTPUT.png")
    options = parser.parse_args(arguments)
    models = [name_and_source(model) for model in options.models]
    names = [name for name, _ in (*models, *([] if options.base is None else [name_and_source(options.base)]))]
    if len(set(names)) < len(names):
        parser.error(f"the names {', '.join(names)} must differ: give name=folder")
    if options.output and importlib.util.find_spec("matplotlib") is None:
        parser.error("--output draws a plot: pip install matplotlib")
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    tokenizer = options.tokenizer or models[0][1]
    texts = read_texts(options.text)
    try:
        documents, memory_of = read_documents(load_tokenizer(tokenizer), texts, options.tokens, options.foreign)
    except ValueError as error:
        parser.error(str(error))
    found, conditions = measure(
        dict(models),
        documents,
        memory_of,
        base=options.base,
        base_window=options.base_window,
        chunk_length=options.chunk_length,
        parts=options.parts,
        with_longer_window=options.longer_window,
        dtype=options.dtype,
        device_map=options.device,
    )
    print(markdown(found))
    notes = []
    for name, other in memory_of.items():
        is_shorter = documents[other].shape[1] < documents[name].shape[1]
        end = f" (its last from token {documents[other].shape[1]:,} on)" if is_shorter else ""
        notes.append(f"{name} with that of {other}{end}")
    print(f"\nForeign memory: {'; '.join(notes)}.")
    if options.output:
        settings = {
            **vars(options),
            "text": [str(file) for file in options.text or []],
            "foreign": memory_of,
            "tokenizer": tokenizer,
            "block": BLOCK,
            "tokens_by_text": {name: document.shape[1] for name, document in documents.items()},
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{options.output}.json").write_text(json.dumps({"settings": settings, **found}, indent=2) + "\n")
        plot(found, conditions, f"{options.output}.png")


if __name__ == "__main__":
    main()
