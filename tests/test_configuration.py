import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny import tiny_config
from transformers import AutoConfig

from modeling_infini import InfiniConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment_length": 0}, "segment_length=0 must be at least 1"),
        ({"num_sink_tokens": 2}, 'needs local_attention="sliding"'),
        ({"num_sink_tokens": 6, "local_attention": "sliding"}, "between 0 and segment_length=5"),
        ({"local_attention": "global"}, "local_attention"),
        ({"memory_eps": 0.0}, "memory_eps=0.0 must be positive"),
        ({"head_gate_scale": -1}, "head_gate_scale=-1 must be positive"),
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
    ],
)
def test_what_has_no_meaning_is_refused_by_name(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**fields)


def test_integers_do_for_floats():
    assert tiny_config(head_gate_init_value=1, head_gate_scale=5, memory_eps=1).head_gate_scale == 5


def test_a_saved_configuration_comes_back(tmp_path):
    config = tiny_config(local_attention="sliding", num_sink_tokens=3, use_mem_delta_rule=True, qkv_bias=True)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, InfiniConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
