"""A long call without gradients is read in pieces, and is as one pass: for every head, with and without a cache."""

import pytest
import torch
from tiny import EVERY_OPTION, EVERY_OPTION_BUT_SLOTS, MODES, random_ids, randomize, tiny_config, tiny_model
from torch._dynamo.testing import CompileCounter

from modeling_infini import (
    InfiniCache,
    InfiniForCausalLM,
    InfiniForQuestionAnswering,
    InfiniForSequenceClassification,
    InfiniForTokenClassification,
    InfiniModel,
)


LENGTH = 43
HEADS = [
    InfiniForCausalLM,
    InfiniModel,
    InfiniForSequenceClassification,
    InfiniForTokenClassification,
    InfiniForQuestionAnswering,
]
both_rules = pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
all_modes = pytest.mark.parametrize("fields", MODES, ids=["segment", "sliding", "sinks"])
every_head = pytest.mark.parametrize("head", HEADS)


@pytest.fixture
def short_pieces(monkeypatch):
    """Calls this to let pieces be of two segments."""
    return lambda: monkeypatch.setattr("modeling_infini.modeling_infini.PIECE_TOKENS", 10)


def model_of(head, **fields):
    return randomize(head(tiny_config(pad_token_id=0, num_labels=3, **fields))).double().eval()


def lengths_read(model) -> list[int]:
    """Filled with the number of columns of each call of the first layer, from now on."""
    lengths: list[int] = []
    layers = model.layers if isinstance(model, InfiniModel) else model.model.layers
    layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return lengths


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    ids, columns = random_ids(2, LENGTH).clamp(min=1), torch.arange(LENGTH)
    mask = torch.ones_like(ids)
    if kind in ("padding", "documents"):
        # In one row the first piece is padding alone; in the other, the last one, and what stands in between.
        mask[0, :14] = mask[1, -15:] = mask[1, 6:13] = 0
    if kind == "padding":
        return {"input_ids": ids, "attention_mask": mask}
    if kind == "documents":
        return {"input_ids": ids, "attention_mask": mask * torch.where(columns < 20, 1, 2)}
    if kind == "restarts":
        # One starts where a piece does, one inside of a piece, and one goes over a whole piece.
        return {
            "input_ids": ids,
            "position_ids": torch.stack([columns % 20, columns - torch.where(columns < 17, 0, 17)]),
        }
    return {"input_ids": ids}


def tensors(outputs) -> dict[str, torch.Tensor]:
    return {name: states for name, states in outputs.items() if torch.is_tensor(states)}


@every_head
@both_rules
@all_modes
@pytest.mark.parametrize("kind", ["plain", "padding", "restarts", "documents"])
def test_a_call_in_pieces_is_as_one_pass(head, delta, fields, kind, short_pieces):
    model, inputs = model_of(head, use_mem_delta_rule=delta, **fields), inputs_of(kind)
    lengths = lengths_read(model)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False)
        assert lengths == [LENGTH]
        short_pieces()
        lengths.clear()
        found = model(**inputs, use_cache=False)
    assert lengths == [10, 10, 10, 10, 3]
    assert found.keys() == expected.keys()
    assert not {"past_key_values", "cache"} & found.keys()
    torch.testing.assert_close(tensors(found), tensors(expected), atol=1e-4, rtol=1e-4)


