"""What cannot be served is refused by name, before any weight is read."""

import pytest
from tiny import tiny_config
from vllm import EngineArgs

from modeling_infini import InfiniConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration without weights."""
    folder = tmp_path_factory.mktemp("model")
    tiny_config(architectures=["InfiniForCausalLM"]).save_pretrained(folder)
    return str(folder)


def engine_config(folder: str, **settings):
    return EngineArgs(folder, skip_tokenizer_init=True, **{"max_model_len": 64, **settings}).create_engine_config()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative_config",
        ),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"tensor_parallel_size": 4}, "num_key_value_heads=2"),
        ({"runner": "pooling"}, "Pooling"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "kv_transfer_config"),
        ({"kv_offloading_size": 1.0}, "kv_offloading_size"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
        ({"mamba_cache_dtype": "float16"}, "mamba_cache_dtype=float16"),
        ({"mamba_ssm_cache_dtype": "float16"}, "mamba_ssm_cache_dtype=float16"),
    ],
)
def test_what_cannot_be_served_is_refused(folder, settings, name):
    with pytest.raises(ValueError, match=rf"InfiniForCausalLM cannot be served so.*{name}"):
        engine_config(folder, **settings)


@pytest.mark.parametrize("overrides", [{"num_sink_tokens": 30}, {"segment_length": 0}, {"memory_layers": [5]}])
def test_overrides_that_contradict_each_other_are_refused(folder, overrides):
    with pytest.raises(ValueError, match=f"cannot be served so.*{next(iter(overrides))}"):
        engine_config(folder, hf_overrides=overrides)


def test_texts_are_longer_than_the_positions_of_the_base(folder):
    assert InfiniConfig.from_pretrained(folder).max_position_embeddings == 64
    assert engine_config(folder, max_model_len=10_000_000, max_num_seqs=1).model_config.max_model_len == 10_000_000


def test_code_that_comes_with_a_checkpoint_is_not_needed(folder):
    """Of the same class, which other processes have: they get it pickled."""
    for trust_remote_code in (False, True):
        config = engine_config(folder, trust_remote_code=trust_remote_code).model_config.hf_config
        assert type(config) is InfiniConfig
