"""Checkpoints as files: shards, dtypes, pickles, and what is left when something goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from base_models import base_model
from safetensors.torch import load_file, save_file
from tiny import random_ids
from transformers import AutoModelForCausalLM

from benchmarks.conversion_memory import measure, write_checkpoint
from infini_transformers.conversion import checkpoints, convert_from_infini, convert_to_infini
from infini_transformers.conversion.inspection import inspect_checkpoint
from modeling_infini import InfiniForCausalLM


N = 9


@pytest.fixture
def base_folder(tmp_path):
    base_model().save_pretrained(tmp_path / "base", max_shard_size="10KB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 2
    return tmp_path / "base"


def edit_weights(folder, edit):
    """Merges a folder's shards into one file, after `edit` has changed the weights."""
    weights = {name: weight for file in folder.glob("model*.safetensors") for name, weight in load_file(file).items()}
    edit(weights)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(random_ids(2, N)).logits


def test_shards_become_other_shards(tmp_path, base_folder):
    convert_to_infini(base_folder, tmp_path / "ours", segment_length=N, max_shard_size="20KB")
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert 1 < len(files) < len(list(base_folder.glob("*.safetensors")))
    # That of the memory has a name of its own.
    assert [file.name for file in files] == [
        *(f"model-{number:05}-of-{len(files) - 1:05}.safetensors" for number in range(1, len(files))),
        "model-memory.safetensors",
    ]
    assert all(sum(weight.nbytes for weight in load_file(file).values()) <= 20_000 for file in files)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    stored = {name: (file.name, weight) for file in files for name, weight in load_file(file).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in stored.items()}
    assert index["metadata"]["total_size"] == sum(weight.nbytes for _, weight in stored.values())
    assert torch.equal(logits(tmp_path / "ours"), logits(base_folder))


