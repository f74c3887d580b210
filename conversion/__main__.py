"""`python -m conversion`: conversion from the shell."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .to_infini import convert_to_infini


app = typer.Typer(add_completion=False, rich_markup_mode="markdown", no_args_is_help=True)


class LocalAttention(str, Enum):
    segment = "segment"
    sliding = "sliding"


@app.callback()
def main():
    """Retrofit pretrained checkpoints with Infini-attention: text of any length, memory of constant size."""


@app.command()
def to_infini(
    source: Annotated[str, typer.Argument(help="A checkpoint's folder, a .gguf file, or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="The folder to make.")],
    segment_length: Annotated[int, typer.Option(help="Tokens per segment.")],
    local_attention: Annotated[
        LocalAttention,
        typer.Option(help="What a token sees beside the memory: a sliding window with sinks, or its own segment."),
    ] = LocalAttention.sliding,
    num_sink_tokens: Annotated[
        int | None, typer.Option(help="Attention sinks; by default 4 in `sliding`, 0 in `segment`.")
    ] = None,
    head_gate_init_value: Annotated[
        float, typer.Option(help="Logit of the gates; its sigmoid is the share of local attention.")
    ] = 4.0,
    use_mem_delta_rule: Annotated[bool, typer.Option(help="Write the memory with the delta rule.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the saved weights: `auto`, `float32`, `bfloat16`, ...")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the Hub.")] = None,
):
    """
    Convert a Llama checkpoint to an Infini-attention one.

    Up to a segment's length the result answers as the source does; it then reads on, however long the text. What the
    memory brings is learned in fine-tuning.

    Example: `python -m conversion to-infini path/to/llama converted --segment-length 1024`
    """
    try:
        folder = convert_to_infini(
            source,
            output,
            segment_length=segment_length,
            local_attention=local_attention.value,
            num_sink_tokens=num_sink_tokens,
            head_gate_init_value=head_gate_init_value,
            use_mem_delta_rule=use_mem_delta_rule,
            dtype=dtype,
            revision=revision,
        )
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"Converted {source} to {folder}.")


if __name__ == "__main__":
    app()
