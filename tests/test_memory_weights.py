"""A memory by itself: what was trained is saved without its base, and applied to that base and no other."""

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from base_models import base_model
from hub_server import USER, local_hub
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoints import edit_config, edit_weights
from test_gguf import write_gguf
from test_publishing import INSPECT, run
from tiny import random_ids
from typer.testing import CliRunner

from infini_transformers.conversion import (
    apply_memory,
    convert_from_infini,
    convert_to_infini,
    in_place,
    load_memory,
    save_memory,
)
from infini_transformers.conversion.__main__ import app
from infini_transformers.conversion.base_fingerprint import base_fingerprint
from infini_transformers.conversion.checkpoints import Checkpoint, is_memory_weight
from infini_transformers.conversion.in_place import replace_memory
from infini_transformers.conversion.memory_weights import MemoryWeights, initial_memory_weights
from modeling_infini import InfiniConfig, InfiniForCausalLM, InfiniForSequenceClassification, InfiniModel


N = 9

# Everything that a memory may have, in one layer of two.
OPTIONS = {
    "memory_feature_map": "exp",
    "token_gates": True,
    "memory_layers": [1],
    "memory_norm_init_scale": 1.5,
    "memory_write_gate": True,
    "learned_delta_update": True,
    "use_mem_delta_rule": True,
    "num_memory_slots": 3,
}
SAME = {name: value for name, value in OPTIONS.items() if name != "memory_layers"}


def train(model):
    """Changes the memory's own parameters alone."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_memory_weight(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return model


def loaded(folder, **options):
    return InfiniForCausalLM.from_pretrained(folder, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(random_ids(2, 4 * N)).logits


@pytest.fixture
def base(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def trained(tmp_path, base):
    """A conversion whose memory was trained."""
    convert_to_infini(base, tmp_path / "converted", segment_length=N, **OPTIONS)
    train(loaded(tmp_path / "converted")).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.fixture
def memory(tmp_path, trained):
    return save_memory(trained, tmp_path / "memory")


def base_bytes(folder):
    """The bytes of the base's weights by name, whatever files they are in."""
    found = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        for name, entry in json.loads(content[8 : 8 + size]).items():
            if name != "__metadata__" and not is_memory_weight(name):
                start, end = entry["data_offsets"]
                found[name] = entry["dtype"], entry["shape"], content[8 + size + start : 8 + size + end]
    return found