@all_modes
def test_a_loss_and_the_cache_are_those_of_one_pass(fields, short_pieces):
    options = EVERY_OPTION if fields["local_attention"] == "sliding" else EVERY_OPTION_BUT_SLOTS
    every_option = {**options, "num_sink_tokens": 0, **fields}
    model, inputs = (
        model_of(InfiniForCausalLM, **every_option),
        inputs_of("padding"),
    )
    inputs["labels"] = inputs["input_ids"]
    with torch.no_grad():
        expected = model(**inputs)
        short_pieces()
        found = model(**inputs)
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        of_embeds = model(inputs_embeds=embeds, **inputs)
    states = expected.past_key_values.state_dict()
    for outputs in (found, of_embeds):
        torch.testing.assert_close(tensors(outputs), tensors(expected), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(outputs.past_key_values.state_dict(), states, atol=1e-4, rtol=1e-4)


@every_head
def test_what_draws_or_asks_for_all_columns_at_once_is_one_pass(head, short_pieces):
    model, ids = model_of(head), random_ids(2, LENGTH).clamp(min=1)
    lengths = lengths_read(model)
    short_pieces()
    model(ids)
    with torch.no_grad():
        model(ids, output_hidden_states=True)
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        model(ids)
        model.config.output_attentions = False
        # Any module that draws: a second run with gradients would draw otherwise.
        model.train()
        model(ids)
        model.eval().base_model.layers[1].mlp.act_fn.train()
        model(ids, use_cache=False)
    assert lengths == [LENGTH] * 5


@both_rules
def test_who_says_how_many_columns_to_read_is_given_so_many(delta, short_pieces):
    model, ids = model_of(InfiniForCausalLM, use_mem_delta_rule=delta, **MODES[2]), random_ids(2, LENGTH)
    lengths = lengths_read(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        short_pieces()
        for chunk_length in (7, 20, LENGTH):
            lengths.clear()
            found = model(ids, use_cache=False, chunk_length=chunk_length).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert max(lengths) == chunk_length
            assert len(lengths) == -(-LENGTH // chunk_length)


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_compiled_call_is_one_graph_of_any_length(use_cache, short_pieces):
    model, ids = tiny_model(**MODES[2]), random_ids(2, LENGTH)
    counter = CompileCounter()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        short_pieces()
        found = torch.compile(model, backend=counter, fullgraph=True)(ids, use_cache=use_cache).logits
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_pieces_keep_packed_documents_apart(short_pieces):
    model, ids = tiny_model(), random_ids(1, 32)
    # The second document starts where a chunk does; the first one in the middle.
    positions = torch.cat([torch.arange(50, 70), torch.arange(12)]).unsqueeze(0)
    with torch.no_grad():
        expected = model(ids[:, 20:]).logits[:, -3:]
        short_pieces()
        found = model(ids, position_ids=positions, logits_to_keep=3)
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=1e-4)
    assert found.past_key_values.tokens_read.item() == 12


@both_rules
@pytest.mark.parametrize(
    "fields",
    [
        *MODES,
        {"learned_delta_update": True, "qk_norm": True},
        {"memory_norm_init_scale": 2.0, "memory_write_gate": True},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("last_columns", [1, 2, 17, 40])  # with 2, the last part that is only written has one column
def test_what_the_last_layer_leaves_out_of_a_long_prompt_is_not_missed(
    fields, delta, padded, last_columns, short_pieces
):
    model, ids = tiny_model(use_mem_delta_rule=delta, **fields), random_ids(2, 33)
    inputs = {"input_ids": ids}
    if padded:
        inputs["attention_mask"] = (torch.arange(33) >= torch.tensor([[0], [4]])).long()
    whole, in_chunks = InfiniCache(model.config), InfiniCache(model.config)
    with torch.no_grad():
        for cache in (whole, in_chunks):  # the prompt goes on in the middle of a segment
            model(random_ids(2, 3, seed=1), past_key_values=cache)
        expected = model(**inputs, past_key_values=whole).logits[:, -last_columns:]
        short_pieces()
        computed = []
        model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[1]))
        # A hook that changes a layer's output finds a tensor, whatever the layer leaves out.
        model.model.layers[-1].register_forward_hook(lambda _, args, output: output * 1.0)
        found = model(**inputs, past_key_values=in_chunks, logits_to_keep=last_columns).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(in_chunks.state_dict(), whole.state_dict(), atol=1e-4, rtol=1e-4)
    assert sum(computed) == min(last_columns, 33)


def test_columns_to_keep_that_are_none_of_the_call_are_refused(short_pieces):
    short_pieces()
    model, ids = tiny_model().model, random_ids(1, 33)
    with torch.no_grad():
        for columns in ([[-1]], [[33]]):
            with pytest.raises(ValueError, match="columns_to_keep has columns from"):
                model(ids, columns_to_keep=torch.tensor(columns))
        with pytest.raises(ValueError, match="columns_to_keep must be numbers"):
            model(ids, columns_to_keep=torch.ones(1, 33, dtype=torch.bool))


def test_padding_has_the_same_logits_in_a_piece_of_one_column(short_pieces):
    model, ids = tiny_model(), random_ids(2, 31)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        short_pieces()
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_id_that_is_none_leaves_the_cache_as_it_was(short_pieces):
    model, ids = model_of(InfiniForCausalLM), random_ids(1, LENGTH)
    expected = model(ids).logits
    short_pieces()
    cache, wrong = model.new_cache(), ids.clone()
    wrong[0, -1] = model.config.vocab_size
    with torch.no_grad():
        with pytest.raises(IndexError, match="the tokenizer is another model's"):
            model(wrong, past_key_values=cache)
        assert not cache.get_seq_length()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected)
