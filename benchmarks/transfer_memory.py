"""
Peak memory and time of attention transfer on a synthetic Llama of the sizes of Llama 3.2 1B, in a process of its own.

    python -m benchmarks.transfer_memory --layers 16 --tokens 16384 --steps 5
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from infini_transformers.conversion import convert_to_infini

from .conversion_memory import write_checkpoint


SIZE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
SEGMENT_LENGTH = 256

RUN = """
import json, sys, time
import torch
from benchmarks.peak_memory import peak_nbytes
from infini_transformers.conversion import transfer

torch.set_num_threads(1)
folder, texts, options = sys.argv[1:]
loaded, start = peak_nbytes(), time.process_time()
transfer(folder, [texts], **json.loads(options))
print(json.dumps({"loaded": loaded, "peak": peak_nbytes(), "seconds": time.process_time() - start}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base, ours, text = (Path(folder) / name for name in ("base", "ours", "text.txt"))
        nbytes = write_checkpoint(base, arguments.layers, **SIZE)
        convert_to_infini(base, ours, segment_length=SEGMENT_LENGTH)
        words = {f"w{index}": index for index in range(1000)}
        tokenizer = Tokenizer(WordLevel(words, "w0"))
        tokenizer.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(ours)
        text.write_text(" ".join(f"w{index}" for index in torch.randint(1000, (arguments.tokens,)).tolist()))
        options = json.dumps({"tokens": arguments.tokens, "steps": arguments.steps})
        command = [sys.executable, "-c", RUN, str(ours), str(text), options]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n")[-2]
        )
    print("| weights in bfloat16 | layers | tokens | steps | libraries alone | peak memory | seconds of one core |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {nbytes / 1e9:.2f} GB | {arguments.layers} | {arguments.tokens:,} | {arguments.steps} "
        f"| {found['loaded'] / 1e9:.2f} GB | {found['peak'] / 1e9:.2f} GB | {found['seconds']:,.0f} |"
    )


if __name__ == "__main__":
    main()
