"""
Converts a pretrained Llama to Infini-attention, streams a book through it in constant memory, saves what it remembers
to a file, and continues the book from that file in a new process.

    python examples/read_a_book.py                      # SmolLM2-135M-Instruct and the King James Bible
    python examples/read_a_book.py --tokens 1000000     # as far as you like, in the same memory
    python examples/read_a_book.py --text my-book.txt --model path/to/any/llama
"""

import argparse
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

from infini_transformers.conversion import convert_to_infini
from infini_transformers.evaluation.resources import king_james_bible, smollm2_file
from modeling_infini import InfiniCache


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Llama: a folder, a .gguf file or a Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, help="a text file (default: the King James Bible)")
    parser.add_argument("--tokens", type=int, default=40_960, help="tokens to read (default: %(default)s)")
    parser.add_argument("--segment-length", type=int, default=512, help="tokens per segment (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=60, help="tokens to write (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)")
    parser.add_argument("--continue-only", action="store_true", help="continue the text from the saved memory")
    return parser.parse_args()


def read(model, input_ids: torch.Tensor) -> InfiniCache:
    """Reads `input_ids` `(1, tokens)` into a new cache, in calls of a few segments."""
    cache = InfiniCache(model.config)
    process = psutil.Process()
    peak = 0
    chunk_length = 4 * model.config.segment_length
    with torch.no_grad(), tqdm(total=input_ids.shape[1], unit=" tokens", unit_scale=True, desc="Reading") as bar:
        for chunk in input_ids.split(chunk_length, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
            peak = max(peak, process.memory_info().rss)
            bar.set_postfix_str(
                f"memory state {cache.nbytes / 1e6:.1f} MB, peak RSS {peak / 1e6:.0f} MB", refresh=False
            )
            bar.update(chunk.shape[1])
    return cache


def continue_text(folder: Path, new_tokens: int) -> None:
    """Continues the text from the saved memory; nothing else of the text is given to the model."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    cache = InfiniCache.from_pretrained(folder / "memory", model)
    # The last token of the text has not been read yet: reading it gives the first one to write.
    last_token = torch.tensor([[int((folder / "last_token").read_text())]])
    model.generate(
        last_token,
        attention_mask=torch.ones_like(last_token),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.1,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )


def main() -> None:
    arguments = parse_arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = arguments.output
    if arguments.continue_only:
        continue_text(folder, arguments.new_tokens)
        return

    if arguments.tokens < 2:
        sys.exit("Reading takes at least 2 --tokens: the last one is kept for the new process.")
    model_folder, made_from = folder / "model", folder / "made_from"
    source = arguments.model or smollm2_file()
    settings = f"{source} with segments of {arguments.segment_length} tokens"
    if model_folder.exists() and made_from.read_text() != settings:
        sys.exit(f"{model_folder} was made from {made_from.read_text()}. Remove it, or choose another --output.")
    if not model_folder.exists():
        print(f"Converting {source} ...", flush=True)
        convert_to_infini(source, model_folder, segment_length=arguments.segment_length)
        made_from.write_text(settings)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    text = king_james_bible() if arguments.text is None else arguments.text.read_text(encoding="utf-8")
    input_ids = tokenizer(text.strip(), return_tensors="pt").input_ids[:, : arguments.tokens]
    cache = read(model, input_ids[:, :-1])
    cache.save_pretrained(folder / "memory")
    (folder / "last_token").write_text(str(int(input_ids[0, -1])))

    config, tokens = model.config, input_ids.shape[1]
    numbers = 2 * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    full_attention = numbers * model.dtype.itemsize
    print(
        f"\nRead {tokens:,} tokens in segments of {config.segment_length}; the base model stops at "
        f"{config.max_position_embeddings:,}."
    )
    print(
        f"What it remembers is {cache.nbytes / 1e6:.1f} MB, saved in {folder / 'memory'}; the keys and values of full "
        f"attention would be {full_attention / 1e6:,.0f} MB, and grow with every token."
    )
    print(f"\nThe text stops at:\n  ... {tokenizer.decode(input_ids[0, -40:])!r}")
    print("\nA new process loads the memory from its file, is given that last token, and continues:\n", flush=True)
    command = [sys.executable, __file__, "--continue-only", "--output", str(folder)]
    subprocess.run([*command, "--new-tokens", str(arguments.new_tokens)], check=True)


if __name__ == "__main__":
    main()
