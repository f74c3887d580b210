"""What tokens add to a memory, as the memory itself has it."""

import pytest
import torch
from tiny import random_ids, tiny_model

from infini_transformers.evaluation.write_weights import find, write_weights


FIELDS = {
    "plain": {},
    "norm of queries and keys": {"qk_norm": True},
    "memory norm": {"memory_norm_init_scale": 3.0},
    "write gate": {"memory_write_gate": True},
    "all": {"qk_norm": True, "memory_norm_init_scale": 3.0, "memory_write_gate": True},
    "learned map": {"memory_feature_map": "exp"},
    "all with a learned map": {
        "memory_norm_init_scale": 3.0,
        "memory_write_gate": True,
        "memory_feature_map": "exp",
        "token_gates": True,
    },
    "in one layer": {"memory_layers": [1]},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_weights_add_up_to_the_normaliser(fields, monkeypatch):
    monkeypatch.setattr("infini_transformers.evaluation.write_weights.CALL_LENGTH", 7)
    model = tiny_model(**fields)
    segments = 3
    ids = random_ids(1, segments * model.config.segment_length)
    weights = write_weights(model, ids)
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    layers = [layer for layer in cache.layers if layer.has_memory]
    assert weights.shape == (len(layers), model.config.num_key_value_heads, ids.shape[1])
    for layer, of_layer in zip(layers, weights):
        torch.testing.assert_close(of_layer.exp().sum(-1), layer.normaliser[0].sum(-1), rtol=1e-4, atol=1e-5)


def test_finds_a_part_of_a_text():
    ids = torch.tensor([1, 2, 3, 2, 3, 4])
    assert find(ids, torch.tensor([2, 3, 4])) == slice(3, 6)
    with pytest.raises(ValueError, match="do not stand"):
        find(ids, torch.tensor([4, 4]))
