"""The README, the pages of docs/ and the cards: Python runs (not the cards'), commands exist, links lead somewhere."""

import argparse
import ast
import importlib
import json
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest import SkipTest

import pytest
import torch
import typer
from base_models import base_model
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from tiny import tiny_model
from words import random_text, save_word_tokenizer

import infini_transformers.conversion
import modeling_infini
from infini_transformers import cli
from infini_transformers.conversion.__main__ import app


ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = [*sorted((ROOT / "checkpoints").glob("*/README.md")), ROOT / "examples/space/README.md"]
PAGES = [*GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "notebooks/README.md", *CARDS]
API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
REFERENCE = re.findall(r"^::: (\S+)", API, re.MULTILINE)

MARKDOWN = MarkdownIt("commonmark").enable("table")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list:
    return list(Document.parse(str(page), PythonCodeBlockParser(), SkipParser()))


def source_of(example) -> str | None:
    """The code of a Python block; `None` of a mark to skip one."""
    return getattr(example.parsed, "text", None)


WITH_PYTHON = [page for page in GUIDES if any(source_of(example) for example in python_blocks(page))]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with the files that the pages name, in which all models are tiny."""
    tokens = {"eos_token": "w1", "pad_token": "w0", "model_input_names": ["input_ids", "attention_mask"]}
    llama = base_model(max_position_embeddings=2048)
    llama.save_pretrained(tmp_path / "path/to/llama")
    save_word_tokenizer(tmp_path / "path/to/llama", **tokens)
    llama.save_pretrained(tmp_path / "path/to/infini-llama")
    weights_file = tmp_path / "path/to/infini-llama/model.safetensors"
    gates = {f"model.layers.{layer}.self_attn.gate": torch.randn(1, 4, 1, 1) for layer in range(2)}
    save_file({**load_file(weights_file), **gates}, weights_file, metadata={"format": "pt"})
    tiny_model(local_attention="sliding", num_sink_tokens=2).save_pretrained(tmp_path / "converted")
    save_word_tokenizer(tmp_path / "converted", **tokens)
    (tmp_path / "books").mkdir()
    for name, words in (("book.txt", 90), ("books/one.txt", 200), ("books/two.txt", 150)):
        (tmp_path / name).write_text(random_text(words))
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=page_id)
def test_python_runs(page, workspace):
    if page.name == "README.md":
        # Its first lines make this folder.
        (workspace / "converted").rename(workspace / "other")
    ran = 0
    for example in python_blocks(page):
        try:
            example.evaluate()
            ran += source_of(example) is not None
        except SkipTest:
            continue
        except Exception as error:
            raise AssertionError(f"{page_id(page)}:{example.line}: {type(error).__name__}: {error}") from error
    assert ran or "skip: next" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", WITH_PYTHON, ids=page_id)
def test_python_of_what_is_not_run_too_imports_what_exists(page):
    for example in python_blocks(page):
        if (source := source_of(example)) is None:
            continue
        for node in ast.walk(ast.parse(source)):
            # Installed in an environment of its own.
            if isinstance(node, ast.ImportFrom) and node.module == "vllm":
                continue
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page_id(page)}:{example.line}: {node.module}.{alias.name}"


class Command(NamedTuple):
    page: Path
    text: str
    is_whole: bool  # and not a name of it in running text

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def commands_of(page: Path) -> Iterator[Command]:
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        blocks = [token] if token.type in ("fence", "code_block") else []
        inline = [child for child in token.children or [] if child.type == "code_inline"]
        for code in [*blocks, *inline]:
            if code.type == "fence" and code.info not in ("", "bash", "sh", "text"):
                continue
            for line in code.content.replace("\\\n", " ").splitlines():
                if re.match(r"\s*(infini [a-z]|python (-m )?\S|(accelerate launch|torchrun|bash) |make [a-z])", line):
                    yield Command(page, line.strip(), code.type != "code_inline")


COMMANDS = [command for page in PAGES for command in commands_of(page)]


class Parsed(Exception):
    """Ends a script when its arguments have been parsed."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def parser_of(target: str, arguments: list[str], is_whole: bool, monkeypatch):
    """The parser of a script, a module or a command of `infini`, which has parsed `arguments` if `is_whole`."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, args=None, namespace=None):
        if self.prog in ("infini", "infini evaluate"):  # These choose a command, whose own parser follows.
            return parse(self, args, namespace)
        if is_whole:
            unknown = parse(self, sys.argv[1:] if args is None else args, namespace)[1]
            assert not unknown, f"{target} does not know {unknown}"
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [target, *arguments])
    monkeypatch.setattr(cli, "prepare_process", lambda: None)
    run, script = runpy.run_module, "infini_transformers" if target == "infini" else target
    if target.endswith(".py"):
        run, script = runpy.run_path, str(ROOT / target)
        monkeypatch.syspath_prepend(str((ROOT / target).parent))
    with pytest.raises(Parsed) as stopped:
        run(script, run_name="__main__")
    return stopped.value.parser


def check_conversion(name: str, arguments: list[str], is_whole: bool) -> None:
    command = typer.main.get_command(app).commands[name]
    if is_whole:
        command.make_context(name, list(arguments))
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    assert {word for word in arguments if word.startswith("--")} <= known


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{page_id(command.page)}-{command.text[:60]}")
def test_commands_exist(command, monkeypatch):
    words, is_whole = command.words, command.is_whole and "..." not in command.words
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"make has no target {words[1]}"
        return
    if words[0] in ("accelerate", "torchrun"):
        for word in words:
            if word.startswith("examples/launch"):
                assert (ROOT / word).is_file()
        script = next(
            (index for index, word in enumerate(words) if word.startswith("examples/") and ".py" in word), None
        )
        if script is None:
            return
        words = ["python", *words[script:]]
    if words[0] == "bash":
        launcher, base, texts, output, *options = words[1:]
        assert (ROOT / launcher).is_file()
        required = ["--model", base, "--train_files", texts, "--output_dir", output]
        words = ["python", "examples/distill.py", *required, *options]
    target, *arguments = words if words[0] == "infini" else words[2:] if words[1] == "-m" else words[1:]
    if target == "pytest":
        files = [word for word in arguments if word.endswith(".py")]
        assert all((ROOT / file).is_file() for file in files)
    elif target == "infini" and arguments[0] in cli.CONVERSION:
        check_conversion(cli.CONVERSION[arguments[0]][0], arguments[1:], is_whole)
    elif target == "conversion":
        if arguments[:1] not in ([], ["--help"]):
            check_conversion(arguments[0], arguments[1:], is_whole)
    elif target == "infini" and arguments[0] == "read":
        # Not through the command, which parses twice.
        parser = cli.read_parser()
        if is_whole:
            parser.parse_intermixed_args(arguments[1:])
        assert {word for word in arguments if word.startswith("--")} <= set(parser._option_string_actions)
    elif arguments[:1] == ["evaluate"] and len(arguments) == 1:
        assert "evaluate" in cli.COMMANDS
    else:
        parser = parser_of(target, arguments, is_whole, monkeypatch)
        options = {word for word in arguments if word.startswith("--")}
        assert options <= set(parser._option_string_actions)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page, on GitHub and on the site, where both agree."""
    tokens = MARKDOWN.parse(page.read_text(encoding="utf-8"))
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | (set(REFERENCE) if page.name == "api.md" else set())


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        for child in token.children or []:
            link = child.attrGet("href") or child.attrGet("src")
            if link is None or re.match(r"\w+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page_id(page)} links to {path}"
            # The site is built of docs/ alone.
            inside = ROOT / "docs" if page.is_relative_to(ROOT / "docs") else ROOT
            assert target.is_relative_to(inside), f"{page_id(page)} links to {path}, outside of {inside.name}"
            if anchor and target.suffix == ".md":
                assert anchor in anchors_of(target), f"{page_id(page)} links to {link}"


def test_figures_of_the_readme_have_a_home_in_the_docs():
    figures = [set(re.findall(r"\d+(?:[.,]\d+)+|\d{2,}", page.read_text(encoding="utf-8"))) for page in GUIDES]
    assert page_id(GUIDES[0]) == "README.md"
    assert figures[0] <= set().union(*figures[1:])


@pytest.mark.parametrize("file", sorted((ROOT / "docs/recall/equal_state").glob("*.json")), ids=lambda file: file.stem)
def test_longer_windows_of_the_same_state_are_as_in_the_files(file):
    by_text = json.loads(file.read_text(encoding="utf-8"))["by_text"]
    (condition,) = (name for name in by_text["moby_dick"]["conditions"] if "memory off, window of" in name)
    cells = [f"as {condition.split()[-1]}"]
    for name in ("moby_dick", "mansfieldpark"):
        (found,) = by_text[name]["minus_off"].values()
        cells += [f"{found[role]['nll']:.4f}" for role in ("on", "longer window")]
    rows = (ROOT / "docs/conversion.md").read_text(encoding="utf-8").replace("**", "").splitlines()
    assert any(row.startswith("|") and row.endswith(f"{' | '.join(cells)} |") for row in rows), cells


def test_every_public_name_is_in_the_reference():
    described = {name.rsplit(".", 1)[-1] for name in REFERENCE}
    assert set(modeling_infini.__all__) | set(infini_transformers.conversion.__all__) <= described


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_describes_what_exists(name):
    module, attribute = name.rsplit(".", 1)
    assert hasattr(importlib.import_module(module), attribute)
