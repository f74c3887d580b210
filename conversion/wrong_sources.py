"""What a folder or file is that holds no checkpoint that can be read, and what to do with it."""

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from transformers.utils import ADAPTER_CONFIG_NAME


WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".msgpack", ".h5", ".npz")

ADAPTER = (
    "a PEFT adapter, not a model. Merge it into its base model first: `AutoPeftModelForCausalLM.from_pretrained(...)"
    ".merge_and_unload().save_pretrained(...)`"
)

# What is refused although weights may stand beside it: they would be read without it.
NEVER = {
    "adapter_model.*": ADAPTER,
    ADAPTER_CONFIG_NAME: ADAPTER,
    "model_index.json": "a pipeline of diffusers. Name the folder of its language model, if it has one",
}

# Where no weights are found: patterns of what was found instead.
INSTEAD = {
    "*.distcp": "a checkpoint of FSDP in shards. Merge them first: `accelerate merge-weights folder output`",
    "*/*.distcp": "a checkpoint of FSDP in shards. Merge them first: `accelerate merge-weights that-folder output`",
    "memory_config.json": "a memory without its base. Convert the base with it: `infini convert base "
    "output --memory that-folder`",
    "infini_cache.safetensors": "what a model has read. Give it to that model: `InfiniCache.from_pretrained(folder, "
    "model)`",
    "zero_to_fp32.py": "a checkpoint of DeepSpeed in shards. Merge them first: `python zero_to_fp32.py . output`",
    "global_step*": "a checkpoint of DeepSpeed in shards. Merge them first, by its zero_to_fp32.py",
    "consolidated*": "weights in the format of their makers (Meta, Mistral). Download those in that of transformers",
    "*.onnx": "a model exported to ONNX. Convert the model that it was exported from",
    "onnx/*.onnx": "a model exported to ONNX. Convert the model that it was exported from",
    "openvino_model.*": "a model exported to OpenVINO. Convert the model that it was exported from",
    "tf_model.h5": "TensorFlow weights. Save them with PyTorch first",
    "flax_model*.msgpack": "Flax weights. Save them with PyTorch first",
    "*.npz": "weights of MLX. Save them for transformers first",
    "*.mlpackage": "a model exported to Core ML. Convert the model that it was exported from",
    "*.gguf": "GGUF files. Name the .gguf file to convert (download it first if it is on the Hub)",
    "model.*.safetensors": "weights of a variant. Rename model.<variant>.safetensors to model.safetensors in a copy",
    "*-*-of-*.*": "shards without the index that names them. Download it as well",
    "checkpoint-*": "checkpoints of a training. Name one of the folders checkpoint-*",
    "snapshots/*": "a cache of the Hub. Name the folder in its snapshots/, or the model's id",
    "*/config.json": "a folder with a checkpoint. Name that folder",
    "tokenizer*": "a tokenizer without a model",
}

# Parts of the names of weights that no model has by itself.
WEIGHTS = {
    r"lora_|modules_to_save|base_layer": ADAPTER,
    r"\.(qweight|qzeros|scales|absmax|SCB|weight_scale|weight_packed|weight_scale_inv|quant_state\..*)$": (
        "quantized weights. Save a dequantized copy first"
    ),
    r"^(_orig_mod|module)\.": "weights of a wrapped model (compiled, or DDP). Save those of the model inside it",
    r"^(v_head|score|classifier|value_head|qa_outputs)\.": (
        "a head of another task. Take the language model that it was trained on"
    ),
}


def require_no_adapter(names: Iterable[str], source: str) -> None:
    """Raises ValueError if there are files that would be lost if the weights beside them were read alone."""
    for pattern, what in NEVER.items():
        if _matching(names, pattern):
            raise ValueError(f"{source} holds {what}.")


def what_it_holds(names: Collection[str]) -> str:
    """The end of a message about files without configuration or weights: what they are instead, and what to do."""
    for pattern, what in INSTEAD.items():
        if found := _matching(names, pattern):
            return f" There is {found[0]}: it holds {what}."
    return "" if names else " It is empty."


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    """The files and folders, at the pattern's own depth, that match it."""
    depth = pattern.count("/") + 1
    found = {"/".join(parts[:depth]) for name in names if len(parts := PurePosixPath(name).parts) >= depth}
    return sorted(name for name in found if fnmatch(name, pattern))


def what_file_it_is(path: Path) -> str:
    """A message about a file that is no GGUF file."""
    if path.suffix in WEIGHT_FILES:
        return f"{path} is a file of weights. Name the folder that holds it together with its config.json."
    return f"{path} is a file, but no .gguf file. Name a folder with a checkpoint, a .gguf file or an id of the Hub."


def what_weights_they_are(names: Iterable[str]) -> str:
    """The end of a message about weights without a place in a model: what they are, if their names tell."""
    for pattern, what in WEIGHTS.items():
        if any(re.search(pattern, name) for name in names):
            return f" It holds {what}."
    return ""
