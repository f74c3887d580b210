"""The console command `infini`. It answers at once: what a command needs is imported when that command runs."""

import argparse
import io
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from . import __version__, quiet  # noqa: F401


READ = "reads a text with progress, and goes on with it or answers; keeps what was read as a file"
EVALUATE = "measures a model: `infini evaluate --help` lists how"

# By the names that they have in `infini`: the commands of `python -m conversion`, and what they do.
CONVERSION = {
    "convert": ("to-infini", "converts a Llama, Mistral, Qwen2 or Qwen3 to Infini-attention"),
    "transfer": ("transfer", "teaches a conversion's memory, in minutes to hours"),
    "inspect": ("inspect", "shows a checkpoint: architecture, segments, memory, gates"),
    "card": ("card", "writes a checkpoint's model card"),
    "save-memory": ("save-memory", "saves the memory that was trained, without its base"),
    "apply-memory": ("apply-memory", "puts such a memory into a conversion of its base"),
    "convert-back": ("from-infini", "goes back to the base architecture"),
    "from-lucidrains": ("from-lucidrains", "imports a model of infini-transformer-pytorch"),
}

# Modules of `infini_transformers.evaluation`, and what they measure.
EVALUATIONS = {
    "retrieval": "whether a model finds what was hidden in a long text: passkeys, needles, variables",
    "by_position": "losses by position, with the memory, without it and with that of another text",
    "memory_use": "what the memory does: loss, gates and what is read from it",
    "write_weights": "which tokens a memory with write gates holds",
    "at_conversion": "how far a conversion moves the perplexity of a long text",
}

COMMANDS = {"read": READ, **{name: what for name, (_, what) in CONVERSION.items()}, "evaluate": EVALUATE}


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Runs a command.

    Args:
        arguments: what follows `infini` in a shell; by default those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    prepare_process()
    command = _choose("infini", "Infini-attention: text of any length, memory of constant size.", COMMANDS, arguments)
    try:
        if command == "evaluate":
            _evaluate(arguments[1:])
        elif command == "read":
            _read(arguments[1:])
        else:
            _convert(command, arguments[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError

        if not isinstance(error, (ImportError, OSError, SafetensorError, StrictDataclassError, ValueError)):
            raise
        sys.exit(f"Error: {error}")


def prepare_process() -> None:
    """So that what is unfinished is removed when a shell closes too, and no terminal is too simple for the output."""
    for name in ("SIGTERM", "SIGHUP"):
        # Windows has no hang-up, and under nohup it is not to be noticed.
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _choose(prog: str, description: str, choices: Mapping[str, str], arguments: Sequence[str]) -> str:
    """The first argument, if it is one of the choices. All that follow are for the choice itself."""
    width = max(map(len, choices))
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} COMMAND ...",
        description=description,
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {what}" for name, what in choices.items())
        + f"\n\n`{prog} COMMAND --help` shows what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"infini-transformers {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=choices, help=argparse.SUPPRESS)
    return parser.parse_args(arguments[:1]).command


def read_parser() -> argparse.ArgumentParser:
    """The arguments of `infini read`."""
    parser = argparse.ArgumentParser(
        prog="infini read",
        description="Reads a text of any length into a memory of constant size, and prints how it goes on. What the\n"
        "model writes goes to the output, all else to the error output.",
        epilog="""examples:
  infini read converted book.txt
  infini read converted book.txt --save-memory book-memory --max-new-tokens 0
  infini read converted --memory book-memory --prompt $'\\n\\nThe name of the captain was'
  pdftotext paper.pdf - | infini read converted -""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a folder or a Hub id of an Infini-attention model: what `infini convert` makes")
    parser.add_argument("texts", metavar="text", nargs="*", help="text files, read in this order; - is the input")
    parser.add_argument("--memory", metavar="FOLDER", help="go on from what was read before, by --save-memory")
    parser.add_argument("--save-memory", metavar="FOLDER", help="keep what was read, without what is written then")
    parser.add_argument("--prompt", default="", help="words that follow the text: a question, or a beginning")
    parser.add_argument("--tokens", type=int, help="to read of the text, at most (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=60, help="tokens to write (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as they are saved)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    return parser


def _read(arguments: Sequence[str]) -> None:
    parser = read_parser()
    # Texts may stand before and after options.
    options = parser.parse_intermixed_args(arguments)
    if not (options.texts or (options.memory and options.prompt)):
        parser.error("nothing to read: name a text file, or a --memory and a --prompt")
    if options.tokens is not None and options.tokens < 1:
        parser.error("--tokens must be at least 1")
    if options.max_new_tokens < 0:
        parser.error("--max-new-tokens must be at least 0")
    if options.prompt and not options.max_new_tokens:
        parser.error("a --prompt is for what is written: leave it out, or ask for --max-new-tokens")
    from .reading import read_and_write

    read_and_write(options)


def _convert(command: str, arguments: Sequence[str]) -> None:
    import typer

    from .conversion.__main__ import app

    group: Any = typer.main.get_command(app)
    group.commands[CONVERSION[command][0]].main(list(arguments), prog_name=f"infini {command}")


def _evaluate(arguments: Sequence[str]) -> None:
    name = _choose("infini evaluate", "Measures how well a model reads, and what it recalls.", EVALUATIONS, arguments)
    # By which argparse names the command.
    sys.argv = [f"infini evaluate {name}", *arguments[1:]]
    import_module(f".evaluation.{name}", __package__).main()
