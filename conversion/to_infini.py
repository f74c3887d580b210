"""Retrofits a pretrained Llama with a compressive memory and head gates."""

import os
import shutil
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils import logging

from modeling_infini import InfiniConfig, InfiniForCausalLM


logger = logging.get_logger(__name__)

SUPPORTED_MODEL_TYPES = ("llama",)

# What belongs to the source's files and not to its architecture.
SOURCE_ONLY_FIELDS = (
    "architectures",
    "auto_map",
    "model_type",
    "quantization_config",
    "transformers_version",
)


def convert_to_infini(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    segment_length: int,
    local_attention: Literal["segment", "sliding"] = "sliding",
    num_sink_tokens: int | None = None,
    head_gate_init_value: float = 4.0,
    use_mem_delta_rule: bool = False,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
) -> Path:
    """
    Converts a Llama checkpoint to an Infini-attention one. Up to `segment_length` tokens, the converted model's logits
    equal the source's; beyond, it reads on with local attention and a memory, whose use is learned in fine-tuning.

    Args:
        source: a folder with a checkpoint, a `.gguf` file, or the id of a model on the Hub.
        output: the folder to make. It must not exist, or be empty; it appears only when it is complete.
        segment_length: tokens per segment, N.
        local_attention: `"sliding"` sees the last N tokens and the sinks; `"segment"` those of the token's own
            segment, which costs an untrained model more.
        num_sink_tokens: attention sinks of `"sliding"`; by default 4 there, and 0 in `"segment"`.
        head_gate_init_value: logit of the gates, whose sigmoid is the share of local attention. By default 4.0, 98 %
            local: the memory is not trained yet. Fine-tuning may want 0.0, since gates that start closed stay closed.
        use_mem_delta_rule: write the memory with the delta rule.
        dtype: of the saved weights; `"auto"` keeps the source's.
        revision: of a model on the Hub.

    Returns:
        The output folder: weights, configuration, generation configuration and tokenizer.

    Raises:
        FileExistsError: if `output` holds something.
        ValueError: if the source is no Llama, or the window does not fit into its trained positions.
    """
    output = Path(output).absolute()
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f'dtype="{dtype}" is no dtype of torch; take "auto", "float32", "bfloat16" or "float16".')
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already. Choose another output folder, or remove this one first.")
    location, options = _locate(source, revision)
    source_config = AutoConfig.from_pretrained(location, **options)
    if num_sink_tokens is None:
        num_sink_tokens = 4 if local_attention == "sliding" else 0
    config = _infini_config(
        source_config,
        segment_length=segment_length,
        local_attention=local_attention,
        num_sink_tokens=num_sink_tokens,
        head_gate_init_value=head_gate_init_value,
        use_mem_delta_rule=use_mem_delta_rule,
    )

    base: PreTrainedModel
    report: dict[str, set]
    base, report = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, output_loading_info=True, **options)
    if report["missing_keys"] or report["mismatched_keys"]:
        names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise ValueError(
            f"The checkpoint is incomplete: {len(names)} weights are missing or of another shape, such as {names[0]}. "
            "It must be that of a whole causal language model."
        )
    model = _load_weights(base, config)
    tokenizer = _load_tokenizer(location, options)

    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.unfinished")
    try:
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        unfinished.replace(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


def _locate(source: str | os.PathLike, revision: str | None) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for `source`."""
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"There is no GGUF file {path}.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"The folder {path} holds no checkpoint: there is no config.json, and {len(files)} GGUF files. Name "
                "the .gguf file to convert."
            )
        return str(path), {"gguf_file": files[0].name}
    return str(source), {} if revision is None else {"revision": revision}


def _infini_config(source: PreTrainedConfig, **fields) -> InfiniConfig:
    if source.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f'Cannot convert a model of type "{source.model_type}"; supported: {", ".join(SUPPORTED_MODEL_TYPES)}.'
        )
    architecture = {
        name: value
        for name, value in source.to_dict().items()
        if name not in SOURCE_ONLY_FIELDS and not name.startswith("_")
    }
    config = InfiniConfig(**architecture, **fields)
    if config.longest_distance > source.max_position_embeddings:
        reach = "2 * segment_length + num_sink_tokens" if config.is_sliding else "segment_length"
        raise ValueError(
            f'With local_attention="{config.local_attention}", {reach} = {config.longest_distance} must not exceed '
            f"the {source.max_position_embeddings} positions that the source was trained on. Choose a smaller "
            f"segment_length than {config.segment_length}."
        )
    return config


def _load_weights(source: PreTrainedModel, config: InfiniConfig) -> InfiniForCausalLM:
    config.dtype = source.dtype
    model = InfiniForCausalLM._from_config(config, dtype=source.dtype)
    result = model.load_state_dict(source.state_dict(), strict=False)
    unexpected = [name for name in result.missing_keys if not name.endswith("head_gates.weight")]
    unexpected += result.unexpected_keys
    if unexpected:
        raise ValueError(f"The source's weights are not those of a Llama: {', '.join(sorted(unexpected)[:5])} ...")
    for layer in model.model.layers:
        # Gates stay in float32 whatever the dtype; made in bfloat16, they would have been rounded.
        gates = layer.self_attn.head_gates.float()
        torch.nn.init.constant_(gates.weight, config.head_gate_init_value / config.head_gate_scale)
    model.generation_config = source.generation_config
    return model


def _load_tokenizer(location: str, options: dict[str, str]) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
    except (OSError, ValueError) as error:
        logger.warning("The source has no tokenizer that loads; the output has none (%s).", error)
        return None
    # The source's limit is no longer one.
    tokenizer.model_max_length = VERY_LARGE_INTEGER
    return tokenizer
