"""The model card: what a model of the Hub is, how to use it, and where its limits are."""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from modeling_infini import InfiniConfig, InfiniPreTrainedModel, state_nbytes


PAPER = "https://arxiv.org/abs/2404.07143"

# What transformers writes where a repository has no card yet.
TRANSFORMERS_CARD = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."

PIPELINE_TAGS = {
    "InfiniForCausalLM": "text-generation",
    "InfiniForQuestionAnswering": "question-answering",
    "InfiniForSequenceClassification": "text-classification",
    "InfiniForTokenClassification": "token-classification",
    "InfiniModel": "feature-extraction",
}

KINDS = {
    "InfiniForCausalLM": "causal language model",
    "InfiniForQuestionAnswering": "model that finds answers in a text",
    "InfiniForSequenceClassification": "text classifier",
    "InfiniForTokenClassification": "token classifier",
}

USAGE = {
    "InfiniForCausalLM": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
book = tokenizer(open("book.txt").read(), return_tensors="pt")
out = model.generate(**book, max_new_tokens=50, return_dict_in_generate=True)
print(tokenizer.decode(out.sequences[0, book.input_ids.shape[1] :]))

# What the model remembers is a file, and can be continued with new tokens alone.
out.past_key_values.save_pretrained("memory-of-the-book")
memory = type(out.past_key_values).from_pretrained("memory-of-the-book", model)
```""",
    "other": """```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
outputs = model(**tokenizer(open("book.txt").read(), return_tensors="pt"))
```""",
}


MEMORY_USAGE = """On its base, the memory makes a checkpoint that reads text of any length:

    infini convert {base} with-memory --memory {name}

or it takes the place of the memory in a conversion of the base that is there already:

    infini apply-memory converted {name}

In a running process, `load_memory(model, "{name}")` of `infini_transformers.conversion` does it."""


def model_card(
    config: InfiniConfig,
    local_shares: torch.Tensor,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    training: str | None = None,
) -> ModelCard:
    """
    A card with the metadata of the Hub.

    Args:
        config: of the model; its `converted_from` says where the weights come from.
        local_shares: what the gates give to local attention, `(num_hidden_layers, num_attention_heads)`.
        repo_id: where the model will be.
        base_model: id on the Hub of the model that this one comes from, if `config.converted_from` does not name it.
        license: identifier of the Hub, if `config.converted_from` does not name it.
        training: how the model was trained after its conversion, in Markdown.

    Raises:
        ValueError: if `config.converted_from` names another model than `base_model`.
    """
    origin = config.converted_from or {}
    architecture = (config.architectures or ["InfiniForCausalLM"])[0].removeprefix("FSDP")
    base_model = _base_model(origin, base_model)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS.get(architecture),
        tags=["infini-attention", "long-context", "custom_code"],
        base_model=base_model,
        **_licence(origin, license),
    )
    sections = [
        f"# {(repo_id or base_model or 'Infini-attention').rsplit('/', 1)[-1]}"
        + (" with Infini-attention" if repo_id is None and base_model else ""),
        f"A {KINDS.get(architecture, 'language model without a head')} that reads text of any length with a memory of "
        f"constant size: local attention over "
        f"segments of {config.segment_length:,} tokens and a compressive memory per head "
        f"([Infini-attention]({PAPER})).",
        "## How it was made",
        _provenance(config, origin, base_model, training),
        "## Memory",
        _memory_table(config, local_shares),
        "## Usage",
        _usage(architecture, repo_id or "path/or/repo-id"),
        "## Limits",
        _limits(config, training),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def memory_card(
    config: InfiniConfig,
    local_shares: torch.Tensor,
    parameters: int,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    training: str | None = None,
) -> ModelCard:
    """
    The card of a memory without its base; arguments as of [`model_card`].

    Args:
        parameters: how many there are in it.
    """
    origin = config.converted_from or {}
    base_model = _base_model(origin, base_model)
    data = ModelCardData(
        library_name="transformers",
        tags=["infini-attention", "infini-memory", "long-context"],
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        **_licence(origin, license),
    )
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "its base"
    revision = f" at revision `{origin['revision']}`" if "revision" in origin else ""
    title = (repo_id or base_model or "an Infini-attention model").rsplit("/", 1)[-1]
    sections = [
        f"# {'' if repo_id else 'A memory for '}{title}",
        f"What {base}{revision} lacks to read text of any length with a memory of constant size "
        f"([Infini-attention]({PAPER})): head gates and the memory's own weights, {parameters:,} parameters. The "
        "base's weights are not in it, and stay as they are.",
        "## How it was made",
        training or "How it was trained is not recorded here.",
        "## Memory",
        _memory_table(config, local_shares),
        "## Usage",
        MEMORY_USAGE.format(base=base_model or "path/to/base", name=repo_id or "path/or/repo-id"),
        "## Limits",
        "- It belongs to one base: `memory_config.json` has a fingerprint of that base's weights, and others are "
        "refused. To a fine-tuned base a memory means something else.\n"
        f"- {_limit_of_memory(config)}\n"
        "- It is data: no code comes with it.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _base_model(origin: dict[str, Any], base_model: str | None) -> str | None:
    if base_model is not None and origin.get("name", base_model) != base_model:
        raise ValueError(
            f"The model was converted from {origin['name']}, as its configuration says, not from {base_model}."
        )
    return base_model or origin.get("name")


def _licence(origin: dict[str, Any], license: str | None) -> dict[str, Any]:
    if license is not None:
        return {"license": license}
    return {name: origin.get(name) for name in ("license", "license_name", "license_link")}


def write_missing_card(model: InfiniPreTrainedModel, folder: str | os.PathLike, repo_id: str) -> None:
    """
    Writes a card into a folder that is about to be pushed, unless it has one that says something about the model.

    Args:
        model: also one of a class that came with a checkpoint, `trust_remote_code=True`.
    """
    file = Path(folder) / "README.md"
    found = ModelCard.load(file) if file.is_file() else None
    if found is not None and TRANSFORMERS_CARD not in found.content:
        return
    card = model_card(model.config, model.local_shares().detach(), repo_id=repo_id)
    tags = [] if found is None else found.data.to_dict().get("tags", [])
    card.data["tags"] = [*card.data["tags"], *(tag for tag in tags if tag not in card.data["tags"])]
    card.save(file)


def _provenance(config: InfiniConfig, origin: dict[str, Any], base_model: str | None, training: str | None) -> str:
    trained = training or "Whether it was trained since is not recorded here: if the gates below have moved, it was."
    if not origin:
        return training or "It was not converted from another model. How it was trained is not recorded here."
    name = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a checkpoint"
    if "gguf" in origin:
        name = f"{name if base_model else 'a model'}, by a GGUF file of {origin['gguf']}"
    if "package" in origin:
        return f"The weights were imported from a model of the package {origin['package']}. {trained}"
    revision = f" at revision `{origin['revision']}`" if "revision" in origin else ""
    kind = f" (architecture `{origin['model_type']}`)" if "model_type" in origin else ""
    gates = origin.get("head_gates", f"started at the logit {config.head_gate_init_value:g}")
    if "memory" in origin:
        gates = "those of a memory that was applied"
        if memory := origin["memory"].get("name"):
            gates += f", [{memory}](https://huggingface.co/{memory})"
    return f"The weights were converted from {name}{revision}{kind}. Gates: {gates}. {trained}"


def memory_rule(config: InfiniConfig) -> str:
    """How the memory is written and read, in words."""
    rule = f"{'delta' if config.use_mem_delta_rule else 'linear'} rule"
    extensions = {
        "a learned write strength": config.learned_delta_update,
        "a norm of its queries and keys": config.memory_norm_init_scale is not None,
        "a write gate": config.memory_write_gate,
        "learned exponential features": config.memory_feature_map == "exp",
        "gates that depend on the token": config.token_gates,
    }
    present = [name for name, is_present in extensions.items() if is_present]
    return f"{rule}, with {', '.join(present)}" if present else rule


def _in_layers(config: InfiniConfig, what: str, layers: list[int]) -> str:
    """What is in some layers, and in which."""
    if len(layers) in (0, config.num_hidden_layers):
        return what if layers else "none"
    return f"{what}, in layers {', '.join(map(str, layers))} of {config.num_hidden_layers}"


def _memory_table(config: InfiniConfig, local_shares: torch.Tensor) -> str:
    local = f"sliding window of {config.segment_length:,} tokens and {config.num_sink_tokens} attention sinks"
    # Where there is no memory, there are no gates.
    shares = local_shares[config.layers_with_memory]
    rows = {
        "segment length": f"{config.segment_length:,} tokens",
        "local attention": local if config.is_sliding else "within each segment",
        "memory": _in_layers(config, memory_rule(config), config.layers_with_memory),
        "slots": _in_layers(config, f"{config.num_memory_slots:,} tokens kept exactly", config.layers_with_slots),
        "share of local attention in the gates": f"{shares.mean():.1%} on average, {shares.min():.1%} to "
        f"{shares.max():.1%}"
        if len(shares)
        else "no gates",
        "state per sequence": f"{state_nbytes(config) / 1e6:,.1f} MB, whatever the length",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _usage(architecture: str, name: str) -> str:
    auto_class = "AutoModel" + architecture.removeprefix("Infini").removeprefix("Model")
    return USAGE.get(architecture, USAGE["other"]).format(name=name, auto_class=auto_class)


def _limit_of_memory(config: InfiniConfig) -> str:
    exact = f"the last {config.segment_length:,} tokens"
    if not config.is_sliding:
        exact = "the tokens of the own segment"
    if config.layers_with_slots:
        exact += f" and {config.num_memory_slots:,} that were chosen before"
    return (
        f"Exact attention reaches {exact}; what else was written is averaged with everything since. The memory is "
        "associative, not a transcript."
    )


def _limits(config: InfiniConfig, training: str | None) -> str:
    limits = [
        _limit_of_memory(config),
        "The model brings its own code: `trust_remote_code=True` runs the Python files of this repository. Pin a "
        "`revision` that you have read.",
        "Static, quantized and offloaded caches and continuous batching are refused: they hold no memory.",
    ]
    origin = config.converted_from or {}
    if "model_type" in origin and "memory" not in origin and training is None:
        limits.insert(0, "A conversion alone keeps the model fluent; that it *uses* its memory has to be taught.")
    return "\n".join(f"- {limit}" for limit in limits)


__all__ = ["model_card", "write_missing_card"]
