"""`python -m conversion`, from the shell's side."""

import io
import json
import re
import subprocess
import sys

import pytest
import torch
from base_models import base_model
from huggingface_hub import ModelCard
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoConfig
from typer.testing import CliRunner

from infini_transformers.cli import CONVERSION
from infini_transformers.conversion.__main__ import app
from infini_transformers.conversion.inspection import Inspection, inspect_checkpoint
from modeling_infini import InfiniForCausalLM, state_nbytes


COMMANDS = ("to-infini", "from-infini", "from-lucidrains", "save-memory", "apply-memory", "card", "inspect")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fail(message, *arguments):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert message in result.output


@pytest.fixture
def converted(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    succeed("to-infini", tmp_path / "base", tmp_path / "infini", "--segment-length", 9)
    return tmp_path / "infini"


def test_help_teaches():
    done = subprocess.run([sys.executable, "-m", "conversion", "--help"], capture_output=True, text=True, check=True)
    assert "Retrofit" in done.stdout
    for command in COMMANDS:
        assert command in done.stdout
        text = succeed(command, "--help")
        (name,) = (name for name, (command_there, _) in CONVERSION.items() if command_there == command)
        assert f"Example: infini {name} " in re.sub(r"\s+", " ", text)


def test_there_and_back(tmp_path, converted):
    options = ("--local-attention", "segment", "--head-gate-init-value", -1, "--use-mem-delta-rule")
    options += ("--dtype", "bfloat16", "--max-shard-size", "10KB")
    succeed("to-infini", tmp_path / "base", tmp_path / "other", "--segment-length", 12, *options)
    model = InfiniForCausalLM.from_pretrained(tmp_path / "other")
    assert (model.config.segment_length, model.config.local_attention, model.config.num_sink_tokens) == (
        12,
        "segment",
        0,
    )
    assert model.config.use_mem_delta_rule
    assert model.dtype == torch.bfloat16
    assert (tmp_path / "other" / "model.safetensors.index.json").exists()
    torch.testing.assert_close(model.model.layers[0].self_attn.head_gates().data, torch.full((4,), -1.0).sigmoid())

    succeed("from-infini", converted, tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "back"))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_errors_are_messages(tmp_path, converted):
    fail("exists already", "to-infini", tmp_path / "base", converted, "--segment-length", 9)
    fail("segment_length is needed", "to-infini", tmp_path / "base", tmp_path / "new")
    fail("no Infini-attention checkpoint", "inspect", tmp_path / "base")
    fail("There is no folder or file", "inspect", tmp_path / "nowhere")
    fail("README.md exists already. Pass --overwrite", "card", converted)
    tiny_model().save_pretrained(tmp_path / "trained")
    fail("--drop-gates", "from-infini", tmp_path / "trained", tmp_path / "back")
    succeed("from-infini", tmp_path / "trained", tmp_path / "back", "--drop-gates", "--model-type", "llama")
    assert AutoConfig.from_pretrained(tmp_path / "back").model_type == "llama"
    (tmp_path / "gates.json").write_text("[1, 2")
    fail(
        "gates.json",
        "to-infini",
        tmp_path / "base",
        tmp_path / "n",
        "--segment-length",
        9,
        "--head-gates",
        tmp_path / "gates.json",
    )


def test_card(tmp_path, converted):
    (converted / "README.md").unlink()
    succeed("card", converted, "--repo-id", "me/mine", "--base-model", "base/model", "--license", "mit")
    card = ModelCard.load(converted / "README.md")
    assert (card.data.base_model, card.data.license) == ("base/model", "mit")
    succeed("card", converted, "--overwrite", "--training", "Trained on sonnets.")
    assert "Trained on sonnets." in (converted / "README.md").read_text()


def test_a_card_says_whether_the_memory_was_taught(converted):
    untaught = "it *uses* its memory has to be taught"
    assert untaught in (converted / "README.md").read_text()
    succeed("card", converted, "--overwrite")
    assert untaught in (converted / "README.md").read_text()
    weights = load_file(converted / "model.safetensors")
    weights["model.layers.0.self_attn.head_gates.weight"] += 1
    save_file(weights, converted / "model.safetensors", metadata={"format": "pt"})
    succeed("card", converted, "--overwrite")
    assert untaught not in (converted / "README.md").read_text()
    assert "Its memory was taught since." in (converted / "README.md").read_text()
    # One that was applied is known.
    origin = json.loads((converted / "config.json").read_text())["converted_from"]
    edit_config(converted, converted_from={**origin, "memory": {"sha256": "0" * 64}})
    succeed("card", converted, "--overwrite")
    assert "those of a memory that was applied" in (converted / "README.md").read_text()
    assert "was taught since" not in (converted / "README.md").read_text()


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_card_names_the_model_that_the_checkpoint_names(converted):
    origin = {"model_type": "llama", "name": "a/b", "revision": "0123abc", "license": "llama3.2"}
    edit_config(converted, converted_from=origin)
    fail(
        "converted from a/b, as its configuration says, not from c/d",
        "card",
        converted,
        "--overwrite",
        "--base-model",
        "c/d",
    )
    succeed("card", converted, "--overwrite", "--base-model", "a/b")
    assert "at revision `0123abc`" in (converted / "README.md").read_text()


