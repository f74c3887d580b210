"""torch.export: a decode step as a program of tensors, whose state goes in and comes out."""

import pytest
import torch
from tiny import MODES, random_ids, relative_error, tiny_model

from modeling_infini import InfiniCache


class DecodeStep(torch.nn.Module):
    """One token per row: `(input_ids, state)` to `(logits, state)`, where `state` is an [`InfiniCache`]'s tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, state: dict[str, torch.Tensor]):
        config, keys = self.model.config, state["layers.0.keys"]
        cache = InfiniCache(config)
        cache.early_initialization(keys.shape[0], config.num_key_value_heads, config.head_dim, keys.dtype, keys.device)
        for name, tensor in cache.state_dict().items():
            tensor.copy_(state[name])
        logits = self.model(input_ids, past_key_values=cache).logits
        return logits, cache.state_dict()


def read_start(model, ids):
    cache = InfiniCache(model.config)
    model(ids, past_key_values=cache)
    return cache.state_dict()


OF_THE_MEMORY = {
    "use_mem_delta_rule": True,
    "learned_delta_update": True,
    "memory_norm_init_scale": 1.5,
    "memory_write_gate": True,
}


@pytest.mark.parametrize("fields", [MODES[0], {**MODES[2], **OF_THE_MEMORY}], ids=["segment-linear", "sinks-delta"])
def test_an_exported_step_goes_on_past_the_end_of_segments(fields, tmp_path):
    model = tiny_model(num_hidden_layers=1, **fields)
    ids = random_ids(2, 24)
    with torch.no_grad():
        expected = model(ids).logits
        state = read_start(model, ids[:, :7])
        before = {name: tensor.clone() for name, tensor in state.items()}
        program = torch.export.export(DecodeStep(model), (ids[:, 7:8], state))
        torch.export.save(program, tmp_path / "step.pt2")
        step, logits = torch.export.load(tmp_path / "step.pt2").module(), []
        for token in ids[:, 7:].split(1, 1):
            found, new_state = step(token, state)
            assert {name: t.shape for name, t in new_state.items()} == {name: t.shape for name, t in before.items()}
            logits.append(found)
            state = new_state
    assert relative_error(torch.cat(logits, 1), expected[:, 7:]) < 1e-5
    # The last state is that of a cache that has read the same.
    with torch.no_grad():
        for name, tensor in read_start(model, ids).items():
            if name != "slot_columns":  # columns of the call, which the step counts from its own start
                assert relative_error(state[name].double(), tensor.double()) < 1e-5, name


def test_a_step_leaves_its_inputs_as_they_are_and_takes_any_batch():
    model, ids = tiny_model(num_hidden_layers=1), random_ids(3, 12)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        state = read_start(model, ids[:2, :7])
        shapes = ({0: batch}, {name: {0: batch} for name in state})
        step = torch.export.export(DecodeStep(model), (ids[:2, 7:8], state), dynamic_shapes=shapes).module()
        state = read_start(model, ids[:, :9])
        before = {name: tensor.clone() for name, tensor in state.items()}
        found, _ = step(ids[:, 9:10], state)
        expected = model(ids[:, :10]).logits[:, -1:]
    assert relative_error(found, expected) < 1e-5
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_a_text_of_several_segments_is_exported_at_one_length():
    model, ids = tiny_model(num_hidden_layers=1), random_ids(2, 17)
    with torch.no_grad():
        program = torch.export.export(model, (ids,), {"use_cache": False})
        other = random_ids(2, 17, seed=1)
        found = program.module()(other, use_cache=False).logits
        assert relative_error(found, model(other, use_cache=False).logits) < 1e-5
