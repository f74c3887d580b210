"""
torch.export: texts, prompts into a new or a used cache, and decode steps, as programs of tensors whose state goes in
and comes out. A program takes any mask, and one document per row.
"""

import pytest
import torch
from tiny import EVERY_OPTION, MODES, random_ids, relative_error, tiny_model
from versions import as_function

from modeling_infini import InfiniCache


class Call(torch.nn.Module):
    """`(input_ids, state, ...)` to `(logits, state)`, where `state` is an [`InfiniCache`]'s tensors; `None`: empty."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, state=None, attention_mask=None, position_ids=None):
        config, cache = self.model.config, InfiniCache(self.model.config)
        if state is not None:
            keys = state["layers.0.keys"]
            cache.early_initialization(
                keys.shape[0], config.num_key_value_heads, config.head_dim, keys.dtype, keys.device
            )
            for name, tensor in cache.state_dict().items():
                tensor.copy_(state[name])
        logits = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        ).logits
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


ALL = {**EVERY_OPTION, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "fields", [MODES[0], {**MODES[2], **OF_THE_MEMORY}, ALL], ids=["segment-linear", "sinks-delta", "all"]
)
def test_an_exported_step_goes_on_past_the_end_of_segments(fields, tmp_path):
    model = tiny_model(**{"num_hidden_layers": 1, **fields})
    ids = random_ids(2, 24)
    with torch.no_grad():
        expected = model(ids).logits
        state = read_start(model, ids[:, :7])
        before = {name: tensor.clone() for name, tensor in state.items()}
        program = torch.export.export(Call(model), (ids[:, 7:8], state))
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
        step = torch.export.export(Call(model), (ids[:2, 7:8], state), dynamic_shapes=shapes).module()
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


EVERYTHING = [MODES[0], {**MODES[2], **OF_THE_MEMORY, "qk_norm": True}, ALL]
BATCH = torch.export.Dim("batch", min=1, max=64)


def padded_inputs(batch_size, length):
    """Padding at the left, inside and at the right."""
    mask = torch.ones(batch_size, length, dtype=torch.long)
    mask[0, : length // 2], mask[1, length // 3], mask[-1, length - length // 4 :] = 0, 0, 0
    positions = torch.arange(length).expand(batch_size, -1).contiguous()
    return {
        "input_ids": random_ids(batch_size, length, seed=1),
        "attention_mask": mask,
        "position_ids": positions,
    }


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fields", EVERYTHING)
def test_a_text_with_mask_and_position_ids_is_exported(fields, dynamic):
    model, length = tiny_model(**{"num_hidden_layers": 1, **fields}), 17
    inputs = padded_inputs(2, length) | {"attention_mask": torch.ones(2, length, dtype=torch.long)}
    shapes = {name: {0: BATCH} for name in inputs} | {"use_cache": None} if dynamic else None
    with torch.no_grad():
        program = torch.export.export(model, (), inputs | {"use_cache": False}, dynamic_shapes=shapes).module()
        other = padded_inputs(3 if dynamic else 2, length)
        found, expected = (call(**other, use_cache=False).logits for call in (program, model))
        is_token = other["attention_mask"] == 1
        assert relative_error(found[is_token], expected[is_token]) < 1e-5
        packed = torch.cat([torch.arange(9), torch.arange(8)]).expand_as(other["input_ids"]).contiguous()
        with pytest.raises(RuntimeError, match="position_ids must not start again: exported programs take one"):
            program(**other | {"position_ids": packed, "attention_mask": torch.ones_like(packed)}, use_cache=False)
        with pytest.raises(RuntimeError, match="attention_mask must hold 0 and 1: exported programs take one"):
            program(**other | {"attention_mask": 2 * other["attention_mask"]}, use_cache=False)


@pytest.mark.parametrize(("read_before", "dynamic"), [(0, True), (7, True), (7, False)])
@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("fields", EVERYTHING)
def test_calls_with_mask_into_a_new_or_a_used_cache_are_exported(fields, length, read_before, dynamic):
    model = tiny_model(**{"num_hidden_layers": 1, **fields})
    call, start = Call(model), random_ids(3, read_before + 2, seed=3)

    def inputs_of(batch_size, mask_of_start):
        state = call(start[:batch_size], attention_mask=mask_of_start)[1] if read_before else None
        inputs = padded_inputs(batch_size, length)
        inputs["position_ids"] += 100 * bool(read_before)
        return inputs | ({"state": state} if read_before else {})

    with torch.no_grad():
        inputs = inputs_of(2, None)
        shapes = {name: {0: BATCH} for name in inputs}
        if read_before:
            shapes["state"] = {name: {0: BATCH} for name in inputs["state"]}
        program = torch.export.export(call, (), inputs, dynamic_shapes=shapes if dynamic else None).module()
        # Rows at different offsets.
        mask_of_start = torch.ones_like(start[: 3 if dynamic else 2])
        mask_of_start[1, :3] = 0
        inputs = inputs_of(len(mask_of_start), mask_of_start)
        (found, found_state), (expected, expected_state) = program(**inputs), call(**inputs)
        is_token = inputs["attention_mask"] == 1
        assert relative_error(found[is_token], expected[is_token]) < 1e-5
        for name, tensor in expected_state.items():
            if name != "slot_columns":  # columns of the call, which the program counts from its own start
                torch.testing.assert_close(found_state[name], tensor, atol=1e-4, rtol=1e-4)


def test_default_arguments_export_a_prompt_with_the_cache_that_it_leaves():
    model, ids = tiny_model(num_hidden_layers=1, **MODES[2]), random_ids(2, 12)
    inputs = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(12).expand(2, -1).contiguous()}
    with torch.no_grad():
        for kwargs in ({}, inputs, {"use_cache": True}):
            found, expected = torch.export.export(model, (ids,), kwargs).module()(ids, **kwargs), model(ids)
            assert relative_error(found.logits, expected.logits) < 1e-5
            more = [model(ids[:, :3], past_key_values=outputs.past_key_values).logits for outputs in (found, expected)]
            assert relative_error(*more) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_the_exporter_of_transformers_takes_default_arguments_and_caches():
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    model, ids = tiny_model(num_hidden_layers=1, **MODES[2]), random_ids(2, 12)
    exporter, config = exporters.DynamoExporter(), exporters.DynamoConfig(dynamic=False)
    with torch.no_grad():
        expected = model(ids)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        prefill = as_function(exporter.export(model, inputs, config=config))
        assert relative_error(prefill(**inputs).logits, expected.logits) < 1e-5
        # The exporter has told torch how a cache is made of tensors.
        outputs = torch.export.export(model, (ids,)).module()(ids)
        assert relative_error(outputs.logits, expected.logits) < 1e-5
        assert outputs.past_key_values.tokens_read.tolist() == [12, 12]
        inputs = {"input_ids": ids[:, :1], "past_key_values": model(ids).past_key_values}
        step = as_function(exporter.export(model, inputs, config=config))
        found = step(input_ids=ids[:, :1], past_key_values=model(ids).past_key_values).logits
        assert relative_error(found, model(ids[:, :1], past_key_values=expected.past_key_values).logits) < 1e-5