@pytest.mark.parametrize("variant", ["llama", "qwen2", "mistral", "qwen3"])
@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, "5GB"), (torch.bfloat16, "10KB")])
def test_a_memory_goes_from_one_conversion_to_another(tmp_path, variant, dtype, shards):
    base = tmp_path / "base"
    base_model(variant, dtype).save_pretrained(base, max_shard_size=shards)
    convert_to_infini(base, tmp_path / "converted", segment_length=N, max_shard_size=shards, **OPTIONS)
    # In float32, in which a memory is trained, whatever its base is in.
    model = train(loaded(tmp_path / "converted", dtype=torch.float32))
    model.to(dtype).save_pretrained(tmp_path / "trained") if dtype == torch.float32 else None
    save_memory(model, tmp_path / "memory")
    weights = load_file(tmp_path / "memory" / "memory.safetensors")
    assert weights.keys() == {name for name, _ in model.named_parameters() if is_memory_weight(name)}
    assert {weight.dtype for weight in weights.values()} == {torch.float32}

    convert_to_infini(base, tmp_path / "again", memory=tmp_path / "memory", max_shard_size=shards)
    convert_to_infini(base, tmp_path / "other", segment_length=N + 1, max_shard_size=shards)
    apply_memory(tmp_path / "other", tmp_path / "memory")
    for name in ("again", "other"):
        assert torch.equal(logits(loaded(tmp_path / name, dtype=torch.float32)), logits(model))
        assert base_bytes(tmp_path / name) == base_bytes(tmp_path / "converted")
        # What comes out of it is what went in, byte for byte.
        save_memory(tmp_path / name, tmp_path / f"{name}-memory")
        for file in ("memory.safetensors", "memory_config.json"):
            assert (tmp_path / f"{name}-memory" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()
    running = loaded(tmp_path / "converted", dtype=torch.float32)
    load_memory(running, tmp_path / "memory")
    assert torch.equal(logits(running), logits(model))


def test_a_memory_goes_into_a_single_file_without_one(tmp_path, base, trained, memory):
    convert_to_infini(base, tmp_path / "without", segment_length=N, memory_layers=[])
    for _ in range(2):
        apply_memory(tmp_path / "without", memory)
        assert torch.equal(logits(loaded(tmp_path / "without")), logits(loaded(trained)))
        assert base_bytes(tmp_path / "without") == base_bytes(trained)


def test_a_base_that_fits_a_shard_alone_has_its_memory_beside_it(tmp_path, base, trained, memory):
    size = sum(weight.nbytes for weight in load_file(base / "model.safetensors").values())
    convert_to_infini(base, tmp_path / "other", memory=memory, max_shard_size=size)
    files = {file.name for file in (tmp_path / "other").glob("*.safetensors")}
    assert files == {"model-00001-of-00001.safetensors", "model-memory.safetensors"}
    assert torch.equal(logits(loaded(tmp_path / "other")), logits(loaded(trained)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_memory_is_known_as_the_applied_one_is(tmp_path, base, dtype):
    options = {"segment_length": N, "dtype": dtype, **OPTIONS}
    convert_to_infini(base, tmp_path / "trained-here", **options)
    # Of values that bfloat16 holds, in which some of the memory's weights are saved.
    train(loaded(tmp_path / "trained-here")).to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    memory = save_memory(tmp_path / "rounded", tmp_path / "memory")
    convert_to_infini(base, tmp_path / "other", **options)
    model = loaded(tmp_path / "other")
    load_memory(model, memory)
    assert model.config.converted_from["memory"] == MemoryWeights.load(memory).as_origin
    model.save_pretrained(tmp_path / "saved")
    # What is published by itself is no loss.
    convert_from_infini(tmp_path / "saved", tmp_path / "back")


@pytest.mark.parametrize(
    ("card", "licence"),
    [("license: [mit, apache-2.0]", "mit, apache-2.0"), ("license: other\nlicense_name: 2.0", "other")],
)
def test_a_licence_that_is_no_text_becomes_one(tmp_path, base, card, licence):
    (base / "README.md").write_text(f"---\n{card}\n---\n")
    convert_to_infini(base, tmp_path / "other", segment_length=N)
    train(loaded(tmp_path / "other")).save_pretrained(tmp_path / "trained")
    save_memory(tmp_path / "trained", tmp_path / "memory")
    assert MemoryWeights.load(tmp_path / "memory").base["license"] == licence


def test_what_generate_cannot_follow_is_left_out_when_the_segments_become_shorter(tmp_path, base, memory):
    options = {"prompt_lookup_num_tokens": N + 1, "max_new_tokens": 5}
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    convert_to_infini(base, tmp_path / "other", segment_length=2 * N)
    file = tmp_path / "other" / "generation_config.json"
    # What the user has added is left alone.
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_length": 500}))
    apply_memory(tmp_path / "other", memory)
    assert json.loads(file.read_text())["max_length"] == 500
    model = loaded(tmp_path / "other")
    assert (model.generation_config.prompt_lookup_num_tokens, model.generation_config.max_new_tokens) == (None, 5)
    model.generate(random_ids(1, 4).repeat(1, 9))
    convert_from_infini(tmp_path / "other", tmp_path / "back")
    restored = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert {name: restored[name] for name in options} == options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_that_were_rounded_since_are_not_trained(tmp_path, base, dtype):
    options = {"segment_length": N, "head_gate_init_value": 1.3, "memory_norm_init_scale": 1.3}
    convert_to_infini(base, tmp_path / "other", **options)
    loaded(tmp_path / "other").to(dtype).save_pretrained(tmp_path / "rounded")
    loaded(tmp_path / "rounded").save_pretrained(tmp_path / "again")
    convert_from_infini(tmp_path / "again", tmp_path / "back")


def test_the_default_dtype_changes_no_conversion(tmp_path, base):
    options = {"segment_length": N, "head_gate_init_value": 1.3, "memory_norm_init_scale": 1.3}
    convert_to_infini(base, tmp_path / "other", **options)
    torch.set_default_dtype(torch.bfloat16)
    try:
        convert_to_infini(base, tmp_path / "default", **options)
    finally:
        torch.set_default_dtype(torch.float32)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("other", "default"))
    assert all(torch.equal(one[name], other[name]) for name in one)


class TestFingerprint:
    def test_is_that_of_the_base_in_any_form(self, tmp_path):
        model = base_model("llama-tied-head_dim")
        model.save_pretrained(tmp_path / "base")
        expected = base_fingerprint(Checkpoint(tmp_path / "base"))
        model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
        shutil.copytree(tmp_path / "base", tmp_path / "head")
        edit_weights(
            tmp_path / "head",
            lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}),
        )
        shutil.copytree(tmp_path / "head", tmp_path / "untied")
        edit_config(tmp_path / "untied", tie_word_embeddings=False)
        for name in ("shards", "head", "untied"):
            assert base_fingerprint(Checkpoint(tmp_path / name)) == expected
            convert_to_infini(tmp_path / name, tmp_path / f"{name}-ours", segment_length=N, **OPTIONS)
            assert base_fingerprint(Checkpoint(tmp_path / f"{name}-ours")) == expected
        for dtype in ("bfloat16", "float64"):
            convert_to_infini(tmp_path / "base", tmp_path / dtype, segment_length=N, dtype=dtype)
            assert base_fingerprint(Checkpoint(tmp_path / dtype)) == expected
            assert (
                json.loads((tmp_path / dtype / "config.json").read_text())["converted_from"]["fingerprint"] == expected
            )
        assert base_fingerprint(model) == base_fingerprint(train(loaded(tmp_path / "head-ours"))) == expected
        file = write_gguf(tmp_path / "base.gguf", model)
        assert base_fingerprint(Checkpoint(file)) == expected

    @pytest.mark.parametrize("part", ["embed_tokens", "layers.1.mlp.up_proj", "layers.0.input_layernorm", "lm_head"])
    def test_is_another_after_training(self, part):
        model = base_model()
        before = base_fingerprint(model)
        with torch.no_grad():
            next(weight for name, weight in model.named_parameters() if part in name)[-1] *= 1.01
        assert base_fingerprint(model) != before

    def test_is_that_of_large_weights(self):
        """Of which some elements are looked at: of the embeddings, some of each row."""
        model = base_model(vocab_size=2000, hidden_size=64, intermediate_size=512)
        before = base_fingerprint(model)
        with torch.no_grad():
            model.model.embed_tokens.weight[1234] *= 1.01
        after = base_fingerprint(model)
        assert after != before
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.add_(1e-3)
        assert base_fingerprint(model) not in (before, after)


