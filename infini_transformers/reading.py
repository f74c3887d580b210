"""Reads a text into a memory of constant size, and goes on with it: the command `infini read`."""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from modeling_infini import InfiniCache, InfiniForCausalLM

from .evaluation.examples import opening_ids
from .evaluation.haystacks import encode
from .evaluation.loading import load_model, load_tokenizer, segment_length_of


def read(model: InfiniForCausalLM, input_ids: torch.Tensor, cache: InfiniCache) -> None:
    """Reads `input_ids` `(1, tokens)` into a cache, in calls of a few segments, and shows how far it is."""
    process, peak = psutil.Process(), 0
    chunk_length = 4 * model.config.segment_length
    with torch.no_grad(), tqdm(total=input_ids.shape[1], unit=" tokens", unit_scale=True, desc="Reading") as bar:
        for chunk in input_ids.split(chunk_length, dim=1):
            model(chunk.to(model.device), past_key_values=cache, logits_to_keep=1)
            peak = max(peak, process.memory_info().rss)
            memory = f"memory state {cache.nbytes / 1e6:.1f} MB, peak RSS {peak / 1e6:,.0f} MB"
            bar.set_postfix_str(memory, refresh=False)
            bar.update(chunk.shape[1])


def write(
    model: InfiniForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    cache: InfiniCache,
    input_ids: torch.Tensor,
    max_new_tokens: int,
) -> None:
    """
    Prints what follows what the cache holds and `input_ids`.

    Args:
        cache: it is changed.
        input_ids: `(1, tokens)`, at least one; not yet read.
    """
    input_ids = input_ids.to(model.device)
    # More ids than a cache has read would count as the whole history.
    most, last = input_ids[:, :-1], input_ids[:, -1:]
    if most.shape[1]:
        with torch.no_grad():
            model(most, past_key_values=cache, logits_to_keep=1)
    model.generate(
        last,
        attention_mask=torch.ones_like(last),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )


def costs(model: InfiniForCausalLM, cache: InfiniCache, tokens: int) -> str:
    """A sentence: what a cache holds after `tokens` tokens, beside the keys and values of full attention."""
    config = model.config
    numbers = 2 * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return (
        f"What it remembers is {cache.nbytes / 1e6:.1f} MB; the keys and values of full attention would be "
        f"{numbers * model.dtype.itemsize / 1e6:,.1f} MB, and grow with every token."
    )


def read_and_write(options: argparse.Namespace) -> None:
    """
    The command `infini read`; `options` are those of its parser.

    Raises:
        OSError: if there is no such model, text or memory.
        ValueError: if the model has no Infini-attention, a text is none, there is nothing to read, or the memory is
            another model's.
    """
    if options.save_memory is not None and Path(options.save_memory).is_file():
        raise FileExistsError(f"{options.save_memory} is a file. A memory is saved as a folder: choose another name.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    text = "\n\n".join(map(_read_text, options.texts))
    segment_length_of(options.model)
    model: Any = load_model(options.model, dtype=options.dtype, device_map=options.device).eval()
    tokenizer = load_tokenizer(options.model)

    if options.memory is None:
        cache, opening = model.new_cache(), opening_ids(tokenizer)
    else:
        cache, opening = InfiniCache.from_pretrained(options.memory, model), torch.tensor([], dtype=torch.long)
    before = cache.get_seq_length()
    input_ids = torch.cat([opening, encode(tokenizer, text)])[None, : options.tokens]
    prompt = encode(tokenizer, options.prompt)[None]
    if not input_ids.shape[1] + prompt.shape[1]:
        raise ValueError("There is nothing to read: text and prompt have no tokens.")
    # The last token is left: to read it gives the first one to write.
    most, last = input_ids[:, :-1], input_ids[:, -1:]
    if options.save_memory is not None:
        # Where it cannot be, nothing needs to be read.
        Path(options.save_memory).mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    if most.shape[1]:
        read(model, most, cache)
    seconds = time.perf_counter() - begin
    if options.save_memory is not None:
        whole = copy.deepcopy(cache)
        if last.shape[1]:
            with torch.no_grad():
                model(last.to(model.device), past_key_values=whole)
        whole.save_pretrained(options.save_memory)
    report = []
    if options.texts:
        speed = most.shape[1] / max(seconds, 1e-9)
        report += [f"Read {input_ids.shape[1]:,} tokens in {seconds:.1f} s ({speed:,.0f} tokens/s)."]
        report += [costs(model, cache, before + input_ids.shape[1])]
    if before:
        report += [f"The memory had read {before:,} tokens before."]
    if options.save_memory is not None:
        report += [f"It is saved in {options.save_memory}."]
    print(*report, file=sys.stderr)
    if options.max_new_tokens:
        write(model, tokenizer, cache, torch.cat([last, prompt], dim=1), options.max_new_tokens)


def _read_text(name: str) -> str:
    try:
        # Not by the encoding of the terminal.
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no text file {name}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8. Convert it to a .txt file in UTF-8 first.") from error
