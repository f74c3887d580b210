"""`generate()` starts each row after the last token that it has read, wherever padding stands in the prompt."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import PAD, all_modes, generate, generator
from tiny import MODES, random_ids, tiny_model
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.streamers import BaseStreamer

from modeling_infini import InfiniCache


RIGHT, INSIDE, BOTH, LEFT = "1111111100000", "1100100111011", "0011101111000", "0000111111111"
SIDES = [RIGHT, INSIDE, BOTH, LEFT]


def padded(*patterns):
    """Prompts with a token for each 1 of the patterns, and padding for each 0."""
    mask = torch.tensor([[int(column) for column in pattern] for pattern in patterns])
    ids = random_ids(*mask.shape, seed=3)
    return ids.masked_fill(mask == 0, PAD), mask


def alone(model, ids, mask, **options):
    """What each row generates without its padding."""
    options = {"use_cache": False, **options}
    return torch.cat([generate(model, row[seen > 0][None], **options)[:, -14:] for row, seen in zip(ids, mask)])


WAYS = {
    "greedy": {},
    "without_cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "repeated": {"num_return_sequences": 2, "num_beams": 2},
    "chunks": {"prefill_chunk_size": 4},
    "one_chunk": {"prefill_chunk_size": 40},
    "compiled": {"compile_config": CompileConfig(backend="eager", mode=None), "prefill_chunk_size": 5},
}


@all_modes
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_padding_anywhere_changes_no_token(fields, options):
    model = generator(fields)
    ids, mask = padded(*SIDES)
    found = generate(model, ids, attention_mask=mask, **options)
    repeats = options.get("num_return_sequences", 1)
    assert torch.equal(found[:, :13], ids.repeat_interleave(repeats, 0))
    asked = {name: value for name, value in options.items() if name in ("num_beams", "num_return_sequences")}
    assert torch.equal(found[:, 13:], alone(model, ids, mask, **asked))
    # Where padding has an id of its own, generate() finds it itself.
    assert torch.equal(generate(model, ids, **options), found)


@all_modes
@settings(max_examples=15)
@given(rows=st.lists(st.lists(st.booleans(), min_size=12, max_size=12).filter(any), min_size=1, max_size=3))
def test_any_padding_gives_what_the_rows_give_alone(fields, rows):
    model = generator(fields)
    ids, mask = padded(*("".join("01"[seen] for seen in row) for row in rows))
    assert torch.equal(generate(model, ids, attention_mask=mask)[:, 12:], alone(model, ids, mask))


@all_modes
def test_samples_are_those_of_left_padding(fields):
    model = generator(fields)
    (right, right_mask), (left, left_mask) = padded("1111111100000"), padded("0000011111111")
    left[left_mask > 0] = right[right_mask > 0]
    found = []
    for ids, mask in ((right, right_mask), (left, left_mask)):
        torch.manual_seed(0)
        found.append(generate(model, ids, attention_mask=mask, do_sample=True, num_return_sequences=3)[:, 13:])
    assert torch.equal(*found)


@all_modes
def test_a_long_padded_prompt_is_read_in_chunks(fields, monkeypatch):
    model = generator(fields)
    ids, mask = padded("1" * 9 + "0" * 55, "1" * 64, "0" * 7 + "1" * 30 + "0" * 27)
    expected = alone(model, ids, mask)
    monkeypatch.setattr("modeling_infini.modeling_infini.PIECE_TOKENS", 10)
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    assert torch.equal(generate(model, ids, attention_mask=mask)[:, 64:], expected)
    assert max(lengths) == 10
    lengths.clear()
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=7)[:, 64:], expected)
    assert max(lengths) == 7


@all_modes
def test_embeddings_and_streamers_take_padding_anywhere(fields):
    class Collect(BaseStreamer):
        tokens: list = []

        def put(self, value):
            self.tokens = [*self.tokens, *value.flatten().tolist()]

        def end(self): ...

    model = generator(fields)
    ids, mask = padded(*SIDES)
    expected = alone(model, ids, mask)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(generate(model, inputs_embeds=embeds, attention_mask=mask), expected)
    assert torch.equal(generate(model, inputs_embeds=embeds, attention_mask=mask, prefill_chunk_size=5), expected)
    streamer = Collect()
    generate(model, ids[:1], attention_mask=mask[:1], streamer=streamer)
    assert streamer.tokens == [*ids[0].tolist(), *expected[0].tolist()]


@all_modes
@pytest.mark.parametrize("pattern", SIDES)
def test_drafts_take_padding_anywhere(fields, pattern):
    model = generator(fields)
    ids, mask = padded(pattern)
    expected = alone(model, ids, mask)
    near = copy.deepcopy(model)
    with torch.no_grad():
        near.lm_head.weight.add_(0.02 * torch.randn(near.lm_head.weight.shape))
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": near}):
        assert torch.equal(generate(model, ids, attention_mask=mask, **options)[:, 13:], expected)


@all_modes
def test_padded_turns_continue_the_memory(fields):
    model = generator(fields)
    ids, mask = padded(*SIDES)
    first = generate(model, ids, attention_mask=mask, return_dict_in_generate=True)
    turn, seen = padded("1100", "1110", "0110", "1111")
    history = torch.cat([first.sequences, turn], 1)
    read = first.past_key_values.get_seq_length()
    whole = torch.cat([mask, torch.ones(4, 14, dtype=torch.long), seen], 1)
    expected = alone(model, history, whole)

    def continued(inputs=None, **options):
        cache = copy.deepcopy(first.past_key_values)
        return generate(model, inputs, past_key_values=cache, **options)[:, -14:]

    new = history[:, read:]
    assert torch.equal(continued(history, attention_mask=whole), expected)
    assert torch.equal(continued(new, attention_mask=whole), expected)
    assert torch.equal(continued(new, attention_mask=whole[:, read:]), expected)
    assert torch.equal(continued(new, attention_mask=whole[:, read:], prefill_chunk_size=2), expected)
    assert torch.equal(continued(history, attention_mask=whole, prefill_chunk_size=2), expected)
    embeds = model.get_input_embeddings()(new)
    assert torch.equal(continued(inputs_embeds=embeds, attention_mask=whole[:, read:]), expected)


@all_modes
def test_outputs_stand_in_the_columns_that_were_given(fields):
    model = generator(fields)
    model.set_attn_implementation("eager")
    ids, mask = padded(*SIDES)
    wanted = dict.fromkeys(
        ("return_dict_in_generate", "output_hidden_states", "output_attentions", "output_logits"), True
    )
    found = generate(model, ids, attention_mask=mask, **wanted)
    for row in range(4):
        seen = mask[row] > 0
        single = generate(model, ids[row : row + 1, seen], **wanted)
        columns = seen.nonzero().squeeze(1)
        for layer in range(2):
            hidden, expected = found.hidden_states[0][layer + 1][row], single.hidden_states[0][layer + 1][0]
            torch.testing.assert_close(hidden[columns], expected, atol=1e-4, rtol=1e-4)
        for step in range(14):
            torch.testing.assert_close(found.logits[step][row], single.logits[step][0], atol=1e-4, rtol=1e-4)
            given = torch.cat([columns, torch.arange(13, 13 + step)])
            weights = found.attentions[step][1][row]
            weights = weights[:, columns] if step == 0 else weights
            torch.testing.assert_close(weights[..., given], single.attentions[step][1][0], atol=1e-4, rtol=1e-4)


def test_a_prompt_without_a_token_is_refused():
    model = generator({})
    ids, mask = padded(RIGHT, "0" * 13)
    for options in ({}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 4}):
        with pytest.raises(ValueError, match="A row of the prompt is all padding"):
            generate(model, ids, attention_mask=mask, **options)


@all_modes
def test_a_large_chunk_is_read_at_once(fields, monkeypatch):
    model, ids = generator(fields), random_ids(2, 33)
    expected = generate(model, ids)
    monkeypatch.setattr("modeling_infini.modeling_infini.PIECE_TOKENS", 10)
    assert torch.equal(generate(model, ids, prefill_chunk_size=20), expected)
    for size in (0, -1):
        with pytest.raises(ValueError, match="must be at least 1"):
            generate(model, ids, prefill_chunk_size=size)


@all_modes
def test_guidance_goes_on_from_the_last_token(fields):
    model = generator(fields)
    (right, right_mask), (left, left_mask) = padded(RIGHT, BOTH), padded(RIGHT, BOTH)
    for row in range(2):
        tokens = right[row][right_mask[row] > 0]
        left[row], left_mask[row] = PAD, 0
        left[row, -len(tokens) :], left_mask[row, -len(tokens) :] = tokens, 1
    for negative in (False, True):
        found = []
        for ids, mask in ((right, right_mask), (left, left_mask)):
            options = {"guidance_scale": 1.5, "attention_mask": mask}
            if negative:
                options |= {"negative_prompt_ids": ids.flip(0), "negative_prompt_attention_mask": mask.flip(0)}
            found.append(generate(model, ids, **options)[:, 13:])
        assert torch.equal(*found)


@pytest.mark.core
@pytest.mark.parametrize("fields", MODES, ids=["segment", "sliding", "sinks"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_generated_belongs_to_the_last_document(fields, use_cache):
    model, ids = tiny_model(**fields), random_ids(2, 14)
    numbers = torch.tensor([[1] * 6 + [2] * 8, [0, 0] + [1] * 4 + [2] * 5 + [3] * 3])
    options = {"do_sample": False, "max_new_tokens": 7, "use_cache": use_cache}
    found = model.generate(ids, attention_mask=numbers, **options)
    for row, start in enumerate((6, 11)):
        alone = model.generate(ids[row : row + 1, start:], **options)
        assert torch.equal(found[row : row + 1, start:], alone)
    cache = InfiniCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=numbers, past_key_values=cache)
    with pytest.raises(ValueError, match="does not cover what the cache has read"):
        model.generate(ids[:, :3], attention_mask=numbers[:, -3:], past_key_values=cache, max_new_tokens=1)
