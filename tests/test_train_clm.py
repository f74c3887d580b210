"""What `examples/train_clm.py` refuses; that it trains is tested on several processes."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_clm


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank": 4}, "--lora_rank adapts a checkpoint"),
        ({"model": "converted", "config_overrides": "segment_length=8"}, "a checkpoint has its own configuration"),
    ],
)
def test_options_that_have_no_effect_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        train_clm.ModelArguments(**fields)


def test_fields_of_a_new_model_have_their_types():
    arguments = train_clm.ModelArguments(
        config_overrides="segment_length=8,use_mem_delta_rule=true,local_attention=sliding"
    )
    assert arguments.config_fields() == {
        "segment_length": 8,
        "use_mem_delta_rule": True,
        "local_attention": "sliding",
    }