def test_no_more_than_a_shard_is_held_in_memory(tmp_path):
    write_checkpoint(tmp_path / "tiny", 1, hidden_size=64, intermediate_size=64)
    nbytes = write_checkpoint(tmp_path / "large", 5)
    assert nbytes > 320e6
    runs = {"to": ("", {"segment_length": N}), "from": ("-converted", {"dtype": "float32"})}
    for convert, (suffix, options) in runs.items():
        sources = [tmp_path / f"{name}{suffix}" for name in ("tiny", "large")]
        found = measure(convert, *sources, max_shard_size="50MB", **options)
        # A shard, or the largest weight where that is larger, and what the allocator keeps.
        assert found["nbytes"] < 1.5 * 50e6
        assert len(list((tmp_path / f"large{suffix}-converted").glob("*.safetensors"))) > 5
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("stop_at", [1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_stops_midway_leaves_nothing(tmp_path, base_folder, monkeypatch, stop_at, error):
    written = []

    def save(*arguments, **options):
        written.append(arguments)
        if len(written) == stop_at:
            raise error("no space left")
        save_file(*arguments, **options)

    monkeypatch.setattr(checkpoints, "save_file", save)
    for convert, options in ((convert_to_infini, {"segment_length": N}), (convert_from_infini, {})):
        source = base_folder if convert is convert_to_infini else tmp_path / "ours"
        if convert is convert_from_infini:
            written.extend([None] * 100)
            convert_to_infini(base_folder, source, segment_length=N)
            written.clear()
        before = sorted(tmp_path.iterdir())
        with pytest.raises(error):
            convert(source, tmp_path / "output", max_shard_size="10KB", **options)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("exists", [False, True])
def test_two_conversions_to_one_output_lose_nothing(tmp_path, base_folder, monkeypatch, exists):
    """Also where both processes have one number, as on two machines that share a disk."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    output = tmp_path / "output"
    if exists:
        output.mkdir()
    others = []

    def save(*arguments, **options):
        if not others:
            others.append(None)
            if exists:
                with pytest.raises(FileExistsError, match=r"unfinished is left of a conversion.*still runs"):
                    convert_to_infini(base_folder, output, segment_length=N)
            else:
                convert_to_infini(base_folder, output, segment_length=N)
        save_file(*arguments, **options)

    monkeypatch.setattr(checkpoints, "save_file", save)
    if exists:
        convert_to_infini(base_folder, output, segment_length=N)
    else:
        with pytest.raises(FileExistsError, match="exists already"):
            convert_to_infini(base_folder, output, segment_length=N)
    assert torch.equal(logits(output), logits(base_folder))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base", "output"]
    assert not list(output.glob(".*"))


def test_what_a_killed_conversion_left_is_named_and_stops_no_other(tmp_path, base_folder):
    left = tmp_path / "ours" / f".ours.{os.getpid()}.unfinished"
    left.mkdir(parents=True)
    with pytest.raises(FileExistsError, match=rf"{left} is left of a conversion that was killed.*Remove it"):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N)
    (tmp_path / f".other.{os.getpid()}.unfinished").mkdir()
    convert_to_infini(base_folder, tmp_path / "other", segment_length=N)
    assert left.is_dir()


def test_folders_made_for_what_fails_are_removed(tmp_path, base_folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "save_file", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_to_infini(base_folder, tmp_path / "new" / "folders" / "ours", segment_length=N)
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("convert", ["to", "back"])
def test_a_disk_that_is_too_small_is_told_in_time(tmp_path, base_folder, monkeypatch, caplog, convert):
    convert_to_infini(base_folder, tmp_path / "ours", segment_length=N)
    source, options = (base_folder, {"segment_length": N}) if convert == "to" else (tmp_path / "ours", {})
    convert = convert_to_infini if convert == "to" else convert_from_infini
    needed = json.loads((base_folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    asked = []

    def usage(free):
        return lambda folder: asked.append(folder) or SimpleNamespace(free=free)

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage(needed - 1))
    with pytest.raises(OSError, match=r"take 0.00 GB, and 0.00 GB are free where .*new will be. Make room"):
        convert(source, tmp_path / "no" / "new", **options)
    assert asked == [tmp_path]
    assert not (tmp_path / "no").exists()
    # Half of what the float32 weights take.
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage(needed * 3 // 4))
    caplog.clear()
    convert(source, tmp_path / "half", dtype="bfloat16", **options)
    assert "the disk will be nearly full" in caplog.text
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage(2**40))
    caplog.clear()
    convert(source, tmp_path / "whole", **options)
    assert "disk" not in caplog.text


HANG = """
import signal, sys, time, runpy
from infini_transformers.conversion import to_infini
# Under nohup it is ignored, in what runs the tests and so here.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
to_infini.write_weights = lambda *arguments: (print("writes", flush=True), time.sleep(60))
sys.argv = ["conversion", "to-infini", sys.argv[1], sys.argv[2], "--segment-length", "9"]
runpy.run_module("infini_transformers.conversion", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM], ids=lambda number: number.name)
def test_a_closed_shell_leaves_nothing(tmp_path, base_folder, number):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", HANG, str(base_folder), str(tmp_path / "ours")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writes\n"
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(number)
        assert process.wait() == 128 + number
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("size", ["20000", 20_000, "20 kb", "0.02MB"])
def test_sizes_of_shards_may_be_bytes(tmp_path, base_folder, size):
    convert_to_infini(base_folder, tmp_path / "ours", segment_length=N, max_shard_size=size)
    files = list((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 1
    assert all(sum(weight.nbytes for weight in load_file(file).values()) <= 20_000 for file in files)


@pytest.mark.parametrize("size", ["0", 0, -5, "-1GB", "1GiB", "0.0GB", "", "GB", "5G", 1.5])
def test_other_sizes_of_shards_are_refused(tmp_path, base_folder, size):
    for convert, options in ((convert_to_infini, {"segment_length": N}), (convert_from_infini, {})):
        with pytest.raises(ValueError, match=f'max_shard_size="{size}" is no size'):
            convert(base_folder, tmp_path / "ours", max_shard_size=size, **options)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "holds no weight_map"),
        ({}, "holds no weight_map"),
        ([], "holds no weight_map"),
        ({"lm_head.weight": None}, "holds no weight_map"),
        ({"lm_head.weight": "../other.safetensors"}, "names ../other.safetensors, which is not in its folder"),
        ({"lm_head.weight": "/other.safetensors"}, "names /other.safetensors, which is not in its folder"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, base_folder, weight_map, message):
    (base_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N)


def test_a_single_file_goes_before_an_old_index(tmp_path, base_folder):
    base_model().save_pretrained(tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file(
        {name: 2 * weight for name, weight in weights.items()}, base_folder / "model.safetensors", {"format": "pt"}
    )
    convert_to_infini(base_folder, tmp_path / "ours", segment_length=N)
    assert torch.equal(logits(tmp_path / "ours"), logits(base_folder))


@pytest.mark.parametrize(
    "name", ["model-00001-of-00004.safetensors", "config.json", "tokenizer.json", "parts/tokenizer.model", "m.gguf"]
)
def test_pointers_of_git_lfs_are_refused(tmp_path, base_folder, name):
    pointer = base_folder / name
    pointer.parent.mkdir(exist_ok=True)
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    source = pointer if name == "m.gguf" else base_folder
    with pytest.raises(ValueError, match=f"{name} is not the file itself but a pointer of Git LFS.*git lfs pull"):
        convert_to_infini(source, tmp_path / "ours", segment_length=N)


def test_pointers_in_the_place_of_what_is_not_read_pass(tmp_path, base_folder):
    for name in ("pytorch_model.bin", "original/consolidated.00.pth"):
        (base_folder / name).parent.mkdir(exist_ok=True)
        (base_folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    convert_to_infini(base_folder, tmp_path / "ours", segment_length=N)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"lm_head.weight": torch.ones(2)}}, "'model' is a dict"),
        ({"epoch": 3}, "'epoch' is a int"),
        ([torch.ones(2)], "no state dict, but a list"),
        (torch.ones(2), "no state dict, but a Tensor"),
        (b"", "cannot be read with weights_only=True"),
        (b"in letters", "cannot be read with weights_only=True"),
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path, base_folder, content, message):
    for file in base_folder.glob("*.safetensors*"):
        file.unlink()
    file = base_folder / "pytorch_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin.*{message}"):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N, allow_bin=True)


