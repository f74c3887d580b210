"""Sources that are no checkpoint, or another one than it seems: the message says what they are and what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from base_models import base_model
from hub_server import local_hub
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from infini_transformers.conversion import convert_from_infini, convert_to_infini
from infini_transformers.conversion.inspection import inspect_checkpoint


N = 9
MERGE = r"PEFT adapter, not a model\. Merge it.*merge_and_unload"

# Files of a folder without a checkpoint, and what is said of them.
FOLDERS = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors", "README.md"], MERGE),
    "old adapter": (["adapter_config.json", "adapter_model.bin"], MERGE),
    "adapter's weights": (["adapter_model.safetensors"], MERGE),
    "diffusers": (["model_index.json", "unet/config.json"], "pipeline of diffusers"),
    "FSDP": (["__0_0.distcp", ".metadata"], "FSDP in shards.*accelerate merge-weights"),
    "FSDP of the Trainer": (["pytorch_model_fsdp_0/__0_0.distcp", "trainer_state.json"], "FSDP in shards"),
    "DeepSpeed": (["zero_to_fp32.py", "latest", "global_step9/x.pt"], "DeepSpeed in shards.*zero_to_fp32.py"),
    "Meta": (["consolidated.00.pth", "params.json", "tokenizer.model"], "format of their makers"),
    "ONNX": (["model.onnx"], "exported to ONNX"),
    "TensorFlow": (["tf_model.h5"], "TensorFlow"),
    "training": (
        ["checkpoint-9/config.json", "checkpoint-9/model.safetensors"],
        "Name one of the folders checkpoint-",
    ),
    "cache": (["snapshots/0123/config.json", "refs/main"], "cache of the Hub"),
    "parent": (["llama/config.json", "llama/model.safetensors"], "There is llama/config.json.*Name that folder"),
    "tokenizer": (["tokenizer.json", "tokenizer_config.json"], "tokenizer without a model"),
    "two GGUF files": (["a.gguf", "b.gguf"], r"Name the \.gguf file"),
    "nothing": ([], "no config.json. It is empty"),
}


def make(folder, files):
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_a_checkpoint_says_what_it_is(tmp_path, kind):
    files, message = FOLDERS[kind]
    source = make(tmp_path / "source", files)
    for read in (
        lambda: convert_to_infini(source, tmp_path / "out", segment_length=N),
        lambda: convert_from_infini(source, tmp_path / "out"),
        lambda: inspect_checkpoint(source),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["consolidated.safetensors"], "format of their makers"),
        (["onnx/model.onnx"], "exported to ONNX"),
        (["global_step9/x.pt"], "DeepSpeed"),
        (["model.fp16.safetensors"], "weights of a variant"),
        (["model-00001-of-00002.safetensors"], "shards without the index"),
        (["flax_model.msgpack"], "Flax"),
    ],
)
def test_a_configuration_without_weights_says_what_is_there(tmp_path, files, message):
    source = make(tmp_path / "source", files)
    base_model().config.save_pretrained(source)
    with pytest.raises(FileNotFoundError, match=f"neither model.safetensors nor.*{message}"):
        convert_to_infini(source, tmp_path / "out", segment_length=N)


def test_an_adapter_beside_weights_is_not_lost(tmp_path):
    base_model().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=MERGE):
        convert_to_infini(tmp_path / "source", tmp_path / "out", segment_length=N)


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.00.pth", "pytorch_model.bin", "model.onnx"])
def test_a_file_of_weights_names_its_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"file of weights. Name the folder"):
        convert_to_infini(tmp_path / name, tmp_path / "out", segment_length=N)
    with pytest.raises(FileNotFoundError, match=r"file of weights. Name the folder"):
        inspect_checkpoint(tmp_path / name)


def test_an_infini_checkpoint_is_converted_already(tmp_path):
    tiny_model().save_pretrained(tmp_path / "infini")
    with pytest.raises(ValueError, match=r"Infini-attention checkpoint already.*infini convert-back"):
        convert_to_infini(tmp_path / "infini", tmp_path / "out", segment_length=N)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": "x"}, "rope_parameters='x', which must be a dict"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\], which must be a dict"),
        ({"architectures": "LlamaForCausalLM"}, "which must be a list"),
        ({"auto_map": ["x"]}, "which must be a dict"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_attention_heads": 0}, "config.json holds no configuration of a model"),
        ({"hidden_size": "24"}, "config.json holds no configuration of a model.*hidden_size"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}}, "factor"),
    ],
)
def test_fields_of_another_kind_are_named(tmp_path, fields, message):
    base_model().save_pretrained(tmp_path / "source")
    edit_config(tmp_path / "source", **fields)
    with pytest.raises(ValueError, match=message):
        convert_to_infini(tmp_path / "source", tmp_path / "out", segment_length=N)


LONG = "scale" * 20_000


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": LONG},
        {"architectures": [LONG]},
        {"auto_map": {"AutoModel": LONG}},
        {"rope_parameters": {"rope_theta": LONG}},
        {"rope_scaling": LONG},
        {"model_type": "qwen2", "layer_types": [LONG, LONG]},
        {LONG: 3},
        {"residual_scale": LONG},
    ],
)
def test_what_a_foreign_file_says_is_shortened_in_messages(tmp_path, fields):
    base_model().save_pretrained(tmp_path / "source")
    edit_config(tmp_path / "source", **fields)
    for read in (
        lambda: convert_to_infini(tmp_path / "source", tmp_path / "out", segment_length=N),
        lambda: convert_from_infini(tmp_path / "source", tmp_path / "out"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            read()
        assert len(str(error.value)) < 1000


def test_gguf_files_are_known_by_their_names(tmp_path):
    (tmp_path / "m.GGUF").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"m\.GGUF is incomplete or damaged"):
        convert_to_infini(tmp_path / "m.GGUF", tmp_path / "out", segment_length=N)
    with pytest.raises(FileNotFoundError, match=r"There is no GGUF file .*n\.gguf"):
        convert_to_infini(tmp_path / "n.gguf", tmp_path / "out", segment_length=N)
    base_model().save_pretrained(tmp_path / "folder.gguf")
    convert_to_infini(tmp_path / "folder.gguf", tmp_path / "out", segment_length=N)


@pytest.mark.parametrize("name", ["./missing", "../missing", "~/missing", "/missing", "a/b/c"])
def test_folders_that_are_not_there_are_no_ids(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"There is no folder or file {name}"):
        convert_to_infini(name, tmp_path / "out", segment_length=N)


def test_a_revision_is_for_the_hub(tmp_path):
    base_model().save_pretrained(tmp_path / "source")
    (tmp_path / "m.gguf").write_bytes(b"")
    for source in (tmp_path / "source", tmp_path / "m.gguf"):
        for read in (
            lambda source: convert_to_infini(source, tmp_path / "out", segment_length=N, revision="v1"),
            lambda source: convert_from_infini(source, tmp_path / "out", revision="v1"),
            lambda source: inspect_checkpoint(source, "v1"),
        ):
            with pytest.raises(ValueError, match='revision="v1" is for a model on the Hub'):
                read(source)


CONVERT = """
import sys
from infini_transformers.conversion import convert_to_infini
for name in sys.argv[2:]:
    try:
        print(convert_to_infini(name, sys.argv[1] + "/" + name, segment_length=9))
    except (ValueError, OSError) as error:
        print(str(error).splitlines()[0])
