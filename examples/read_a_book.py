"""
Converts a pretrained Llama to Infini-attention, streams a book through it in constant memory, saves what it remembers
to a file, and continues the book from that file in a new process.

    python examples/read_a_book.py                      # SmolLM2-135M-Instruct and the King James Bible
    python examples/read_a_book.py --tokens 1000000     # as far as you like, in the same memory
    python examples/read_a_book.py --text my-book.txt --model path/to/any/llama
"""

from infini_transformers import quiet  # noqa: F401


# isort: split
import argparse
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from infini_transformers.conversion import convert_to_infini
from infini_transformers.evaluation.resources import king_james_bible, smollm2_file
from infini_transformers.reading import costs, read


# Of the text; the new process is given these as words.
TOKENS_OF_PROMPT = 16


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Llama: a folder, a .gguf file or a Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, help="a text file (default: the King James Bible)")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens to read (default: %(default)s)")
    parser.add_argument("--segment-length", type=int, default=512, help="tokens per segment (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=60, help="tokens to write (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    if options.tokens <= TOKENS_OF_PROMPT:
        parser.error(f"--tokens must be more than {TOKENS_OF_PROMPT}: the last ones are kept for the new process")
    return options


def main() -> None:
    options = parse_arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model_folder, made_from = options.output / "model", options.output / "made_from"
    memory_folder = options.output / "memory"
    source = options.model or smollm2_file()
    settings = f"{source} with segments of {options.segment_length} tokens"
    if model_folder.exists() and made_from.read_text() != settings:
        sys.exit(f"{model_folder} was made from {made_from.read_text()}. Remove it, or choose another --output.")
    if not model_folder.exists():
        print(f"Converting {Path(source).name} to Infini-attention, in {model_folder} ...", flush=True)
        convert_to_infini(source, model_folder, segment_length=options.segment_length)
        made_from.write_text(settings)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    text = king_james_bible() if options.text is None else options.text.read_text(encoding="utf-8")
    # Longer than the tokens are, and much shorter than a book.
    text = text.strip()[: 16 * options.tokens]
    input_ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens]
    tokens = input_ids.shape[1]
    print(
        f"Reading {tokens:,} tokens of {options.text or 'the King James Bible'}, in segments "
        f"of {options.segment_length}. The base model stops at {model.config.max_position_embeddings:,}.",
        flush=True,
    )
    cache = model.new_cache()
    read(model, input_ids[:, :-TOKENS_OF_PROMPT], cache)
    cache.save_pretrained(memory_folder)
    print(f"{costs(model, cache, tokens)} It is saved in {memory_folder}.")

    prompt = tokenizer.decode(input_ids[0, -TOKENS_OF_PROMPT:])
    command = [sys.executable, "-m", "infini_transformers", "read", str(model_folder), "--memory", str(memory_folder)]
    command += ["--prompt", prompt, "--max-new-tokens", str(options.new_tokens)]
    print(f"\nA new process loads that memory. It is given {prompt!r}, and goes on:\n", flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
