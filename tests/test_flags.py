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
    InfiniPreTrainedModel,
    InfiniTrainer,
)
from modeling_infini.generation_infini import InfiniGenerationMixin
from modeling_infini.training.distillation import DistillationTrainer


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
    # transformers refuses assisted decoding for models that say they are stateful.
    assert not InfiniForCausalLM._is_stateful
    model, ids = tiny_model(), random_ids(1, 9)
    cache = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    assert type(cache) is type(model.new_cache())
    assert all(layer.is_croppable for layer in cache.layers)
    assert not cache.is_compileable


# Methods with a leading underscore that are ours alone. All others stand in for hooks of transformers.
OWN = {
    InfiniGenerationMixin: "_has_soft_prompt _warn_of_bos",
    InfiniPreTrainedModel: "",
    InfiniForCausalLM: "",
    InfiniTrainer: "_backpropagate _check_arguments _check_dataset _equally_long _is_set "
    "_loss_and_outputs _loss_is_a_sum _memory_folder _memory_logs _module _overrides_loss _ready _refuse_unread "
    "_remove_checkpoint _remove_older_checkpoints _report_layers _runs_in_chunks _sum_and_outputs _tokens_per_second "
    "_with_targets",
    DistillationTrainer: "",
}


@pytest.mark.parametrize("kind", OWN)
def test_hooks_of_transformers_have_the_names_that_ours_have(kind):
    """One that is renamed there would never be called, and generation or training would be wrong without a word."""
    foreign = [vars(parent) for parent in kind.__mro__ if not parent.__module__.startswith("modeling_infini")]
    members = {name: getattr(kind, name) for name in vars(kind) if re.match(r"_[a-z]", name)}
    methods = {name for name, value in members.items() if callable(value) or isinstance(value, property)}
    assert {name for name in methods if not any(name in of for of in foreign)} == set(OWN[kind].split())