"""


def test_the_hub_is_read_as_a_folder_is(tmp_path, monkeypatch):
    base_model().save_pretrained(tmp_path / "base", max_shard_size="10KB")
    files = {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    single = {name: 2 * weight for name, weight in base_model().state_dict().items()}
    save_file(single, tmp_path / "single.safetensors", {"format": "pt"})
    config = files["config.json"]
    contents = {
        "both": {**files, "model.safetensors": (tmp_path / "single.safetensors").read_bytes()},
        "other": {**files, "config.json": config.replace(b'"llama"', b'"gpt2"')},
        "gguf": {"m.Q4.gguf": b"x", "README.md": b"# A model"},
        "bin": {"config.json": config, "pytorch_model.bin": b"x"},
        "onnx": {"config.json": config, "onnx/model.onnx": b"x"},
        "adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b""},
    }
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for name, content in contents.items():
            hub.add(f"me/{name}", content)
        done = subprocess.run(
            [sys.executable, "-c", CONVERT, str(tmp_path), *(f"me/{name}" for name in contents), "me/none"],
            env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            check=True,
        )
    both, other, gguf, pickle, onnx, adapter, none = done.stdout.splitlines()
    assert torch.equal(load_file(f"{both}/model.safetensors")["lm_head.weight"], single["lm_head.weight"])
    assert 'of type "gpt2"' in other
    # A model that is refused is not downloaded.
    assert not list(tmp_path.glob("hf/hub/models--me--other/snapshots/*/*.safetensors"))
    assert "me/gguf holds no checkpoint: there is no config.json. There is m.Q4.gguf: it holds GGUF files" in gguf
    assert "PyTorch .bin weights only" in pickle
    assert "me/adapter holds a PEFT adapter, not a model. Merge it" in adapter
    assert "--allow-bin" in pickle
    assert "exported to ONNX" in onnx
    assert "me/none is no folder with a checkpoint, no .gguf file and no id of the Hub that can be read" in none


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification: it is no causal"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel: it is no causal"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized weights.*dequantize\(\)"),
        ({"quantization": {"bits": 4}}, "quantized weights"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}, "code of its own.*modeling_own"),
        ({"is_causal": False}, "both directions"),
        ({"attention_scale": 0.5}, "attention_scale=0.5: a llama has no such field"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
        ({"residual_multiplier": 0.2}, "residual_multiplier"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"attn_temperature_tuning": True}, "attn_temperature_tuning"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"sliding_window": 16}, "sliding_window=16"),
        ({"attention_chunk_size": 16}, "attention_chunk_size"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, '"chunked_attention"'),
        ({"layer_types": ["full_attention", "sliding_attention"]}, '"sliding_attention"'),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial rotary"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            "differ between layers",
        ),
        ({"is_encoder_decoder": True}, "an encoder"),
    ],
)
def test_fields_that_change_the_computation_are_refused_by_name(tmp_path, fields, message):
    base_model().save_pretrained(tmp_path / "source")
    edit_config(tmp_path / "source", **fields)
    with pytest.raises(ValueError, match=message):
        convert_to_infini(tmp_path / "source", tmp_path / "out", segment_length=N)
    assert not (tmp_path / "out").exists()


def test_fields_that_ask_for_nothing_pass_in_silence(tmp_path, caplog):
    base_model().save_pretrained(tmp_path / "source")
    neutral = {
        "attention_multiplier": 1.0,
        "attn_logit_softcapping": None,
        "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]},
        "is_causal": True,
        "layer_types": ["full_attention"] * 2,
        "logits_scaling": 1,
        "max_window_layers": 2,
        "num_experts": 0,
        "pretraining_tp": 2,
        "rope_interleaved": False,
        "sliding_window": 4096,
        "temperature": 0.6,
        "use_sliding_window": False,
        "use_qk_norm": False,
    }
    edit_config(tmp_path / "source", **neutral)
    convert_to_infini(tmp_path / "source", tmp_path / "out", segment_length=N)
    assert "no such fields" not in caplog.text


def test_other_unknown_fields_are_carried_over_with_a_warning(tmp_path, caplog):
    base_model().save_pretrained(tmp_path / "source")
    edit_config(tmp_path / "source", is_llama_config=True, unsloth_version="2026.1")
    convert_to_infini(tmp_path / "source", tmp_path / "out", segment_length=N)
    assert "A llama has no such fields; they change nothing: is_llama_config, unsloth_version." in caplog.text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["unsloth_version"] == "2026.1"


def test_a_window_without_a_length_is_refused(tmp_path):
    base_model("qwen2").save_pretrained(tmp_path / "source")
    edit_config(tmp_path / "source", layer_types=["full_attention", "sliding_attention"], use_sliding_window=False)
    with pytest.raises(ValueError, match=r'"sliding_attention".*sliding_window=None'):
        convert_to_infini(tmp_path / "source", tmp_path / "out", segment_length=N)


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", torch.ones(3, dtype=torch.int32), "holds quantized weights"),
        ("model.layers.0.self_attn.q_proj.weight", torch.ones(24, 24, dtype=torch.int8), "stored as torch.int8"),
        (
            "model.layers.0.self_attn.q_proj.weight",
            torch.ones(24, 24).to(torch.float8_e4m3fn),
            "float8_e4m3fn.*quantized",
        ),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(3, 24), "holds a PEFT adapter"),
        ("_orig_mod.lm_head.weight", torch.ones(31, 24), "weights of a wrapped model"),
        ("score.weight", torch.ones(2, 24), "holds a head of another task"),
    ],
)
def test_weights_that_no_model_has_say_what_they_are(tmp_path, name, weight, message):
    base_model().save_pretrained(tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors") | {name: weight}
    save_file(weights, tmp_path / "source" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_to_infini(tmp_path / "source", tmp_path / "out", segment_length=N)


def test_the_way_back_refuses_what_is_no_weight_of_its_model(tmp_path):
    convert = tmp_path / "infini"
    base_model().save_pretrained(tmp_path / "source")
    convert_to_infini(tmp_path / "source", convert, segment_length=N)
    file, name = convert / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(file)
    for weight, message in (
        (weights[name].to(torch.int8), "stored as torch.int8"),
        (torch.ones(12, 24), r"of the shape \(12, 24\), but by its configuration of \(24, 24\)"),
    ):
        save_file(weights | {name: weight}, file)
        with pytest.raises(ValueError, match=message):
            convert_from_infini(convert, tmp_path / "back")
