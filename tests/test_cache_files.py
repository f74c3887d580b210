"""P6: a memory is a file, which continues bit for bit in another process, and is refused where it does not fit."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from tiny import EVERY_OPTION, MODES, random_ids, tiny_config, tiny_model

from modeling_infini import InfiniCache, InfiniConfig, InfiniForCausalLM
from modeling_infini.cache import digest_of


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
torch.set_default_device(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    model = InfiniForCausalLM.from_pretrained(folder / "model", dtype=torch.load(folder / "dtype.pt"))
    cache = InfiniCache.from_pretrained(folder / "memory", model)
    torch.save(continuation(model, cache), folder / "logits.pt")
"""


@pytest.mark.core
def test_another_process_continues_bit_for_bit(tmp_path):
    expected = {}
    for index, (fields, dtype) in enumerate(
        itertools.product([*MODES, EVERY_OPTION], (torch.float32, torch.bfloat16))
    ):
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
    command = [sys.executable, "-c", CONTINUE, str(torch.get_default_device()), *map(str, expected)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / "logits.pt"), logits), folder


@pytest.mark.core
def test_a_loaded_cache_can_be_forked_and_cropped(tmp_path):
    model = tiny_model(local_attention="sliding", num_sink_tokens=2)
    cache = read(model, 13)
    cache.save_pretrained(tmp_path)
    loaded = InfiniCache.from_pretrained(tmp_path, model.config, model.device)
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
    "memory_feature_map": "exp",
    "token_gates": True,
    "memory_layers": [1],
    "num_memory_slots": 3,
    "slot_layers": [1],
    "memory_eps": 1e-6,
    "head_gate_scale": 5.0,
}


@pytest.mark.core
@pytest.mark.parametrize("field", tiny_config().memory_fields())
def test_a_cache_of_another_model_is_refused_in_memory_and_as_a_file(tmp_path, field):
    class OtherConfig(InfiniConfig):
        pass

    sliding = {"local_attention": "sliding"}
    needed = {"num_sink_tokens": sliding, "slot_layers": sliding | {"num_memory_slots": 3}}
    model = tiny_model(**needed.get(field, {}))
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


def parts(file):
    """The metadata and tensors of a file."""
    with safe_open(file, "pt") as content:
        return json.loads(content.metadata()["infini_cache"]), load(file.read_bytes())


def forge(file, fields, tensors):
    """A file as its maker says that it was saved."""
    text = fields if isinstance(fields, str) else json.dumps(fields)
    file.write_bytes(save(tensors, {"infini_cache": text, "sha256": digest_of(text, tensors)}))


def test_a_cache_is_one_file_that_says_what_it_is(tmp_path):
    model = tiny_model()
    cache = read(model, 9)
    cache.save_pretrained(tmp_path)
    file = tmp_path / "infini_cache.safetensors"
    assert list(tmp_path.iterdir()) == [file]
    (tmp_path / "any").touch()
    assert file.stat().st_mode == (tmp_path / "any").stat().st_mode
    fields, tensors = parts(file)
    weights = model.weights_fingerprint()
    assert fields == {"format_version": 4, "model": model.config.memory_fields(), "weights": weights}
    assert tensors.keys() == {*cache.state_dict(), "columns"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"format_version": 99}, "format version 99. This code reads version 4: read the text again"),
        ({"format_version": True}, "format version True"),
        ({"format_version": 4.0}, "must have the fields format_version, model, weights"),
        ({"weights": 1}, "must have the fields"),
        ({"other": 1}, "must have the fields"),
        ({"model": {}}, "belongs to another model"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, edit, message):
    model, file = tiny_model(), tmp_path / "infini_cache.safetensors"
    read(model, 9).save_pretrained(tmp_path)
    fields, tensors = parts(file)
    forge(file, fields | edit, tensors)
    with pytest.raises(ValueError, match=message):
        InfiniCache.from_pretrained(tmp_path, model.config)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layers.1.memory", lambda state: None, r"layers.1.memory is missing, not torch.float32 \(2, 2, 6, 6\)"),
        (
            "layers.0.keys",
            lambda state: state[:, :1],
            r"is torch.float32 \(2, 1, 5, 6\), not torch.float32 \(2, 2, 5, 6\)",
        ),
        ("layers.0.keys", lambda state: state.double(), "is torch.float32 .*, not torch.float64"),
        ("layers.0.keys", lambda state: state.long(), "is torch.int64 .*, not torch.float32"),
        ("layers.0.values", lambda state: state / 0, "layers.0.values holds NaN or infinity"),
        ("tokens_read", lambda state: None, r"is torch.float32 \(2, 2, 5, 6\), not torch.float32 \(1, 2, 5, 6\)"),
        ("tokens_read", lambda state: state[:1], r"is torch.float32 \(2, 2, 5, 6\), not torch.float32 \(1, 2, 5, 6\)"),
        ("tokens_read", lambda state: state[:0], r"not torch.float32 \(1, 2, 5, 6\)"),
        ("tokens_read", lambda state: state + 1, "what it says to have read where cannot be"),
        ("tokens_read", lambda state: state - 10, "cannot be"),
        ("columns", lambda state: state + 2**61, "cannot be"),
        ("slot_columns", lambda state: state + 9, "cannot be"),
        ("slot_columns", lambda state: state - 9, "cannot be"),
        ("x", lambda state: torch.ones(1), r"x is torch.float32 \(1,\), not missing"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, name, change, message):
    model, file = tiny_model(), tmp_path / "infini_cache.safetensors"
    read(model, 9).save_pretrained(tmp_path)
    fields, tensors = parts(file)
    changed = change(tensors.pop(name, None))
    forge(file, fields, tensors if changed is None else tensors | {name: changed.contiguous()})
    with pytest.raises(ValueError, match=message):
        InfiniCache.from_pretrained(tmp_path, model.config)