def test_a_missing_shard_is_named(tmp_path, base_folder):
    gone = sorted(base_folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {gone.name}, which is not there"):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N)
    (base_folder / "model.safetensors.index.json").unlink()
    for file in base_folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N)


def test_a_damaged_file_is_named(tmp_path, base_folder):
    damaged = sorted(base_folder.glob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{damaged.name} is incomplete or damaged"):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickles_are_read_only_when_asked(tmp_path, base_folder, sharded):
    expected = logits(base_folder)
    index = base_folder / "model.safetensors.index.json"
    weights = {}
    for file in base_folder.glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        weights |= load_file(file)
        file.unlink()
    text = index.read_text().replace(".safetensors", ".bin")
    index.unlink()
    if sharded:
        (base_folder / "pytorch_model.bin.index.json").write_text(text)
    else:
        torch.save(weights, base_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle files.*allow_bin=True \(--allow-bin\)"):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N)
    convert_to_infini(base_folder, tmp_path / "ours", segment_length=N, allow_bin=True)
    assert torch.equal(logits(tmp_path / "ours"), expected)


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the pickle ran')",)


def test_a_pickle_runs_no_code(tmp_path, base_folder):
    for file in base_folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"model.embed_tokens.weight": Payload()}, base_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N, allow_bin=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def test_rotary_buffers_of_old_checkpoints_are_left_out(tmp_path, base_folder):
    edit_weights(
        base_folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    )
    convert_to_infini(base_folder, tmp_path / "ours", segment_length=N)
    assert torch.equal(logits(tmp_path / "ours"), logits(base_folder))


def test_weights_that_would_be_lost_are_refused(tmp_path, base_folder):
    edit_weights(base_folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}))
    with pytest.raises(ValueError, match=r"1 weights that a llama has not.*q_proj.bias"):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N)


@pytest.mark.parametrize("own_head", [False, True])
def test_tied_embeddings_with_a_head_in_the_file(tmp_path, own_head):
    base_model("llama-tied-head_dim").save_pretrained(tmp_path / "base")

    def add_head(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (2 if own_head else 1)

    edit_weights(tmp_path / "base", add_head)
    convert_to_infini(tmp_path / "base", tmp_path / "ours", segment_length=N)
    ours = InfiniForCausalLM.from_pretrained(tmp_path / "ours")
    assert ours.config.tie_word_embeddings != own_head
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) != own_head
    assert torch.equal(logits(tmp_path / "ours"), logits(tmp_path / "base"))
    # As a file of ours that another tool has saved so.
    convert_to_infini(tmp_path / "base", tmp_path / "other", segment_length=N)
    edit_config(tmp_path / "other", tie_word_embeddings=True)
    if not own_head:
        edit_weights(tmp_path / "other", add_head)
    assert inspect_checkpoint(tmp_path / "other").parameters == sum(weight.numel() for weight in ours.parameters())
    convert_from_infini(tmp_path / "other", tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "base"))


