"""What a command line names: fields of a configuration, models, adapters and tokenizers, there or not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_model

from infini_transformers.evaluation.loading import config_fields, load_model, load_tokenizer, segment_length_of
from modeling_infini import InfiniConfig, InfiniForCausalLM


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ("", {}),
        ("memory_norm_init_scale=3.0", {"memory_norm_init_scale": 3.0}),
        ("memory_norm_init_scale=3,qkv_bias=true", {"memory_norm_init_scale": 3, "qkv_bias": True}),
        (
            "memory_norm_init_scale=null,num_key_value_heads=None",
            {"memory_norm_init_scale": None, "num_key_value_heads": None},
        ),
        (
            "segment_length=8, use_mem_delta_rule=True ,local_attention=sliding",
            {"segment_length": 8, "use_mem_delta_rule": True, "local_attention": "sliding"},
        ),
        ("rms_norm_eps=1e-5,initializer_range=1", {"rms_norm_eps": 1e-5, "initializer_range": 1.0}),
        ("eos_token_id=[1, 2],head_dim=6", {"eos_token_id": [1, 2], "head_dim": 6}),
        (
            'rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},hidden_act="gelu"',
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "hidden_act": "gelu"},
        ),
    ],
)
def test_values_have_the_types_of_their_fields(overrides, fields):
    found = config_fields(overrides)
    assert found == fields
    assert [type(value) for value in found.values()] == [type(value) for value in fields.values()]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("segmnt_length=8", r"no field segmnt_length\. Did you mean segment_length\?"),
        ("rope_theta=1e4", "no field rope_theta"),
        ("segment_length=8.5", "segment_length=8.5 is no value for this field. .* expected int, got float"),
        ("segment_length=true", "segment_length=true is no value .* expected int, got bool"),
        ("use_cache=1", "use_cache=1 is no value .* expected bool, got int"),
        ("qk_norm=yes", "qk_norm=yes is no value .* expected bool"),
        ("local_attention=slidin", r"local_attention=slidin is no value .* one of \('segment', 'sliding'\)"),
        ("memory_eps=", "memory_eps= is no value"),
        ("segment_length=none", "segment_length=none is no value"),
        ("segment_length=8,segment_length=9", "segment_length is set twice"),
        ('{"segment_length": 8}', "field=value,field=value"),
        ("segment_length", "field=value,field=value"),
        ("eos_token_id=[1, 2", "The value of eos_token_id is no JSON"),
        ("eos_token_id=[1, 2]8", "write a comma or nothing"),
    ],
)
def test_what_is_no_field_or_no_value_gets_a_sentence(overrides, message):
    with pytest.raises(ValueError, match=message):
        config_fields(overrides)


def test_every_field_can_be_set_to_its_default():
    config = InfiniConfig()
    for name in ("segment_length", "memory_norm_init_scale", "head_gate_scale", "converted_from", "head_dim", "dtype"):
        value = getattr(config, name)
        assert config_fields(f"{name}={value}") == {name: value}


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    load_model(tmp_path / "tied")
    tiny_model().save_pretrained(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    del weights["model.layers.1.self_attn.head_gates.weight"]
    save_file(weights, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks model\.layers\.1\.self_attn\.head_gates\.weight \(1 weights in all\)"
    ):
        load_model(tmp_path / "whole")


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    for load in (load_model, load_tokenizer, segment_length_of):
        with pytest.raises(FileNotFoundError, match="There is no folder or file /path/to/llama"):
            load("/path/to/llama")
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer that can be loaded.*AutoTokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "no-model").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no-model has no config.json\. It is empty\."):
        segment_length_of(tmp_path / "no-model")
    (tmp_path / "no-model" / "checkpoint-3").mkdir()
    with pytest.raises(FileNotFoundError, match=r"There is checkpoint-3: it holds checkpoints of a training"):
        segment_length_of(tmp_path / "no-model")
    (tmp_path / "no-model" / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(ValueError, match="no-model is an adapter of PEFT that does not name its base"):
        segment_length_of(tmp_path / "no-model")
    (tmp_path / "no-model" / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON file"):
        segment_length_of(tmp_path / "no-model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="my-model is no folder or file, and no id of the Hub that can be read"):
        segment_length_of("my-model")


def test_an_adapter_has_the_segments_of_its_base(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = InfiniForCausalLM.from_pretrained(tmp_path / "base")
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    assert segment_length_of(tmp_path / "adapter") == base.config.segment_length
    found, ids = load_model(tmp_path / "adapter"), random_ids(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, adapter.eval()(ids).logits)