def test_a_memory_of_a_folder_fits_the_gguf_file_it_came_from(tmp_path):
    file = write_gguf(tmp_path / "base.gguf", base_model(head_dim=8))
    convert_to_infini(file, tmp_path / "converted", segment_length=N, **OPTIONS)
    model = train(loaded(tmp_path / "converted"))
    save_memory(model, tmp_path / "memory")
    convert_to_infini(file, tmp_path / "again", memory=tmp_path / "memory")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model))
    # And the folder that the file was written from, whose numbers have more digits.
    base_model(head_dim=8, rms_norm_eps=1e-5).save_pretrained(tmp_path / "base")
    file = write_gguf(tmp_path / "eps.gguf", base_model(head_dim=8, rms_norm_eps=1e-5))
    convert_to_infini(file, tmp_path / "eps", segment_length=N)
    save_memory(tmp_path / "eps", tmp_path / "eps-memory")
    convert_to_infini(tmp_path / "base", tmp_path / "of-folder", memory=tmp_path / "eps-memory")


class TestAnotherBase:
    def test_that_was_trained_too_is_refused(self, tmp_path, trained):
        model = loaded(trained)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        model.save_pretrained(tmp_path / "tuned")
        for source in (model, tmp_path / "tuned"):
            with pytest.raises(ValueError, match=r"not those that it was converted from.*trained too"):
                save_memory(source, tmp_path / "memory")
        assert not (tmp_path / "memory").exists()

    def test_is_refused_wherever_a_memory_goes(self, tmp_path, trained, memory):
        other = base_model()
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        other.save_pretrained(tmp_path / "other")
        message = "a memory of a llama with the fingerprint .* means nothing. Take its base"
        with pytest.raises(ValueError, match=message):
            convert_to_infini(tmp_path / "other", tmp_path / "ours", memory=memory)
        assert not (tmp_path / "ours").exists()
        convert_to_infini(tmp_path / "other", tmp_path / "ours", segment_length=N, **OPTIONS)
        before = {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}
        with pytest.raises(ValueError, match=message):
            apply_memory(tmp_path / "ours", memory)
        assert before == {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}
        model = loaded(tmp_path / "ours")
        untouched = logits(model)
        with pytest.raises(ValueError, match=message):
            load_memory(model, memory)
        assert torch.equal(logits(model), untouched)

    def test_of_another_size_is_named_before_its_layers_are(self, tmp_path, memory):
        base_model(num_hidden_layers=1).save_pretrained(tmp_path / "small")
        message = r"a memory of a llama with num_hidden_layers=2; .*small has num_hidden_layers=1"
        with pytest.raises(ValueError, match=message):
            convert_to_infini(tmp_path / "small", tmp_path / "ours", memory=memory)

    def test_is_the_same_in_float16(self, tmp_path, base, trained, memory):
        """In which small weights are others."""
        convert_to_infini(base, tmp_path / "ours", memory=memory, dtype="float16")
        model = loaded(tmp_path / "ours", dtype=torch.float32)
        for name, weight in MemoryWeights.load(memory).weights.items():
            assert torch.equal(model.get_parameter(name), weight)
        # And back: what was trained on it in float16 is the base's.
        save_memory(tmp_path / "ours", tmp_path / "of-float16")
        convert_to_infini(base, tmp_path / "again", memory=tmp_path / "of-float16")
        load_memory(loaded(trained), tmp_path / "of-float16")
        apply_memory(trained, tmp_path / "of-float16")

        half = loaded(trained, dtype=torch.float16)
        message = "means nothing. In float16, small weights are others: .* take it in the base's own dtype, or convert"
        with pytest.raises(ValueError, match=message):
            load_memory(half, memory)
        with pytest.raises(ValueError, match=r"trained too, or are in another dtype \(in float16"):
            save_memory(half, tmp_path / "refused")
        convert_to_infini(base, tmp_path / "half", segment_length=N, dtype="float16", **OPTIONS)
        with pytest.raises(ValueError, match=message):
            apply_memory(tmp_path / "half", memory)

    def test_of_other_fields_is_refused_by_their_name(self, tmp_path, base, memory):
        edit_config(base, rms_norm_eps=1e-3)
        with pytest.raises(ValueError, match=r"with rms_norm_eps=1e-06; .* has rms_norm_eps=0.001"):
            convert_to_infini(base, tmp_path / "ours", memory=memory)

    def test_of_unknown_origin_is_the_one_that_is_there(self, tmp_path, trained):
        """A conversion by an earlier version, and a model from scratch."""
        edit_config(trained, converted_from=None)
        save_memory(trained, tmp_path / "memory")
        load_memory(loaded(trained), tmp_path / "memory")


