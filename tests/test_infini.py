"""The console command `infini`."""

import ast
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from base_models import base_model
from words import random_text, save_word_tokenizer

from infini_transformers import __version__, cli, evaluation, reading
from infini_transformers.conversion import __main__ as conversion_commands
from modeling_infini import InfiniCache


N = 9


@pytest.fixture
def infini(monkeypatch, capsys):
    """Runs `infini` in this process: its exit status, output and error output."""
    monkeypatch.setattr(cli, "prepare_process", lambda: None)
    monkeypatch.setattr(sys, "argv", ["infini"])

    def run(*arguments):
        capsys.readouterr()
        status = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            status = 1 if isinstance(stop.code, str) else stop.code or 0
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def folders(tmp_path, infini):
    base_model().save_pretrained(tmp_path / "base")
    save_word_tokenizer(tmp_path / "base")
    assert infini("convert", tmp_path / "base", tmp_path / "infini", "--segment-length", N)[0] == 0
    (tmp_path / "book.txt").write_text(random_text(60))
    return tmp_path


HELP = """
import sys
from infini_transformers.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["evaluate", "--help"], ["read", "--help"]])
def test_help_needs_no_torch(arguments):
    command = [sys.executable, "-c", HELP, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    if arguments == ["--help"]:
        assert all(name in done.stdout for name in cli.COMMANDS)
    if arguments == ["--version"]:
        assert __version__ in done.stdout


def test_all_that_the_packages_do_is_a_command():
    there = typer.main.get_command(conversion_commands.app).commands
    assert {name for name, _ in cli.CONVERSION.values()} == set(there)
    with_main = [
        file.stem
        for file in Path(evaluation.__file__).parent.glob("*.py")
        if any(isinstance(part, ast.FunctionDef) and part.name == "main" for part in ast.parse(file.read_text()).body)
    ]
    assert sorted(cli.EVALUATIONS) == sorted(with_main)


def test_usage_names_the_command(infini, folders):
    assert infini()[0] == 2
    for arguments, usage in (
        (["transmogrify"], "infini: error"),
        (["convert"], "Usage: infini convert"),
        (["convert-back", "--help"], "Usage: infini convert-back"),
        (["read"], "usage: infini read"),
        (["read", folders / "infini"], "nothing to read"),
        (["read", "m", "book.txt", "--prompt", "words", "--max-new-tokens", 0], "a --prompt is for what is written"),
        (["evaluate"], "usage: infini evaluate"),
        (["evaluate", "retrieval"], "usage: infini evaluate retrieval"),
        (["evaluate", "write_weights", "--help"], "usage: infini evaluate write_weights"),
    ):
        status, out, err = infini(*arguments)
        assert status == (0 if "--help" in arguments else 2)
        assert usage in out + err


def test_errors_are_messages(infini, folders):
    (folders / "latin.txt").write_bytes(b"caf\xe9")
    shutil.copytree(folders / "infini", folders / "damaged")
    (folders / "damaged" / "model.safetensors").write_bytes(b"no weights")
    for arguments, message in (
        (["read", folders / "infini", folders / "none.txt"], "none.txt"),
        (["read", folders / "infini", folders / "latin.txt"], "latin.txt is no text in UTF-8"),
        (["read", folders / "base", folders / "book.txt"], "not one with Infini-attention"),
        (["read", folders / "infini", "--memory", folders, "--prompt", "words"], "infini_cache.safetensors"),
        (["inspect", folders / "base"], "no Infini-attention checkpoint"),
        (["read", folders / "infini", folders / "book.txt", "--dtype", "foo"], 'There is no dtype "foo"'),
        (["read", folders / "infini", folders / "book.txt", "--device", "foo"], 'There is no device "foo" here'),
        (
            ["read", folders / "infini", "--save-memory", folders / "book.txt", folders / "none.txt"],
            "book.txt is a file",
        ),
        (
            ["read", folders / "infini", "--save-memory", folders / "book.txt" / "memory", folders / "book.txt"],
            "Not a",
        ),
        (["read", folders / "damaged", folders / "book.txt"], "header"),
    ):
        status, _, err = infini(*arguments)
        assert status == 1
        assert "Error: " in err
        assert message in err
        assert "Reading" not in err


def test_an_interruption_is_no_error_to_report(infini, folders, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(reading, "load_model", interrupt)
    monkeypatch.setattr(conversion_commands, "inspect_checkpoint", interrupt)
    for arguments in (["read", folders / "infini", folders / "book.txt"], ["inspect", folders / "infini"]):
        status, _, err = infini(*arguments)
        assert status == 130
        assert "Traceback" not in err


def test_read_goes_on_from_a_memory(infini, folders, monkeypatch):
    model, book, memory = folders / "infini", folders / "book.txt", folders / "memory"
    status, written, err = infini("read", model, book, "--save-memory", memory, "--max-new-tokens", 0)
    assert (status, written) == (0, "")
    assert "tokens/s" in err
    assert f"It is saved in {memory}." in err
    assert InfiniCache.from_pretrained(memory, reading.load_model(model)).get_seq_length() == 60

    question = random_text(5, seed=1)
    at_once = infini("read", model, book, "--prompt", question, "--max-new-tokens", 7)
    later = infini("read", model, "--memory", memory, "--prompt", question, "--max-new-tokens", 7)
    assert at_once[:2] == later[:2]
    assert len(later[1].split()) == 7
    assert "had read 60 tokens before" in later[2]

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(book.read_bytes())))
    assert infini("read", model, "-", "--prompt", question, "--max-new-tokens", 7)[:2] == at_once[:2]
    # What a memory holds and what comes then is one text.
    words = book.read_text().split()
    (folders / "start.txt").write_text(" ".join(words[:33]))
    (folders / "rest.txt").write_text(" ".join(words[33:]))
    infini("read", model, folders / "start.txt", "--save-memory", memory, "--max-new-tokens", 0)
    options = ["--memory", memory, "--max-new-tokens", 7]
    in_two = infini("read", model, folders / "rest.txt", *options)
    assert in_two[1] == infini("read", model, book, "--max-new-tokens", 7)[1]


@pytest.mark.parametrize("in_text", [1, 3, 20, 39])
def test_a_prompt_of_any_length_is_read_whole(infini, folders, in_text):
    words = random_text(40, seed=2).split()
    (folders / "whole.txt").write_text(" ".join(words))
    (folders / "start.txt").write_text(" ".join(words[:in_text]))
    expected = infini("read", folders / "infini", folders / "whole.txt", "--max-new-tokens", 9)[1]
    prompt = ["--prompt", " ".join(words[in_text:]), "--max-new-tokens", 9]
    assert infini("read", folders / "infini", *prompt, folders / "start.txt")[1] == expected
    memory = ["--save-memory", folders / "start", "--max-new-tokens", 0]
    assert infini("read", folders / "infini", folders / "start.txt", *memory)[0] == 0
    assert infini("read", folders / "infini", "--memory", folders / "start", *prompt)[1] == expected
