import json
import math
import re
from dataclasses import fields

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny import EVERY_OPTION, tiny_config, tiny_model
from transformers import AutoConfig

from modeling_infini import InfiniConfig, InfiniForCausalLM, InfiniForTokenClassification


FLOATS = ("head_gate_init_value", "head_gate_scale", "memory_eps", "memory_norm_init_scale")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment_length": 0}, "segment_length=0 must be at least 1"),
        ({"num_sink_tokens": 2}, 'needs local_attention="sliding"'),
        ({"num_memory_slots": 2}, 'num_memory_slots=2 needs local_attention="sliding"'),
        ({"num_memory_slots": -1, "local_attention": "sliding"}, "num_memory_slots=-1 must be at least 0"),
        *(
            ({name: layers, "local_attention": "sliding", "num_memory_slots": 1}, name)
            for name in ("memory_layers", "slot_layers")
            for layers in ([1, 0], [0, 0], [2], [-1], [0.5], "1")
        ),
        ({"slot_layers": [0], "local_attention": "sliding"}, r"slot_layers=\[0\] contradicts num_memory_slots=0"),
        ({"slot_layers": [], "num_memory_slots": 2, "local_attention": "sliding"}, "contradicts num_memory_slots=2"),
        ({"memory_feature_map": "relu"}, "memory_feature_map"),
        ({"num_sink_tokens": 6, "local_attention": "sliding"}, "between 0 and segment_length=5"),
        ({"local_attention": "global"}, "local_attention"),
        ({"memory_eps": 0.0}, "memory_eps=0.0 must be positive"),
        ({"head_gate_scale": -1}, "head_gate_scale=-1 must be positive"),
        *(
            ({name: value}, re.escape(f"{name}={value} is not finite in float32"))
            for name in FLOATS
            for value in (math.nan, math.inf, -math.inf, 1e39, 10**60)
        ),
        *(({name: 1e-50}, f"{name}=1e-50 must be positive, and not below") for name in FLOATS[1:]),
        ({"memory_norm_init_scale": 0.0}, "memory_norm_init_scale=0.0 must be positive"),
        ({"head_gate_init_value": 10, "head_gate_scale": 2e-38}, "not finite in float32 when it is divided"),
        ({"is_causal": False}, "is_causal=False is not supported"),
        *(
            ({name: 0}, f"{name}=0 must be at least 1")
            for name in ("head_dim", "num_attention_heads", "num_key_value_heads")
        ),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be an even number"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "short_factor": [1.0] * 3,
                    "long_factor": [1.0] * 3,
                    "original_max_position_embeddings": 32,
                }
            },
            'rope_type="longrope" is not supported',
        ),
        (
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                "local_attention": "sliding",
                "segment_length": 40,
            },
            "reaches 80 tokens",
        ),
        (
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                "local_attention": "sliding",
                "num_memory_slots": 60,
            },
            "reaches 70 tokens",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**fields)


def test_integers_do_for_floats():
    assert tiny_config(head_gate_init_value=1, head_gate_scale=5, memory_eps=1).head_gate_scale == 5


def test_a_saved_configuration_comes_back(tmp_path):
    config = tiny_config(**EVERY_OPTION)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, InfiniConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()


# What a memory does not depend on: what the weights hold, heads, training, token ids of generate(), names, and
# `attention_bias`, which is in the two biases after their defaults. `max_position_embeddings` is in `rope_parameters`
# where angles depend on it.
NOT_OF_THE_MEMORY = (
    "transformers_version architectures output_hidden_states return_dict dtype chunk_size_feed_forward "
    "is_encoder_decoder id2label label2id problem_type initializer_range use_cache pad_token_id bos_token_id "
    "eos_token_id pretraining_tp tie_word_embeddings attention_dropout max_position_embeddings attention_bias "
    "head_gate_init_value lm_head_bias converted_from vocab_size"
)


def test_each_field_is_of_the_memory_or_not():
    of_the_memory = tiny_config().memory_fields().keys()
    others = set(NOT_OF_THE_MEMORY.split())
    assert of_the_memory & others == set()
    assert of_the_memory | others == {field.name for field in fields(InfiniConfig)} | {"model_type"}


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"qkv_bias": False, "attention_output_bias": False}),
        ({"attention_bias": True}, {"qkv_bias": True, "attention_output_bias": True}),
        ({"attention_bias": True, "qkv_bias": False}, {"attention_output_bias": True}),
        ({"head_dim": None, "hidden_size": 24}, {"head_dim": 6}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"head_gate_scale": 10, "memory_eps": 1}, {"head_gate_scale": 10.0, "memory_eps": 1.0}),
        ({"rope_theta": 10000}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        (
            {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        ),
        (
            {"rope_parameters": YARN},
            {
                "rope_parameters": {
                    **YARN,
                    "beta_fast": 32.0,
                    "beta_slow": 1,
                    "truncate": True,
                    "attention_factor": None,
                }
            },
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}},
            {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}},
        ),
        ({"max_position_embeddings": 64}, {"max_position_embeddings": 128}),
        ({"rope_parameters": {**YARN, "factor": None}, "max_position_embeddings": 64}, {"rope_parameters": YARN}),
    ],
)
def test_memory_fields_are_equal_where_models_are(one, other):
    one, other = tiny_config(**one), tiny_config(**other)
    assert one.memory_fields() == other.memory_fields() == json.loads(json.dumps(other.memory_fields()))
    assert InfiniConfig.from_dict(json.loads(one.to_json_string())).memory_fields() == one.memory_fields()
    one.require_same_memory(other.memory_fields(), "The cache")


@pytest.mark.parametrize("changed", [{"num_sink_tokens": 30}, {"segment_length": 0}, {"memory_layers": [5]}])
def test_fields_that_loading_changes_are_validated(tmp_path, changed):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=next(iter(changed))):
        InfiniForCausalLM.from_pretrained(tmp_path, **changed)
    # What an attention backend cannot give is said by transformers, when it is asked for.
    for kind in (InfiniForCausalLM, InfiniForTokenClassification):
        assert kind.from_pretrained(tmp_path, output_attentions=True, local_attention="sliding").config.is_sliding
        assert kind(tiny_config(output_attentions=True)).config.output_attentions


def test_yarn_without_a_factor_follows_the_positions():
    rope = {"rope_parameters": {**YARN, "factor": None}}
    fields = [tiny_config(**rope, max_position_embeddings=count).memory_fields() for count in (64, 4096)]
    assert [field["rope_parameters"]["factor"] for field in fields] == [2, 128]


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_heads_that_are_rotated_in_part_are_refused(rope_type):
    with pytest.raises(StrictDataclassError, match=r"partial_rotary_factor=0\.5 is not supported"):
        tiny_config(rope_parameters={**YARN, "rope_type": rope_type, "partial_rotary_factor": 0.5})


def test_a_file_of_the_users_own_around_a_checkpoint_is_left_as_it_is(tmp_path):
    (tmp_path / "memory.py").write_text("mine")
    tiny_config().save_pretrained(tmp_path / "checkpoint-5")
    assert (tmp_path / "memory.py").read_text() == "mine"
    assert not (tmp_path / "modeling_infini.py").exists()
    assert (tmp_path / "checkpoint-5" / "modeling_infini.py").is_file()
    tiny_config().save_pretrained(tmp_path / "run" / "checkpoint-5")
    assert (tmp_path / "run" / "modeling_infini.py").is_file()
    with pytest.raises(FileExistsError, match=r"memory\.py would be overwritten"):
        tiny_config().save_pretrained(tmp_path)
