"""P1: up to a segment, the logits equal those of the base model, whatever the gates."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import config_fields, random_ids, randomize, tiny_config
from transformers import LlamaConfig, LlamaForCausalLM

from infini_transformers.conversion.checkpoints import is_memory_weight
from modeling_infini import InfiniCache, InfiniForCausalLM


# What a Llama has not.
LLAMA = {
    "qk_norm": False,
    "learned_delta_update": False,
    "qkv_bias": None,
    "attention_output_bias": None,
    "lm_head_bias": False,
}


def llama_and_ours(dtype=torch.float32, rope_parameters=None, **fields):
    config = tiny_config(**fields, rope_parameters=rope_parameters)
    shared = {name: getattr(config, name) for name in LlamaConfig().to_dict() if hasattr(config, name)}
    shared.pop("model_type")
    llama = randomize(LlamaForCausalLM(LlamaConfig(**shared))).to(dtype).eval()
    ours = InfiniForCausalLM(config).to(dtype).eval()
    missing, unexpected = ours.load_state_dict(llama.state_dict(), strict=False)
    assert not unexpected
    assert all(map(is_memory_weight, missing))
    return llama, ours


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
def test_short_inputs_give_the_base_models_logits(data, dtype):
    fields = data.draw(config_fields()) | LLAMA | {"head_gate_init_value": data.draw(st.floats(-9, 9))}
    llama, ours = llama_and_ours(dtype, **fields)
    ids = random_ids(2, data.draw(st.integers(1, fields["segment_length"])))
    with torch.no_grad():
        expected = llama(ids).logits
        assert torch.equal(ours(ids, use_cache=False).logits, expected)
        assert torch.equal(ours(ids).logits, expected)


@pytest.mark.core
@given(data=st.data())
def test_left_padded_short_inputs_give_the_base_models_logits(data):
    fields = data.draw(config_fields(min_segment_length=2)) | LLAMA
    llama, ours = llama_and_ours(**fields)
    ids = random_ids(2, fields["segment_length"])
    mask = torch.ones_like(ids)
    mask[0, : data.draw(st.integers(1, fields["segment_length"] - 1))] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = llama(ids, attention_mask=mask, position_ids=positions).logits
        found = ours(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


ROPE = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("local_attention", ["segment", "sliding"])
@pytest.mark.parametrize("rope_type", ROPE)
def test_scaled_rope_is_that_of_a_sequence_of_a_segments_length(rope_type, local_attention):
    rope = {"rope_type": rope_type, "rope_theta": 100.0, **ROPE[rope_type]}
    llama, ours = llama_and_ours(rope_parameters=rope, segment_length=24, local_attention=local_attention)
    ids = random_ids(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, llama(ids).logits, atol=1e-5, rtol=1e-5)
        cache = InfiniCache(ours.config)
        steps = torch.cat([ours(ids[:, t : t + 1], past_key_values=cache).logits for t in range(24)], 1)
        torch.testing.assert_close(steps, llama(ids).logits, atol=1e-4, rtol=1e-4)