@pytest.mark.parametrize(
    ("metadata", "shown"),
    [
        ("license: 2024-01-01", "license 2024-01-01"),
        ("license: [mit, apache-2.0]", "license ['mit', 'apache-2.0']"),
        ("license: '[bold]x[/foo]'", "license [bold]x[/foo]"),
        ("license: '[mit]'", "license [mit]"),
        ("license: {a: 2024-01-01}", "2024-01-01"),
    ],
)
def test_odd_licences_are_shown_as_they_are(tmp_path, converted, metadata, shown):
    (tmp_path / "base" / "README.md").write_text(f"---\n{metadata}\n---\nA model.\n")
    succeed("to-infini", tmp_path / "base", tmp_path / "other", "--segment-length", 9)
    assert shown in succeed("inspect", tmp_path / "other")
    succeed("card", tmp_path / "other", "--overwrite")


def test_an_origin_of_unknown_type_is_a_checkpoint(converted):
    edit_config(converted, converted_from={"name": "a/b"})
    assert "a/b, a checkpoint" in succeed("inspect", converted)
    succeed("card", converted, "--overwrite")
    assert "converted from [a/b](https://huggingface.co/a/b). Gates" in (converted / "README.md").read_text()


def test_gates_that_are_not_finite_are_named(tmp_path, converted):
    model = InfiniForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        model.model.layers[1].self_attn.head_gates.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "diverged")
    fail("has gates that are not finite", "inspect", tmp_path / "diverged")
    fail("has gates that are not finite", "card", tmp_path / "diverged")


def test_a_configuration_without_a_meaning_is_named(converted):
    edit_config(converted, segment_length=0)
    for command in (("inspect", converted), ("from-infini", converted, converted.parent / "back")):
        fail("holds no configuration of a model: segment_length=0 must be at least 1.", *command)


def test_inspect_shows_architecture_memory_and_gates(tmp_path, converted):
    text = succeed("inspect", converted)
    for words in (
        "2 layers, hidden size 24, 4 query and 2 key/value heads of 6, vocabulary 31",
        "a llama checkpoint",
        "9 tokens",
        "the last 9 tokens and 4 attention sinks",
        "linear rule",
        "MB per sequence",
    ):
        assert words in text
    assert re.search(r"0–1 +98\.2% +98\.2% +98\.2% +████", text)

    model = InfiniForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        model.model.layers[1].self_attn.head_gates.weight.copy_(torch.tensor([-1.0, 0.0, 0.0, 0.5]))
    model.save_pretrained(tmp_path / "trained")
    text = succeed("inspect", tmp_path / "trained")
    assert re.search(r"\n +0 +98\.2% +98\.2% +98\.2% +████", text)
    assert re.search(r"\n +1 +49\.8% +0\.0% +99\.3% +▁▅▅█", text)
    inspection = inspect_checkpoint(tmp_path / "trained")
    assert inspection.parameters == sum(parameter.numel() for parameter in model.parameters())
    torch.testing.assert_close(inspection.local_shares, model.local_shares().detach())


def test_inspection_names_what_a_memory_has_of_its_own():
    options = {"memory_layers": [0, 2, 3], "token_gates": True, "memory_feature_map": "exp"}
    model = tiny_model(num_hidden_layers=6, local_attention="sliding", num_memory_slots=7, **options)
    inspection = Inspection(model.config, 1, model.local_shares().detach(), state_nbytes(model.config))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(inspection)
    text = console.export_text()
    assert re.search("memory layers +0, 2, 3 of 0 to 5", text)
    assert re.search("memory slots +7 tokens per layer", text)
    assert "local attention (before what each token adds to it)" in text
    assert re.search("\n +1 +no memory", text)
    assert re.search("\n +4–5 +no memory", text)
    with_memory = inspection.local_shares[[0, 2, 3]]
    assert re.search(rf"\n +all +{with_memory.mean():.1%}", text)


def test_from_lucidrains(tmp_path):
    peer = pytest.importorskip("infini_transformer_pytorch")
    model = peer.InfiniTransformer(num_tokens=31, dim=24, depth=2, dim_head=6, heads=4)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    arguments = ("from-lucidrains", tmp_path / "model.pt", tmp_path / "ours", "--segment-length", 7)
    succeed(*arguments, "--use-mem-delta-rule")
    config = AutoConfig.from_pretrained(tmp_path / "ours")
    assert (config.segment_length, config.use_mem_delta_rule) == (7, True)
    assert "a model of the package infini-transformer-pytorch" in succeed("inspect", tmp_path / "ours")
    assert "a model of the package infini-transformer-pytorch" in (tmp_path / "ours" / "README.md").read_text()
    fail("exists already", *arguments)
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    fail(
        "no state dict of an InfiniTransformer",
        "from-lucidrains",
        tmp_path / "other.pt",
        tmp_path / "n",
        "--segment-length",
        7,
    )
