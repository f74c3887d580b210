"""P6: a memory is a file, which continues bit for bit in another process, and is refused where it does not fit."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tiny import MODES, random_ids, tiny_config, tiny_model

from modeling_infini import InfiniCache, InfiniConfig, InfiniForCausalLM


def read(model, *lengths):
    cache = InfiniCache(model.config)
    with torch.no_grad():
        for seed, length in enumerate(lengths):
            mask = torch.ones(2, length)
            mask[1, : length // 2] = 0
            model(random_ids(2, length, seed=seed), attention_mask=mask, past_key_values=cache)
    return cache


def continuation(model, cache):
    ids = random_ids(2, 12, seed=5)
    with torch.no_grad():
        first = model(ids[:, :7], past_key_values=cache).logits
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(7, 12)]
    return torch.cat([first, *steps], 1)


CONTINUE = """
import sys
from pathlib import Path
import torch
from test_cache_files import continuation
from modeling_infini import InfiniCache, InfiniForCausalLM
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model = InfiniForCausalLM.from_pretrained(folder / "model", dtype=torch.load(folder / "dtype.pt"))
    cache = InfiniCache.from_pretrained(folder / "memory", model)
    torch.save(continuation(model, cache), folder / "logits.pt")
"""


@pytest.mark.core
def test_another_process_continues_bit_for_bit(tmp_path):
    expected = {}
    for index, (fields, dtype) in enumerate(itertools.product(MODES, (torch.float32, torch.bfloat16))):
        folder = tmp_path / str(index)
        tiny_model(**fields).save_pretrained(folder / "model")
        model = InfiniForCausalLM.from_pretrained(folder / "model", dtype=dtype)
        cache = read(model, 13, 1, 4)
        cache.save_pretrained(folder / "memory")
        torch.save(dtype, folder / "dtype.pt")
        expected[folder] = continuation(model, cache)
    # One process for all: it takes seconds to start.
    tests = Path(__file__).parent
    path = os.pathsep.join((str(tests.parent), str(tests)))
    command = [sys.executable, "-c", CONTINUE, *map(str, expected)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / "logits.pt"), logits), folder


@pytest.mark.core
def test_a_loaded_cache_can_be_forked_and_cropped(tmp_path):
    model = tiny_model(local_attention="sliding", num_sink_tokens=2)
    cache = read(model, 13)
    cache.save_pretrained(tmp_path)
    loaded = InfiniCache.from_pretrained(tmp_path, model.config)
    assert loaded.get_seq_length() == 13
    assert loaded.tokens_read.tolist() == [13, 7]
    assert loaded.state_dict().keys() == cache.state_dict().keys()
    assert all(torch.equal(state, loaded.state_dict()[name]) for name, state in cache.state_dict().items())
    loaded.activate_past_recording()
    with torch.no_grad():
        model(random_ids(2, 3), past_key_values=loaded)
    loaded.crop(-3)
    assert loaded.get_seq_length() == 13


# Another value of each field that a cache must share with its model.
OTHERS = {
    "model_type": "other",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 33,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
    "segment_length": 6,
    "local_attention": "sliding",
    "num_sink_tokens": 2,
    "use_mem_delta_rule": True,
    "learned_delta_update": True,
    "memory_norm_init_scale": 1.5,
    "memory_write_gate": True,
    "memory_eps": 1e-6,
    "head_gate_scale": 5.0,
}


@pytest.mark.core
@pytest.mark.parametrize("field", tiny_config().memory_fields())
def test_a_cache_of_another_model_is_refused_in_memory_and_as_a_file(tmp_path, field):
    class OtherConfig(InfiniConfig):
        pass

    sliding = {"local_attention": "sliding"} if field == "num_sink_tokens" else {}
    model = tiny_model(**sliding)
    other = OtherConfig.from_dict(model.config.to_dict())
    cache = read(model, 9)
    cache.save_pretrained(tmp_path)
    InfiniCache.from_pretrained(tmp_path, other)
    with torch.no_grad():
        model(random_ids(2, 1), past_key_values=InfiniCache(other))
    setattr(other, field, OTHERS[field])
    with pytest.raises(ValueError, match=f"belongs to another model: it was made with {field}=.*has {field}=") as file:
        InfiniCache.from_pretrained(tmp_path, other)
    cache.config, model.model.config = model.config, other
    with torch.no_grad(), pytest.raises(ValueError, match="The cache belongs to another model") as memory:
        model(random_ids(2, 1), past_key_values=cache)
    assert str(file.value) == str(memory.value).replace("The cache", f"The cache in {tmp_path}", 1)


@pytest.mark.parametrize("fields", [{"rope_theta": 5.0}, {"attention_bias": True}])
def test_a_cache_of_other_angles_or_biases_is_refused(tmp_path, fields):
    cache = read(tiny_model(**fields), 9)
    cache.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="belongs to another model: it was made with"):
        tiny_model()(random_ids(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="belongs to another model: it was made with"):
        InfiniCache.from_pretrained(tmp_path, tiny_config())


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.core
def test_what_is_damaged_is_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(FileNotFoundError, match="holds no saved cache"):
        InfiniCache.from_pretrained(tmp_path, model.config)
    with pytest.raises(ValueError, match="The cache is empty"):
        InfiniCache(model.config).save_pretrained(tmp_path)

    def saved():
        read(model, 9).save_pretrained(tmp_path)
        return tmp_path / "infini_cache.json", next(tmp_path.glob("*.safetensors"))

    def refused(message):
        with pytest.raises(ValueError, match=message):
            InfiniCache.from_pretrained(tmp_path, model.config)

    metadata, tensors = saved()
    edit(metadata, format_version=99)
    refused("format version 99; this code reads version 2")
    metadata, tensors = saved()
    edit(metadata, format="something")
    refused("does not describe a cache")
    metadata, tensors = saved()
    metadata.write_text("{")
    refused("is not JSON")
    metadata, tensors = saved()
    edit(metadata, tensor_file="../elsewhere.safetensors")
    refused("must be a file name")
    metadata, tensors = saved()
    edit(metadata, tokens_read=None)
    refused("has no valid tokens_read")
    metadata, tensors = saved()
    edit(metadata, tokens_read=[9])
    refused(r"tokens_read is int64 \(2,\), not int64 \(1,\)")
    metadata, tensors = saved()
    edit(metadata, dtype="int64")
    refused("dtype int64 is none of")
    metadata, tensors = saved()
    payload = bytearray(tensors.read_bytes())
    payload[-1] ^= 1
    tensors.write_bytes(payload)
    refused("is not what was saved")
    metadata, tensors = saved()
    states = load_file(tensors)
    del states["layers.1.memory"]
    save_file(states, tensors)
    refused("is not what was saved")
    metadata, tensors = saved()
    states = load_file(tensors)
    states["layers.0.keys"] = states["layers.0.keys"][:, :1].contiguous()
    payload = save(states)
    other = tmp_path / f"infini_cache-{hashlib.sha256(payload).hexdigest()[:16]}.safetensors"
    other.write_bytes(payload)
    edit(metadata, tensor_file=other.name)
    refused(r"layers.0.keys is float32 \(2, 1, 5, 6\), not float32 \(2, 2, 5, 6\)")
    metadata, tensors = saved()
    tensors.unlink()
    refused("is missing")
    saved()
    assert InfiniCache.from_pretrained(tmp_path, model.config).get_seq_length() == 9


def test_an_interrupted_save_leaves_the_old_cache(tmp_path, monkeypatch):
    model = tiny_model()
    read(model, 9).save_pretrained(tmp_path)
    replace = Path.replace
    for survives in (0, 1):
        calls = []

        def fail(self, target, calls=calls, survives=survives):
            calls.append(target)
            if len(calls) > survives:
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            read(model, 11).save_pretrained(tmp_path)
        monkeypatch.setattr(Path, "replace", replace)
        assert InfiniCache.from_pretrained(tmp_path, model.config).get_seq_length() == 9
    read(model, 12).save_pretrained(tmp_path)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert InfiniCache.from_pretrained(tmp_path, InfiniConfig.from_dict(model.config.to_dict())).get_seq_length() == 12


def test_two_processes_with_one_number_save_into_one_folder(tmp_path, monkeypatch):
    """As on two machines that share a disk."""
    cache = read(tiny_model(), 13)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    saves, fsync = [], os.fsync

    def meet(number):
        fsync(number)
        if not saves:
            saves.append(None)
            cache.save_pretrained(tmp_path)

    monkeypatch.setattr(os, "fsync", meet)
    cache.save_pretrained(tmp_path)
    assert InfiniCache.from_pretrained(tmp_path, tiny_config()).tokens_read.tolist() == cache.tokens_read.tolist()
    assert not list(tmp_path.glob(".*"))
