"""What the model's class and its instances say of themselves is so: other tools believe it."""

import re

import pytest
import torch
from tiny import random_ids, tiny_config, tiny_model

from modeling_infini import (
    InfiniForCausalLM,
    InfiniForQuestionAnswering,
    InfiniForSequenceClassification,
    InfiniForTokenClassification,
    InfiniModel,
)


MODELS = [
    InfiniModel,
    InfiniForCausalLM,
    InfiniForSequenceClassification,
    InfiniForTokenClassification,
    InfiniForQuestionAnswering,
]
KEPT = {
    "": {"head_gates"},
    "norms": {"head_gates", "query_norm", "key_norm"},
    "maps": {"head_gates", "query_map", "key_map"},
}
FIELDS = {"": {}, "norms": {"memory_norm_init_scale": 1.5}, "maps": {"memory_feature_map": "exp", "token_gates": True}}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("option", KEPT)
def test_modules_that_are_kept_in_float32_exist(kind, option, tmp_path):
    model = kind(tiny_config(**FIELDS[option]))
    kept = model._keep_in_fp32_modules_strict
    assert kept == KEPT[option]
    for names in (kept, kind._keep_in_fp32_modules_strict):
        assert all(any(re.search(rf"\b{name}\b", key) for key in model.state_dict()) for name in names)
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, weight in loaded.named_parameters():
        is_kept = any(part in kept for part in name.split("."))
        assert weight.dtype == (torch.float32 if is_kept else torch.bfloat16), name


def test_generate_makes_no_dynamic_cache_and_drafts_are_taken_back():
    assert not InfiniForCausalLM._supports_default_dynamic_cache()
    assert not InfiniForCausalLM.is_backend_compatible()
    # transformers refuses assisted decoding for models that say they are stateful.
    assert not InfiniForCausalLM._is_stateful
    model, ids = tiny_model(), random_ids(1, 9)
    cache = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    assert type(cache) is type(model.new_cache())
    assert all(layer.is_croppable for layer in cache.layers)
    assert not cache.is_compileable