class TestFields:
    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"segment_length": N + 1}, "segment_length=10 contradicts the memory.*segment_length=9"),
            ({"local_attention": "segment"}, "local_attention='segment' contradicts"),
            ({"use_mem_delta_rule": False}, "use_mem_delta_rule=False contradicts"),
            ({"token_gates": False}, "token_gates=False contradicts"),
            ({"head_gates": [0.0, 0.0]}, "head_gates contradicts the memory"),
        ],
    )
    def test_that_contradict_a_memory_are_refused_by_name(self, tmp_path, base, memory, option, message):
        with pytest.raises(ValueError, match=message):
            convert_to_infini(base, tmp_path / "ours", memory=memory, **option)

    def test_that_repeat_it_are_not(self, tmp_path, base, memory):
        convert_to_infini(base, tmp_path / "ours", memory=memory, segment_length=N, memory_feature_map="exp")
        assert loaded(tmp_path / "ours").config.memory_layers == [1]

    def test_that_say_the_same_in_other_words_are_the_same(self, tmp_path, base):
        for name, layers in (("default", None), ("listed", [0, 1])):
            convert_to_infini(base, tmp_path / name, segment_length=N, memory_layers=layers)
            train(loaded(tmp_path / name)).save_pretrained(tmp_path / f"{name}-trained")
            save_memory(tmp_path / f"{name}-trained", tmp_path / f"{name}-memory")
        for name, other in (("default", "listed"), ("listed", "default")):
            model, memory = loaded(tmp_path / name), tmp_path / f"{other}-memory"
            load_memory(model, memory)
            apply_memory(tmp_path / name, memory)
            convert_to_infini(base, tmp_path / f"{name}-again", memory=memory, memory_layers=[0, 1])
            expected = logits(loaded(tmp_path / f"{other}-trained"))
            for found in (model, loaded(tmp_path / name), loaded(tmp_path / f"{name}-again")):
                assert torch.equal(logits(found), expected)
        with pytest.raises(ValueError, match=r"memory_layers=\[0\] contradicts the memory.*memory_layers=\[0, 1\]"):
            convert_to_infini(base, tmp_path / "no", memory=tmp_path / "default-memory", memory_layers=[0])

    def test_that_no_memory_has_are_refused(self, tmp_path, base):
        with pytest.raises(TypeError, match="no argument memory_laiers"):
            convert_to_infini(base, tmp_path / "ours", segment_length=N, memory_laiers=[1])

    def test_of_a_running_model_must_fit(self, tmp_path, base, memory):
        convert_to_infini(base, tmp_path / "ours", segment_length=N)
        with pytest.raises(ValueError, match=r"use_mem_delta_rule=True, and the model has .*False. Convert the base"):
            load_memory(loaded(tmp_path / "ours"), memory)


