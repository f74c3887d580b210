"""
Peak memory of a conversion while it goes over the weights, and how long it takes: a synthetic Llama in many shards,
converted in a process of its own, there and back, and with a change of dtype.

    python -m benchmarks.conversion_memory --gigabytes 1 4 --max-shard-size 200MB
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


# 67 MB per layer in bfloat16, besides 4 MB of embeddings.
SIZE = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 9600,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
LAYER_NBYTES = 2 * (3 * 1024 * 9600 + 3 * 1024 * 1024 + 2 * 1024)

RUN = """
import json, logging, sys, time
from pathlib import Path
from transformers.utils.logging import disable_progress_bar
from infini_transformers.conversion import convert_from_infini, convert_to_infini

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

logging.disable(logging.WARNING)
disable_progress_bar()
convert, tiny, large, options = sys.argv[1:]
convert = {"to": convert_to_infini, "from": convert_from_infini}[convert]
# Whatever is loaded once, whatever the size, is loaded now.
convert(tiny, tiny + "-converted", **json.loads(options))
before, start = peak(), time.perf_counter()
convert(large, large + "-converted", **json.loads(options))
print(json.dumps({"nbytes": peak() - before, "seconds": time.perf_counter() - start}))
"""


def write_checkpoint(folder: Path, num_hidden_layers: int, **size) -> int:
    """Writes a Llama in bfloat16, a layer per shard, holding one layer in memory; returns the bytes of the weights."""
    config = LlamaConfig(**SIZE | size, num_hidden_layers=num_hidden_layers, dtype="bfloat16")
    config.architectures = [LlamaForCausalLM.__name__]
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{layer}.safetensors", []).append(name)
    folder.mkdir()
    config.save_pretrained(folder)
    for file, names in shards.items():
        weights = {name: torch.randn(shapes[name].shape).bfloat16() for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(shape.nbytes for shape in shapes.values())


def measure(convert: str, tiny: Path, large: Path, **options) -> dict[str, float]:
    """
    Peak bytes that converting `large` takes beyond what converting `tiny` took, and seconds.

    Args:
        convert: `"to"` Infini-attention or `"from"` it.
    """
    command = [sys.executable, "-c", RUN, convert, str(tiny), str(large), json.dumps(options)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4], help="sizes of the checkpoint")
    parser.add_argument("--max-shard-size", default="200MB", help="of the output's files")
    arguments = parser.parse_args()
    shard = {"max_shard_size": arguments.max_shard_size}
    print(f"| weights in bfloat16 | conversion | peak memory, shards of {arguments.max_shard_size} | time |")
    print("|---|---|---|---|")
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            tiny, large = Path(folder) / "tiny", Path(folder) / "large"
            write_checkpoint(tiny, 1, hidden_size=64, intermediate_size=64)
            nbytes = write_checkpoint(large, round(gigabytes * 1e9 / LAYER_NBYTES))
            infini = {"segment_length": 512}
            runs = {
                "to Infini-attention": ("to", "", infini),
                "from Infini-attention": ("from", "-converted", {}),
                "back, as float32": ("from", "-converted", {"dtype": "float32"}),
            }
            for name, (convert, suffix, options) in runs.items():
                sources = [Path(f"{source}{suffix}") for source in (tiny, large)]
                found = measure(convert, *sources, **shard, **options)
                for source in sources:
                    if suffix:
                        shutil.rmtree(f"{source}-converted")
                print(
                    f"| {nbytes / 1e9:.2f} GB | {name} | {found['nbytes'] / 1e6:,.0f} MB | {found['seconds']:.1f} s |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