@pytest.mark.core
def test_what_is_damaged_or_foreign_is_refused(tmp_path):
    model, file = tiny_model(), tmp_path / "infini_cache.safetensors"
    with pytest.raises(FileNotFoundError, match="holds no saved cache"):
        InfiniCache.from_pretrained(tmp_path, model.config)
    with pytest.raises(ValueError, match="The cache is empty"):
        InfiniCache(model.config).save_pretrained(tmp_path)
    forgotten = read(model, 9)
    forgotten.reset()
    with pytest.raises(ValueError, match="The cache is empty"):
        forgotten.save_pretrained(tmp_path)
    read(model, 9).save_pretrained(tmp_path)
    whole = file.read_bytes()
    fields, tensors = parts(file)
    sha256 = digest_of(json.dumps(fields), tensors)
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 29)]
    cut = [whole[:length] for length in (0, 1, 8, 100, len(whole) - 1)]
    foreign = [save(tensors), save(tensors, {"infini_cache": "[1]"}), save(tensors, {"infini_cache": "{}"})]
    no_json = [save(tensors, {"infini_cache": "{"}), save(tensors, {"infini_cache": "[" * 100_000})]
    swapped = tensors | {"layers.0.keys": tensors["layers.1.keys"], "layers.1.keys": tensors["layers.0.keys"]}
    changed = [save(swapped, {"infini_cache": json.dumps(fields), "sha256": sha256})]
    long = [whole + b"0", (10**7).to_bytes(8, "little") + whole[8:]]
    for contents, message in (
        (flipped, "is damaged|is not what was saved|does not describe|has format version|is None"),
        (cut, "is damaged: infini_cache.safetensors cannot be read"),
        (foreign, "does not describe a cache"),
        (no_json, "is damaged: infini_cache.safetensors cannot be read"),
        (changed, "is damaged: infini_cache.safetensors is not what was saved"),
        (long, "cannot be read|is longer than 1,000,000 bytes"),
    ):
        for content in contents:
            file.write_bytes(content)
            with pytest.raises(ValueError, match=message):
                InfiniCache.from_pretrained(tmp_path, model.config)
    file.write_bytes(whole)
    assert InfiniCache.from_pretrained(tmp_path, model.config).get_seq_length() == 9


def test_an_interrupted_save_leaves_the_old_cache(tmp_path, monkeypatch):
    model = tiny_model()
    read(model, 9).save_pretrained(tmp_path)

    def fail(*args):
        raise KeyboardInterrupt

    for owner, name in ((os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(KeyboardInterrupt):
                read(model, 11).save_pretrained(tmp_path)
        assert InfiniCache.from_pretrained(tmp_path, model.config).get_seq_length() == 9
        assert len(list(tmp_path.iterdir())) == 1
    read(model, 12).save_pretrained(tmp_path)
    assert InfiniCache.from_pretrained(tmp_path, InfiniConfig.from_dict(model.config.to_dict())).get_seq_length() == 12


def test_a_cache_of_an_earlier_format_is_refused_and_left_alone(tmp_path):
    model = tiny_model()
    (tmp_path / "infini_cache.json").write_text('{"format": "infini_cache", "format_version": 2}')
    save_file({"tokens_read": torch.ones(1)}, tmp_path / "infini_cache-0123456789abcdef.safetensors")
    with pytest.raises(
        ValueError, match=r"has an earlier format, of several files.*read the text again with the model"
    ):
        InfiniCache.from_pretrained(tmp_path, model.config)
    # It may be anybody's copy, by its name.
    read(model, 9).save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert InfiniCache.from_pretrained(tmp_path, model.config).get_seq_length() == 9


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
