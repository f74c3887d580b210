"""Loading: big-model placement, shards, dtypes, attention backends and renamed weights."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import load_file, save_file
from tiny import MODES, random_ids, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from modeling_infini import InfiniCache, InfiniForCausalLM


IDS = random_ids(2, 17)
SINKS = MODES[2]
RENAMED = {r"^backbone\.blocks": "model.layers", r"\.attn\.": ".self_attn."}
MODULES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(**SINKS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def generated(model, **options) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=12, do_sample=False, **options)


def assert_same(model, plain) -> None:
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert torch.equal(generated(model), generated(plain))


def on_meta(model) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.device.type == "meta"]


DEVICE_MAPS = {
    "cpu": ("cpu", {}, 0),
    "auto": ("auto", {}, 0),
    # Room for the embeddings alone: the rest is left on the disk.
    "auto-with-little-memory": ("auto", {"max_memory": {"cpu": 20_000}}, 22),
    "dict": (dict.fromkeys(MODULES, "cpu"), {}, 0),
    "dict-with-disk": ({**dict.fromkeys(MODULES, "cpu"), "model.layers.1": "disk", "lm_head": "disk"}, {}, 11),
    "all-on-disk": ({"": "disk"}, {}, 23),
}


@pytest.mark.parametrize("trust_remote_code", [False, True])
@pytest.mark.parametrize(("device_map", "options", "offloaded"), DEVICE_MAPS.values(), ids=DEVICE_MAPS)
def test_wherever_the_weights_are_the_answers_are_the_same(
    tmp_path, folder, plain, device_map, options, offloaded, trust_remote_code
):
    options = {**options, "offload_folder": str(tmp_path), "trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, **options)
    assert len(on_meta(model)) == offloaded
    assert_same(model, plain)
    assert torch.equal(generated(model, num_beams=3), generated(plain, num_beams=3))


def test_weights_in_bfloat16_are_offloaded_with_gates_and_norms_in_float32(tmp_path):
    tiny_model(**SINKS, memory_norm_init_scale=1.5).save_pretrained(tmp_path / "model")
    load = partial(AutoModelForCausalLM.from_pretrained, tmp_path / "model", dtype=torch.bfloat16)
    plain = load()
    model = load(device_map={"": "disk"}, offload_folder=str(tmp_path / "offloaded"))
    assert len(on_meta(model)) == len(list(model.parameters()))
    assert_same(model, plain)
    for loaded in (model, plain):
        exact = [p.dtype for name, p in loaded.named_parameters() if "head_gates" in name or "memory." in name]
        assert exact == [torch.float32] * 3 * model.config.num_hidden_layers


def test_an_offloaded_model_is_saved_whole(tmp_path, folder, plain):
    device_map, options, _ = DEVICE_MAPS["dict-with-disk"]
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path, **options)
    model.save_pretrained(tmp_path / "saved")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), plain)


def test_accelerate_places_the_model(tmp_path, folder, plain):
    execution = {"execution_device": torch.device("cpu")}
    assert_same(cpu_offload(AutoModelForCausalLM.from_pretrained(folder), **execution), plain)
    assert_same(disk_offload(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "all"), **execution), plain)
    with init_empty_weights():
        empty = InfiniForCausalLM(tiny_config(**SINKS)).eval()
    device_map = {**dict.fromkeys(MODULES, "cpu"), "model.layers.0": "disk"}
    assert_same(load_checkpoint_and_dispatch(empty, folder, device_map, offload_folder=tmp_path / "some"), plain)


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_shards_are_indexed_and_read_back(tmp_path, plain, trust_remote_code):
    plain.save_pretrained(tmp_path, max_shard_size="5KB")
    shards = sorted(file.name for file in tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 5
    assert not (tmp_path / "model.safetensors").exists()
    assert sorted(set(index["weight_map"].values())) == shards
    assert set(index["weight_map"]) == set(plain.state_dict())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in plain.state_dict().values())
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust_remote_code), plain)
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "off"
    )
    assert_same(offloaded, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16", torch.float64])
def test_the_dtype_is_that_of_all_but_gates_and_memory(folder, plain, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    wide = torch.float64 if expected == torch.float64 else torch.float32
    for name, weight in model.named_parameters():
        assert weight.dtype == (wide if "head_gates" in name else expected), name
    with torch.no_grad():
        outputs = model(IDS, use_cache=True)
        difference = (outputs.logits - plain(IDS).logits).abs().max().item()
    assert outputs.past_key_values.layers[0].memory.dtype == wide
    assert difference < {torch.bfloat16: 1.0, torch.float16: 0.2, torch.float64: 1e-4}[expected]
    assert generated(model).shape == generated(plain).shape


def test_the_dtype_auto_is_that_of_the_checkpoint(tmp_path, folder):
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.head_gates.weight.dtype == torch.float32


def test_attention_backends_are_chosen_at_loading_and_later(folder, plain):
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    sdpa = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    assert_same(sdpa, plain)
    with torch.no_grad():
        torch.testing.assert_close(eager(IDS).logits, plain(IDS).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(generated(eager), generated(plain))
    sdpa.set_attn_implementation("eager")
    assert sdpa(IDS, output_attentions=True).attentions[0].shape == (2, 4, 17, 17)
    sdpa.set_attn_implementation("sdpa")
    assert_same(sdpa, plain)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("flash_attention_2", ImportError, "the package for FlashAttention2 doesn't seem to be installed"),
        ("flash_attention_3", ImportError, "the package for FlashAttention3 doesn't seem to be installed"),
        ("nonsense", ValueError, '"nonsense"` is not supported'),
    ],
)
def test_attention_backends_that_are_not_here_say_so(folder, name, error, message):
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)


@pytest.fixture
def renamed(tmp_path, plain):
    plain.save_pretrained(tmp_path / "renamed")
    file = tmp_path / "renamed" / "model.safetensors"
    weights = {
        name.replace("model.layers", "backbone.blocks").replace("self_attn", "attn"): weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    return tmp_path / "renamed"


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_renamed_weights_are_found_by_a_key_mapping(tmp_path, renamed, plain, trust_remote_code):
    model = AutoModelForCausalLM.from_pretrained(renamed, key_mapping=RENAMED, trust_remote_code=trust_remote_code)
    assert_same(model, plain)
    # transformers writes the names that it read, so that the copy needs the mapping too, ...
    model.save_pretrained(tmp_path / "as-read")
    assert set(load_file(tmp_path / "as-read" / "model.safetensors")) == set(load_file(renamed / "model.safetensors"))
    # ... unless it is told otherwise.
    model.save_pretrained(tmp_path / "as-ours", save_original_format=False)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "as-ours"), plain)


def test_a_memory_is_loaded_to_where_each_layer_computes(tmp_path, folder, plain):
    with torch.no_grad():
        expected = plain(IDS).logits[:, -3:]
        plain(IDS[:, :-3], use_cache=True).past_key_values.save_pretrained(tmp_path / "memory")
    for places in ({"": "disk"}, {**dict.fromkeys(MODULES, "cpu"), "model.embed_tokens": "disk"}):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "off")
        assert model.device.type == "meta"
        cache = InfiniCache.from_pretrained(tmp_path / "memory", model)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS[:, -3:], past_key_values=cache).logits, expected)
    plain.model.layers[1]._hf_hook = SimpleNamespace(execution_device="meta")
    try:
        cache = InfiniCache.from_pretrained(tmp_path / "memory", plain)
    finally:
        del plain.model.layers[1]._hf_hook
    assert [layer.keys.device.type for layer in cache.layers] == ["cpu", "meta"]
    assert cache.tokens_read.tolist() == [14, 14]
