import os


# Before vLLM is imported, which reads them once. Engines run in this process, unless a test says otherwise.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from serving import Served
from tiny import EVERY_OPTION, EVERY_OPTION_BUT_SLOTS, tiny_model


torch.set_num_threads(1)
settings.register_profile(
    "engines",
    deadline=None,
    derandomize=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("engines")

MODELS = {
    "linear": {},
    "delta": {"use_mem_delta_rule": True, "qkv_bias": True},
    "sliding": {"local_attention": "sliding", "num_sink_tokens": 2},
    "slots": {"local_attention": "sliding", "num_memory_slots": 3, "memory_layers": [], "slot_layers": [1]},
    "every option": EVERY_OPTION,
    "every option in segments": {**EVERY_OPTION_BUT_SLOTS, "local_attention": "segment", "num_sink_tokens": 0},
    "RoPE scaled, weights tied": {
        "local_attention": "sliding",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        "tie_word_embeddings": True,
        "lm_head_bias": True,
    },
}


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """A function from fields of the configuration and settings of vLLM to a model beside its engine."""

    def serve(fields: dict, **settings) -> Served:
        folder = tmp_path_factory.mktemp("model")
        model = tiny_model(**fields)
        model.save_pretrained(folder)
        return Served(model, str(folder), settings)

    return serve


@pytest.fixture(scope="module", params=MODELS)
def served(request, serve):
    """An engine with pages for three requests, which cuts prompts anywhere."""
    with serve(MODELS[request.param], num_gpu_blocks_override=4, max_num_batched_tokens=7) as served:
        yield served