def test_dtype_is_that_of_the_weights_but_not_of_the_gates(tmp_path, base_folder):
    convert_to_infini(base_folder, tmp_path / "half", segment_length=N, dtype=torch.float16, max_shard_size="1GB")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for name, weight in weights.items() if "head_gates" not in name} == {torch.float16}
    assert {weight.dtype for name, weight in weights.items() if "head_gates" in name} == {torch.float32}
    assert InfiniForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16
    convert_from_infini(tmp_path / "half", tmp_path / "back", dtype="float32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == torch.float32


def set_weight(folder, name, index, value):
    def edit(weights):
        weights[name][index] = value

    edit_weights(folder, edit)


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, 65_520.0, "up to 65520, would become infinite"),
        (3, -1e9, r"up to 1e\+09, would become infinite"),
        (slice(None), 1e-9, "too small and would become zero"),
        (slice(None), 2e-7, "too small and would become zero or coarse"),
    ],
)
def test_weights_that_do_not_fit_into_a_dtype_are_refused_by_name(tmp_path, base_folder, index, value, message):
    set_weight(base_folder, NORM, index, value)
    with pytest.raises(ValueError, match=f"{NORM} does not fit into torch.float16.*{message}.*bfloat16"):
        convert_to_infini(base_folder, tmp_path / "half", segment_length=N, dtype="float16")
    convert_to_infini(base_folder, tmp_path / "ours", segment_length=N, dtype="bfloat16")
    with pytest.raises(ValueError, match=f"{NORM} does not fit into torch.float16"):
        convert_from_infini(tmp_path / "ours", tmp_path / "back", dtype="float16")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base", "ours"]


def test_the_largest_and_small_single_values_fit(tmp_path, base_folder):
    set_weight(base_folder, NORM, 0, 65_504.0)
    set_weight(base_folder, NORM, 1, 1e-9)
    convert_to_infini(base_folder, tmp_path / "half", segment_length=N, dtype="float16")


def test_float64_beyond_float32_is_refused(tmp_path, base_folder):
    edit_weights(base_folder, lambda weights: weights.update({NORM: weights[NORM].double() * 1e39}))
    with pytest.raises(ValueError, match=r"would become infinite.*float64"):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N, dtype="float32")
    convert_to_infini(base_folder, tmp_path / "ours", segment_length=N)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_the_source_holds_is_kept_with_a_warning(tmp_path, base_folder, caplog, value):
    set_weight(base_folder, NORM, 0, value)
    for dtype in ("auto", "float16"):
        convert_to_infini(base_folder, tmp_path / dtype, segment_length=N, dtype=dtype)
        assert f"{NORM} of the source holds values that are not finite" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    "options",
    [{"head_gate_init_value": float("nan")}, {"head_gate_init_value": 1e40}, {"memory_norm_init_scale": float("inf")}],
)
def test_initial_values_that_are_not_finite_are_refused(tmp_path, base_folder, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* is not finite"):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N, **options)


GATES = [1.5, [-2.0, 0.0, 2.0, 4.0]]


@pytest.mark.parametrize("from_file", [False, True])
def test_gates_of_layers_and_heads(tmp_path, base_folder, from_file):
    gates = GATES
    if from_file:
        gates = tmp_path / "gates.json"
        gates.write_text(json.dumps(GATES))
    convert_to_infini(base_folder, tmp_path / "ours", segment_length=N, head_gates=gates)
    ours = InfiniForCausalLM.from_pretrained(tmp_path / "ours")
    for layer, logit in zip(ours.model.layers, (torch.full((4,), 1.5), torch.tensor(GATES[1]))):
        torch.testing.assert_close(layer.self_attn.head_gates().data, logit.sigmoid())
    with pytest.raises(ValueError, match="trained or set"):
        convert_from_infini(tmp_path / "ours", tmp_path / "back")


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ([1.0], "it has 1 layers"),
        ([1.0, [1.0, 2.0]], "list of 2 layers, each a number or a list of 4 numbers"),
        ([1.0, "open"], "list of 2 layers"),
        (3.0, "list of 2 layers"),
        ([[1.0], [2.0]], r"list of 4 numbers, one per head: a layer has the shape \(1,\)"),
        ([True, False], "torch.bool"),
        ([1.0, float("nan")], "not finite"),
        ([1.0, 1e39], "not finite"),
    ],
)
def test_gates_of_another_form_are_refused(tmp_path, base_folder, gates, message):
    with pytest.raises(ValueError, match=message):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N, head_gates=gates)
    (tmp_path / "gates.json").write_text(json.dumps(gates))
    with pytest.raises(ValueError, match=r"gates\.json"):
        convert_to_infini(base_folder, tmp_path / "ours", segment_length=N, head_gates=tmp_path / "gates.json")
    assert not (tmp_path / "ours").exists()
