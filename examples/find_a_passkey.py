"""
Hides a number in a million tokens, streams them through a small model in constant memory, and asks for the number.

    python examples/find_a_passkey.py                   # the checkpoint of this repository and the King James Bible
    python examples/find_a_passkey.py --depth 0.02 --filler sentence
    python examples/find_a_passkey.py --model my-model --tokens 4194304 --filler moby_dick.txt
"""

from infini_transformers import quiet  # noqa: F401


# isort: split
import argparse
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from infini_transformers.evaluation.haystacks import find_filler
from infini_transformers.evaluation.passkey import passkey_text_example
from infini_transformers.evaluation.wordings import PAPER_WORDING


CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "passkey"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT), help="a folder or a Hub id (default: checkpoints/passkey)")
    parser.add_argument("--tokens", type=int, default=1_048_576, help="of the whole text (default: %(default)s)")
    parser.add_argument("--filler", default="bible", help='"bible", "sentence" or a text file (default: %(default)s)')
    parser.add_argument("--depth", type=float, help="0: at the start, 1: at the end (default: anywhere)")
    parser.add_argument("--seed", type=int, help="of the number and its place (default: another each time)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    # As whoever finds the model on the Hub loads it: by the code that stands beside the weights.
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    print(f"A model of {model.num_parameters():,} parameters reads {options.tokens:,} tokens.", flush=True)
    generator = np.random.default_rng(options.seed)
    depth = generator.random() if options.depth is None else options.depth
    filler = find_filler(tokenizer, options.filler)
    example = passkey_text_example(tokenizer, filler, options.tokens, depth, generator)
    key, start = example.facts["answer"], int(example.answer_positions[0])
    print(f"At {depth:.1%} of them, in the {filler.name}, stands: {PAPER_WORDING.needle.format(key=key)}", flush=True)

    prompt, cache, process = example.input_ids[None, :start], model.new_cache(), psutil.Process()
    begin = time.perf_counter()
    with torch.no_grad(), tqdm(total=start, unit=" tokens", unit_scale=True, desc="Reading") as bar:
        # generate() reads the last token.
        for chunk in prompt[:, :-1].split(4096, 1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
            memory = f"memory state {cache.nbytes / 1e3:,.0f} kB, RSS {process.memory_info().rss / 1e6:,.0f} MB"
            bar.set_postfix_str(memory, refresh=False)
            bar.update(chunk.shape[1])
        bar.update(1)
    written = model.generate(
        prompt[:, -1:], past_key_values=cache, max_new_tokens=len(example.answer_positions), do_sample=False
    )
    answer = tokenizer.decode(written[0, 1:]).strip()
    print(f"\nRead in {time.perf_counter() - begin:.0f} s.\n{PAPER_WORDING.question} {answer}", end="")
    print(" - found." if answer == key else f" - wrong: it was {key}.")


if __name__ == "__main__":
    main()