class TestOtherModels:
    def test_adapters_are_refused(self, tmp_path, trained):
        adapted = get_peft_model(
            loaded(trained), LoraConfig(target_modules=["q_proj"], modules_to_save=["head_gates"])
        )
        with pytest.raises(ValueError, match=r"adapters of PEFT.*save both"):
            save_memory(adapted, tmp_path / "memory")
        adapted.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="a PEFT adapter, not a model"):
            save_memory(tmp_path / "adapter", tmp_path / "memory")
        torch.nn.init.ones_(adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        merged = adapted.merge_and_unload()
        with pytest.raises(ValueError, match="not those that it was converted from"):
            save_memory(merged, tmp_path / "memory")

    def test_quantized_ones_are_refused(self, tmp_path, trained, memory):
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        model = loaded(trained, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)))
        with pytest.raises(ValueError, match=r"The model is quantized.*apply-memory"):
            load_memory(model, memory)
        with pytest.raises(ValueError, match="The model is quantized"):
            save_memory(model, tmp_path / "new")

    def test_without_a_language_models_head_are_refused(self, trained, memory):
        with pytest.raises(ValueError, match="InfiniModel is no InfiniForCausalLM"):
            load_memory(InfiniModel.from_pretrained(trained), memory)
        with pytest.raises(ValueError, match="LlamaForCausalLM is no InfiniForCausalLM"):
            load_memory(base_model(), memory)

    def test_with_another_head_in_a_folder_are_refused_by_its_name(self, tmp_path, trained, memory):
        InfiniForSequenceClassification.from_pretrained(trained).save_pretrained(tmp_path / "classifier")
        InfiniModel.from_pretrained(trained).save_pretrained(tmp_path / "headless")
        for name, weight in {"classifier": "score.weight", "headless": "embed_tokens.weight"}.items():
            message = rf"{name} holds {weight}, and is no causal language model"
            with pytest.raises(ValueError, match=message):
                apply_memory(tmp_path / name, memory)
            with pytest.raises(ValueError, match=message):
                save_memory(tmp_path / name, tmp_path / "refused")

    def test_a_memory_is_no_checkpoint(self, tmp_path, memory):
        with pytest.raises(FileNotFoundError, match="a memory without its base"):
            Checkpoint(memory)


def edit_field(*path, edit):
    def change(folder):
        file = folder / "memory_config.json"
        fields = content = json.loads(file.read_text())
        for name in path[:-1]:
            content = content[name]
        edit(content, path[-1])
        file.write_text(json.dumps(fields))

    return change


def set_field(*path, value):
    return edit_field(*path, edit=lambda content, name: content.update({name: value}))


def drop_field(*path):
    return edit_field(*path, edit=dict.pop)


def set_weights(change):
    def write(folder):
        weights = load_file(folder / "memory.safetensors")
        change(weights)
        save_file(weights, folder / "memory.safetensors")

    return write


def flip_a_bit(folder):
    file = folder / "memory.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


GATES = "model.layers.1.self_attn.head_gates.weight"

