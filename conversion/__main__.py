"""`python -m conversion`: conversion from the shell."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from safetensors import SafetensorError

from infini_transformers.cli import prepare_process

from .architectures import MEMORY_OPTIONS
from .checkpoints import Checkpoint, new_folder, require_free
from .config_overrides import config_fields
from .from_infini import convert_from_infini
from .from_lucidrains import load_lucidrains
from .in_place import apply_memory as apply_memory_to
from .inspection import inspect_checkpoint
from .memory_weights import is_taught
from .memory_weights import save_memory as save_memory_of
from .model_card import model_card
from .to_infini import convert_to_infini
from .transfer import LayerTransfer
from .transfer import transfer as attention_transfer


app = typer.Typer(add_completion=False, rich_markup_mode="markdown", no_args_is_help=True)

Source = Annotated[str, typer.Argument(help="A checkpoint's folder, or a Hub id.")]
Output = Annotated[Path, typer.Argument(help="The folder to make. It appears only when it is complete.")]
Dtype = Annotated[str, typer.Option(help="Of the saved weights: `auto` (as they are), `float32`, `bfloat16`, ...")]
ShardSize = Annotated[str, typer.Option(help="Largest output file, in bytes or as `5GB`; one is held in memory.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]


class LocalAttention(str, Enum):
    segment = "segment"
    sliding = "sliding"


@contextmanager
def errors_as_messages() -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError, SafetensorError, ValueError, StrictDataclassError) as error:
        # Not typer's box: it breaks lines inside paths.
        reason = error.__cause__ or error if isinstance(error, StrictDataclassError) else error
        typer.echo(f"Error: {reason}", err=True)
        raise typer.Exit(1) from error


@app.callback()
def main():
    """
    Retrofit pretrained checkpoints with Infini-attention: text of any length, memory of constant size.

    `to-infini` converts a Llama, Mistral, Qwen2 or Qwen3; `transfer` teaches its memory; `inspect` shows what came
    out; `card` writes its model card; `from-infini` goes back; `save-memory` and `apply-memory` take what was trained
    from one conversion to another; `from-lucidrains` imports models of infini-transformer-pytorch.
    """


@app.command()
def to_infini(
    source: Annotated[str, typer.Argument(help="A checkpoint's folder, a .gguf file, or a Hub id.")],
    output: Output,
    segment_length: Annotated[
        int | None,
        typer.Option(help="Tokens per segment. By default the source's own sliding window, if it has one."),
    ] = None,
    local_attention: Annotated[
        LocalAttention | None,
        typer.Option(help="What a token sees beside the memory: `sliding` window (default), or its own `segment`."),
    ] = None,
    num_sink_tokens: Annotated[
        int | None,
        typer.Option(help="Attention sinks; by default 4 in `sliding`, 0 in `segment` or if the source slides."),
    ] = None,
    head_gate_init_value: Annotated[
        float | None,
        typer.Option(help="Logit of the gates, by default 4; its sigmoid is the share of local attention."),
    ] = None,
    head_gates: Annotated[
        Path | None,
        typer.Option(help="JSON file with the gates' logits: for each layer a number, or a list with one per head."),
    ] = None,
    use_mem_delta_rule: Annotated[
        bool | None, typer.Option("--use-mem-delta-rule", help="Write the memory with the delta rule.")
    ] = None,
    memory_norm_init_scale: Annotated[
        float | None,
        typer.Option(help="Norm the queries and keys of the memory, with learned scales that start at this."),
    ] = None,
    num_memory_slots: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a layer keeps exactly; `transfer` teaches it which. As many as a segment is good."
        ),
    ] = None,
    config_overrides: Annotated[
        str,
        typer.Option(
            help="Other fields of the memory, as `field=value,...`: `memory_feature_map=exp,token_gates=true`."
        ),
    ] = "",
    memory: Annotated[
        str | None,
        typer.Option(help="A memory for this base, by `save-memory`: its folder, or a Hub id. It brings its fields."),
    ] = None,
    dtype: Dtype = "auto",
    max_shard_size: ShardSize = "5GB",
    allow_bin: Annotated[
        bool, typer.Option("--allow-bin", help="Read PyTorch .bin files (pickles) where there are no safetensors.")
    ] = False,
    revision: Revision = None,
):
    """
    Convert a Llama, Mistral, Qwen2 or Qwen3 to Infini-attention.

    Up to a segment's length the result answers as the source does; it then reads on, however long the text. `transfer`
    teaches it to use its memory. Weights go from file to file: a machine with little memory will do.

    Example: `infini convert path/to/llama converted --segment-length 1024`
    """
    options: dict[str, Any] = {
        "segment_length": segment_length,
        "local_attention": None if local_attention is None else local_attention.value,
        "num_sink_tokens": num_sink_tokens,
        "head_gate_init_value": head_gate_init_value,
        "use_mem_delta_rule": use_mem_delta_rule,
        "memory_norm_init_scale": memory_norm_init_scale,
        "num_memory_slots": num_memory_slots,
    }
    with errors_as_messages():
        for name, value in config_fields(config_overrides).items():
            if name not in MEMORY_OPTIONS:
                raise ValueError(f"{name} is the base's, not the memory's: those are {', '.join(MEMORY_OPTIONS)}.")
            if options.get(name) is not None:
                raise ValueError(f"{name} is set twice: by --{name.replace('_', '-')} and by --config-overrides.")
            options[name] = value
        folder = convert_to_infini(
            source,
            output,
            head_gates=head_gates,
            memory=memory,
            dtype=dtype,
            max_shard_size=max_shard_size,
            allow_bin=allow_bin,
            revision=revision,
            **options,
        )
    typer.echo(f"Converted {source} to {folder}. Look at it: infini inspect {output}")


@app.command()
def from_infini(
    source: Source,
    output: Output,
    drop_gates: Annotated[
        bool, typer.Option("--drop-gates", help="Drop gates that were trained; what they learned is lost.")
    ] = False,
    model_type: Annotated[
        str | None, typer.Option(help="The architecture to become; by default what the model was converted from.")
    ] = None,
    dtype: Dtype = "auto",
    max_shard_size: ShardSize = "5GB",
    revision: Revision = None,
):
    """
    Go back to the base architecture: full attention, no memory.

    After `to-infini` alone, the weights are the source's, byte for byte.

    Example: `infini convert-back converted llama-again`
    """
    with errors_as_messages():
        folder = convert_from_infini(
            source,
            output,
            drop_gates=drop_gates,
            model_type=model_type,
            dtype=dtype,
            max_shard_size=max_shard_size,
            revision=revision,
        )
    typer.echo(f"Converted {source} to {folder}.")


@app.command()
def from_lucidrains(
    source: Annotated[Path, typer.Argument(help="The saved state dict: .pt or .safetensors.")],
    output: Output,
    segment_length: Annotated[int, typer.Option(help="Tokens per segment, as given to InfiniTransformerWrapper.")],
    use_mem_delta_rule: Annotated[
        bool, typer.Option("--use-mem-delta-rule", help="Set it if the InfiniTransformer had it.")
    ] = False,
):
    """
    Import a model of the package infini-transformer-pytorch (0.2.1).

    Its logits over segments are reproduced; `learned_delta_update` is found in the weights.

    Example: `infini from-lucidrains model.pt converted --segment-length 512`
    """
    with errors_as_messages():
        require_free(output)
        model = load_lucidrains(source, segment_length=segment_length, use_mem_delta_rule=use_mem_delta_rule)
        with new_folder(output) as folder:
            model_card(model.config, model.local_shares()).save(folder / "README.md")
            model.save_pretrained(folder)
    typer.echo(f"Imported {source} to {output}.")


@app.command()
def save_memory(
    source: Source,
    output: Output,
    repo_id: Annotated[str | None, typer.Option(help="Where it will be published, as `name/memory`.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base, if the checkpoint does not name it.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Hub identifier of the licence, such as `apache-2.0`.")] = None,
    training: Annotated[str | None, typer.Option(help="How it was trained, and what it reaches, in Markdown.")] = None,
):
    """
    Save the memory of a trained conversion by itself, without the base that it belongs to.

    A few MB: head gates, the memory's own weights, and a card. Refused if the base was trained too.

    Example: `infini save-memory tuned llama-memory`
    """
    with errors_as_messages():
        folder = save_memory_of(
            source, output, repo_id=repo_id, base_model=base_model, license=license, training=training
        )
    typer.echo(f"Saved the memory of {source} to {folder}.")


@app.command()
def apply_memory(
    folder: Annotated[Path, typer.Argument(help="A conversion of the memory's base. It is changed in place.")],
    memory: Annotated[str, typer.Argument(help="What `save-memory` saved: its folder, or a Hub id.")],
):
    """
    Put a memory into a conversion of its base, in place of the one there.

    The base's weights stay as they are. Whenever it ends, the folder holds the old model or the new one.

    Example: `infini apply-memory converted llama-memory`
    """
    with errors_as_messages():
        apply_memory_to(folder, memory)
    typer.echo(f"{folder} has the memory of {memory}. Its card: infini card {folder} --overwrite")


@app.command()
def transfer(
    folder: Annotated[Path, typer.Argument(help="A conversion. Its memory is changed in place.")],
    texts: Annotated[list[Path], typer.Option(help="A text file, or a folder with .txt files; repeatable.")],
    teacher: Annotated[
        Path | None, typer.Option(help="The base, if its weights are not to be read from the conversion.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Of the texts, at most. Default: 57,344, or nine windows of eight segments if more."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of training, for each layer.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the choice of texts and the order of steps.")] = 0,
):
    """
    Teach a conversion's memory, layer by layer, what full attention sees beyond the window.

    The base's weights stay as they are. An interrupted run goes on where it was, by the same command.

    Example: `infini transfer converted --texts books/`
    """

    def report(layer: LayerTransfer) -> None:
        typer.echo(str(layer))

    with errors_as_messages():
        done = attention_transfer(folder, texts, teacher=teacher, tokens=tokens, steps=steps, seed=seed, report=report)
    if done.loss_on is None:
        typer.echo(f"{folder} has no memory now: in no layer does it help by what it holds of the text.")
        return
    what = [
        f"{name} in the layers {', '.join(map(str, layers))}"
        for name, layers in (("a memory", done.memory_layers), ("slots", done.slot_layers))
        if layers
    ]
    typer.echo(
        f"{folder} has {' and '.join(what)}. On calibration text that it was not trained on: {done.loss_off:.4f} nats "
        f"per token without, {done.loss_on:.4f} with them. Its card: infini card {folder} --overwrite"
    )


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="An Infini-attention checkpoint's folder.")],
    repo_id: Annotated[str | None, typer.Option(help="Where it will be published, as `name/model`.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the model that it comes from, if the checkpoint does not say.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Hub identifier of the licence, such as `apache-2.0`.")] = None,
    training: Annotated[str | None, typer.Option(help="How it was trained since, in Markdown.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a README.md that is there.")] = False,
):
    """
    Write a model card (README.md) with the Hub's metadata into a checkpoint's folder.

    Base model, licence, segments, rule and gates are read from the checkpoint as far as it knows them.

    Example: `infini card converted --repo-id me/llama-infini --base-model meta-llama/Llama-3.2-1B`
    """
    with errors_as_messages():
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}.")
        inspection = inspect_checkpoint(folder)
        file = folder / "README.md"
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists already. Pass --overwrite to replace it.")
        is_applied = "memory" in (inspection.config.converted_from or {})
        if training is None and not is_applied and is_taught(Checkpoint(folder)):
            training = "Its memory was taught since. How is not recorded here."
        model_card(
            inspection.config,
            inspection.local_shares,
            repo_id=repo_id,
            base_model=base_model,
            license=license,
            training=training,
        ).save(file)
    typer.echo(f"Wrote {file}.")


@app.command()
def inspect(source: Source, revision: Revision = None):
    """
    Show an Infini-attention checkpoint: architecture, segments, size of its memory, gates of each layer.

    Little more than the configuration and the gates is read, but a model on the Hub is downloaded as a whole.

    Example: `infini inspect converted`
    """
    with errors_as_messages():
        Console().print(inspect_checkpoint(source, revision))


if __name__ == "__main__":
    prepare_process()
    app()