DAMAGES = {
    "no weights": (lambda folder: (folder / "memory.safetensors").unlink(), "there is no memory.safetensors"),
    "no config": (lambda folder: (folder / "memory_config.json").unlink(), "there is no memory_config.json"),
    "a bit": (flip_a_bit, "not what was saved|NaN"),
    "half": (lambda folder: os.truncate(folder / "memory.safetensors", 500), "cannot be read"),
    "empty": (lambda folder: os.truncate(folder / "memory.safetensors", 0), "cannot be read"),
    "header": (
        lambda folder: (folder / "memory.safetensors").write_bytes(b"\xff" * 99),
        "longer than 1,000,000 bytes",
    ),
    "nan": (set_weights(lambda weights: weights[GATES].fill_(float("nan"))), "holds NaN"),
    "shape": (set_weights(lambda weights: weights.update({GATES: torch.ones(5)})), r"shape \(5,\), not \(4,\)"),
    "missing": (set_weights(lambda weights: weights.pop(GATES)), "head_gates.weight is missing"),
    "foreign": (set_weights(lambda weights: weights.update(x=torch.ones(5))), "x is no parameter of this memory"),
    "whole": (set_weights(lambda weights: weights.update({GATES: weights[GATES].int()})), "is of torch.int32"),
    "another": (set_weights(lambda weights: weights[GATES].add_(1)), "is not what was saved with memory_config.json"),
    "version": (set_field("format_version", value=99), "has format version 99; this code reads version 1"),
    "kind": (set_field("memory", value=[]), "must have the fields format_version, memory, base, sha256, each"),
    "key": (set_field("code", value="import os"), "must have the fields"),
    "field": (
        set_field("memory", "memory_colour", value=1),
        "has the field memory_colour, which this version does not",
    ),
    "base": (set_field("base", "auto_map", value={}), "has the field auto_map"),
    "base field": (set_field("base", "config", "vocab_size", value=1), "has the field vocab_size"),
    "no segments": (drop_field("memory", "segment_length"), "does not say the segment_length"),
    "no angles": (drop_field("base", "config", "rope_parameters"), "does not say the rope_parameters"),
    "text": (set_field("base", "name", value=["a"]), "in texts"),
    "layers": (set_field("base", "config", "num_hidden_layers", value=10**9), "describes no model"),
    "heads": (set_field("base", "config", "head_dim", value=10**12), "describes no model"),
    "value": (set_field("memory", "segment_length", value="9"), "describes no model"),
    "rule": (set_field("memory", "memory_layers", value=[7]), "describes no model"),
    "rope": (set_field("base", "config", "rope_parameters", value={"rope_type": []}), "describes no model"),
    "long name": (set_field("memory", "memory_feature_map", value="a" * 100_000), "describes no model"),
    "long list": (set_field("memory", "memory_layers", value=[9] * 100_000), "describes no model"),
    "long rope": (set_field("base", "config", "rope_parameters", "rope_type", value="a" * 100_000), "describes no"),
    "long shape": (set_weights(lambda weights: weights.update({GATES: torch.ones([1] * 9_000)})), "is of the shape"),
    "depth": (lambda folder: (folder / "memory_config.json").write_text("[" * 100_000), "memory_config.json"),
    "size": (lambda folder: (folder / "memory_config.json").write_text(" " * 2_000_000), "longer than 1,048,576"),
    "text file": (lambda folder: (folder / "memory_config.json").write_bytes(b"\xff\xfe"), "no valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_foreign_or_hostile_is_refused_with_a_sentence(memory, damage):
    change, message = DAMAGES[damage]
    change(memory)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        MemoryWeights.load(memory)
    assert len(str(error.value)) < 600


def test_what_a_foreign_file_says_is_shortened_in_messages(tmp_path, base, memory):
    for name in ("name", "model_type"):
        set_field("base", name, value="a" * 100_000)(memory)
    found = MemoryWeights.load(memory)
    found.base["config"]["num_hidden_layers"] = 10_000
    many = MemoryWeights({**found.options, "memory_layers": list(range(10_000))}, found.base, found.weights)
    convert_to_infini(base, tmp_path / "ours", segment_length=N)
    for refused in (
        lambda: apply_memory(tmp_path / "ours", many),
        lambda: convert_to_infini(base, tmp_path / "new", memory=many),
        lambda: convert_to_infini(base, tmp_path / "new", memory=many, memory_layers=[0]),
        lambda: load_memory(loaded(tmp_path / "ours", memory_layers=[0], **SAME), many),
    ):
        with pytest.raises(ValueError, match="memory") as error:
            refused()
        assert len(str(error.value)) < 800


class TestTheBaseStays:
    def test_through_conversion_and_back(self, tmp_path, base, memory):
        convert_to_infini(base, tmp_path / "with", memory=memory)
        convert_to_infini(base, tmp_path / "applied", segment_length=N, max_shard_size="10KB")
        apply_memory(tmp_path / "applied", memory)
        for name in ("with", "applied"):
            # The memory is published by itself: nothing is lost.
            convert_from_infini(tmp_path / name, tmp_path / f"{name}-back")
            assert base_bytes(tmp_path / f"{name}-back") == base_bytes(base)
            train(loaded(tmp_path / name)).save_pretrained(tmp_path / f"{name}-trained")
            with pytest.raises(ValueError, match=r"was trained.*save-memory"):
                convert_from_infini(tmp_path / f"{name}-trained", tmp_path / "lost")
            convert_from_infini(tmp_path / f"{name}-trained", tmp_path / f"{name}-dropped", drop_gates=True)
            assert base_bytes(tmp_path / f"{name}-dropped") == base_bytes(base)

    def test_and_is_what_it_was_without_the_memory(self, tmp_path, base, memory):
        convert_to_infini(base, tmp_path / "without", segment_length=N)
        convert_to_infini(base, tmp_path / "with", memory=memory)
        models = [loaded(tmp_path / name) for name in ("without", "with")]
        for model in models:
            for layer in model.config.layers_with_memory:
                model.model.layers[layer].self_attn.head_gates.weight.data.fill_(1e6)
                model.config.num_memory_slots = 0
                if model.config.token_gates:
                    model.model.layers[layer].self_attn.memory.token_gate.weight.data.zero_()
        assert torch.equal(*map(logits, models))

    def test_in_its_files_while_memories_come_and_go(self, tmp_path, base, memory):
        folder = convert_to_infini(base, tmp_path / "ours", segment_length=N, max_shard_size="10KB")
        stats = {file.name: file.stat() for file in folder.glob("model-0*.safetensors")}
        assert len(stats) > 2
        apply_memory(folder, memory)
        replace_memory(folder, {GATES: torch.ones(4)}, {"num_sink_tokens": 2})
        for name, stat in stats.items():
            assert os.stat(folder / name).st_mtime_ns == stat.st_mtime_ns
        assert {file.name.split("-")[1] for file in folder.glob("*.safetensors") if file.name not in stats} == {
            "memory"
        }


def test_a_conversion_starts_with_what_a_model_starts_with(tmp_path, base, monkeypatch):
    fields = {**OPTIONS, "memory_layers": None}
    convert_to_infini(base, tmp_path / "ours", segment_length=N, head_gate_init_value=1.0, **fields)
    model = loaded(tmp_path / "ours")
    fresh = InfiniForCausalLM(model.config)
    for name, weight in model.named_parameters():
        if is_memory_weight(name):
            expected = fresh.get_parameter(name)
            if "write_" in name and name.endswith("weight"):
                # By chance: of the same spread, and another one in each layer.
                assert 0.5 < weight.std() / expected.std() < 2
                other = name.replace(".0.", ".2.").replace(".1.", ".0.").replace(".2.", ".1.")
                assert not torch.equal(weight, model.get_parameter(other))
            else:
                assert torch.equal(weight, expected)
    # To no one's surprise, the state of the generator is what it was, and those of accelerators are not touched.
    state = torch.get_rng_state()
    seeded = []
    for backend in (torch.cuda, torch.xpu):
        monkeypatch.setattr(backend, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.mps, "manual_seed", seeded.append)
    assert initial_memory_weights(model.config, 0).keys() == {
        name for name, _ in model.named_parameters() if is_memory_weight(name) and ".0." in name
    }
    assert torch.equal(torch.get_rng_state(), state)
    assert not seeded
    convert_from_infini(tmp_path / "ours", tmp_path / "back")
    assert base_bytes(tmp_path / "back") == base_bytes(base)


class TestReplaceMemory:
    def test_keeps_what_it_is_not_given_and_starts_what_is_new(self, tmp_path, trained):
        before = loaded(trained)
        gates = torch.full((4,), 0.25)
        replace_memory(trained, {GATES: gates}, {"memory_layers": None})
        after = loaded(trained)
        assert after.config.memory_layers is None
        assert torch.equal(after.model.layers[1].self_attn.head_gates.weight, gates)
        for name, weight in before.named_parameters():
            if name != GATES:
                assert torch.equal(after.get_parameter(name), weight)
        new = {name: of for name, of in initial_memory_weights(after.config, 0).items() if "slot" not in name}
        assert new
        for name, weight in new.items():
            assert torch.equal(after.get_parameter(name), weight)

    @pytest.mark.parametrize(
        ("weights", "fields", "message"),
        [
            ({"model.layers.0.self_attn.head_gates.weight": torch.ones(4)}, {}, "not a parameter of this memory"),
            ({"model.layers.1.mlp.up_proj.weight": torch.ones(4)}, {}, "not a parameter of this memory"),
            ({GATES: torch.ones(5)}, {}, r"shape \(5,\), not of \(4,\)"),
            ({GATES: torch.full((4,), float("nan"))}, {}, "NaN"),
            ({}, {"hidden_size": 3}, "hidden_size is no field that a memory brings"),
            ({}, {"segment_length": 0}, "segment_length=0 must be at least 1"),
            ({}, {"segment_length": 40}, "must not exceed the 64 positions.*Choose a segment_length of at most"),
            (
                {},
                {"num_memory_slots": 50},
                "must not exceed the 64 positions.*Choose a num_memory_slots of at most 42",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused_and_nothing_changed(self, trained, weights, fields, message):
        before = {file.name: file.read_bytes() for file in trained.iterdir()}
        with pytest.raises(ValueError, match=message):
            replace_memory(trained, weights, fields)
        assert before == {file.name: file.read_bytes() for file in trained.iterdir()}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("shards", ["5GB", "10KB"])
def test_whenever_it_is_killed_the_old_model_or_the_new_one_is_there(
    tmp_path, base, trained, memory, monkeypatch, shards
):
    new = logits(loaded(trained))
    convert_to_infini(base, tmp_path / "start", segment_length=N, max_shard_size=shards)
    train(loaded(tmp_path / "start")).save_pretrained(tmp_path / "old", max_shard_size=shards)
    old = logits(loaded(tmp_path / "old"))
    steps = [0]

    def counted(function):
        def call(*arguments, **options):
            steps[0] -= 1
            if steps[0] == 0:
                raise Killed
            return function(*arguments, **options)

        return call

    for name in ("save_file", "write_index", "write_json", "copy_whole"):
        monkeypatch.setattr(in_place, name, counted(getattr(in_place, name)))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    found = []
    folder = tmp_path / "folder"
    for number in range(1, 100):
        shutil.copytree(tmp_path / "old", folder)
        steps[0] = number
        try:
            apply_memory(folder, memory)
        except Killed:
            steps[0] = 0
            model = loaded(folder)
            found.append(torch.equal(logits(model), new))
            assert found[-1] or torch.equal(logits(model), old)
            assert Checkpoint(folder).shapes.keys() >= {name for name, _ in model.named_parameters()}
            # Who tries again gets there, and nothing is left of the first time.
            apply_memory(folder, memory)
            files = {file.name for file in folder.iterdir() if file.suffix == ".safetensors"}
            index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
            assert files == set(index.values())
            assert not list(folder.glob("model-*.json"))
            assert "transformers_weights" not in (folder / "config.json").read_text()
            assert torch.equal(logits(loaded(folder)), new)
            shutil.rmtree(folder)
        else:
            break
    # First the one, then the other.
    assert found == sorted(found)
    assert {*found} == {False, True}


def test_an_old_or_large_state_is_passed_over(tmp_path, base, memory):
    """Weights that were saved by transformers, with those of the memory among the others, in shards."""
    convert_to_infini(base, tmp_path / "ours", segment_length=N)
    loaded(tmp_path / "ours").save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    before = base_bytes(tmp_path / "saved")
    apply_memory(tmp_path / "saved", memory)
    assert base_bytes(tmp_path / "saved") == before
    for file in (tmp_path / "saved").glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            assert len({is_memory_weight(name) for name in content.keys()}) == 1  # noqa: SIM118


class TestCard:
    def test_says_what_the_memory_belongs_to(self, tmp_path, trained):
        options = {"repo_id": "me/llama-memory", "base_model": "meta/llama", "license": "apache-2.0"}
        save_memory(trained, tmp_path / "memory", training="By transfer. Finds 9 of 10 keys.", **options)
        card = ModelCard.load(tmp_path / "memory" / "README.md")
        assert (card.data.base_model, card.data.license) == ("meta/llama", "apache-2.0")
        assert card.data.to_dict()["base_model_relation"] == "adapter"
        for text in (
            "# llama-memory",
            "Finds 9 of 10 keys.",
            "--memory me/llama-memory",
            "in layers 1 of 2",
            "exponential",
        ):
            assert text in card.text
        assert MemoryWeights.load(tmp_path / "memory").base["name"] == "meta/llama"

    def test_of_another_base_is_refused(self, tmp_path, trained):
        edit_config(trained, converted_from={"model_type": "llama", "name": "meta/llama"})
        with pytest.raises(ValueError, match="converted from meta/llama"):
            save_memory(trained, tmp_path / "memory", base_model="other/llama")

    def test_of_a_conversion_says_that_its_memory_was_trained(self, tmp_path, base, memory):
        convert_to_infini(base, tmp_path / "ours", memory=memory)
        assert "Gates: those of a memory that was applied" in (tmp_path / "ours" / "README.md").read_text()


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


def test_on_the_command_line(tmp_path, base, trained):
    result = command("save-memory", trained, tmp_path / "memory", "--license", "mit")
    assert result.exit_code == 0, result.output
    result = command("to-infini", base, tmp_path / "ours", "--memory", tmp_path / "memory")
    assert result.exit_code == 0, result.output
    assert torch.equal(logits(loaded(tmp_path / "ours")), logits(loaded(trained)))
    overrides = "memory_feature_map=exp,token_gates=true,memory_layers=[0]"
    result = command("to-infini", base, tmp_path / "new", "--segment-length", N, "--config-overrides", overrides)
    assert result.exit_code == 0, result.output
    config = InfiniConfig.from_pretrained(tmp_path / "new")
    assert (config.memory_feature_map, config.token_gates, config.memory_layers) == ("exp", True, [0])
    result = command("apply-memory", tmp_path / "new", tmp_path / "memory")
    assert result.exit_code == 0, result.output
    assert torch.equal(logits(loaded(tmp_path / "new")), logits(loaded(trained)))
    assert command("inspect", tmp_path / "new").exit_code == 0
    for overrides, message in {
        "segment_length=8": "segment_length is set twice",
        "hidden_size=8": "hidden_size is the base's",
        "memory_laiers=[0]": "Did you mean memory_layers?",
    }.items():
        result = command("to-infini", base, tmp_path / "no", "--segment-length", N, "--config-overrides", overrides)
        assert result.exit_code == 1
        assert message in result.output


def test_from_the_hub(tmp_path, base, trained, memory, monkeypatch):
    (memory / "other.bin").write_bytes(b"not to be downloaded")
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add(f"{USER}/llama-memory", memory)
        options = ["to-infini", str(base), str(tmp_path / "ours"), "--memory", f"{USER}/llama-memory"]
        run(tmp_path / "reader", [sys.executable, "-c", INSPECT, *options])
    fetched = {file.name for file in (tmp_path / "reader").glob("cache/hub/models--*/snapshots/*/*")}
    assert fetched == {"memory.safetensors", "memory_config.json"}
    assert torch.equal(logits(loaded(tmp_path / "ours")), logits(loaded(trained)))
    card = (tmp_path / "ours" / "README.md").read_text()
    assert f"a memory that was applied, [{USER}/llama-memory](https://huggingface.co/{USER}/llama-memory)" in card
