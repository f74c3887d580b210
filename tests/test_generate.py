"""Every path of `generate()` gives, token for token, what it gives with `use_cache=False`."""

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny import MODES, VOCABULARY, random_ids, tiny_config, tiny_model
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from modeling_infini import InfiniCache, InfiniForSequenceClassification


PAD = VOCABULARY  # a token of its own and never generated, so that no text is taken for padding

both_rules = pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
all_modes = pytest.mark.parametrize("fields", MODES, ids=["segment", "sliding", "sinks"])


def generator(fields, delta=False, seed=0):
    model = tiny_model(seed=seed, use_mem_delta_rule=delta, vocab_size=VOCABULARY + 1, **fields)
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [PAD]
    # Rolled back tokens must fit into what a cache of such short segments records.
    model.generation_config.num_assistant_tokens = 3
    model.generation_config.num_assistant_tokens_schedule = "constant"
    return model


def generate(model, ids=None, **options):
    return model.generate(ids, **{"max_new_tokens": 14, "do_sample": False, **options})


def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"attention_mask": mask}


OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 2},
    "beam_sampling": {"num_beams": 2, "do_sample": True},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "prefill_in_chunks": {"prefill_chunk_size": 4},
}


@both_rules
@all_modes
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_cache_changes_no_token(fields, delta, padded, options):
    model, ids = generator(fields, delta), random_ids(2, 13)
    options = options | (left_padded(ids) if padded else {})
    found = []
    for use_cache in (False, True):
        torch.manual_seed(0)
        chunk = {} if use_cache else {"prefill_chunk_size": None}
        found.append(generate(model, ids, **{**options, **chunk}, use_cache=use_cache))
    assert torch.equal(*found)


@pytest.mark.core
@both_rules
@all_modes
def test_a_left_padded_row_generates_what_it_does_alone(fields, delta):
    model, ids = generator(fields, delta), random_ids(2, 13)
    together = generate(model, ids, **left_padded(ids))
    assert torch.equal(together[1, 4:], generate(model, ids[1:, 4:])[0])


@pytest.mark.core
@both_rules
@all_modes
def test_prompt_lookup_and_assisted_decoding_change_no_token(fields, delta):
    model = generator(fields, delta)
    ids = random_ids(1, 6).repeat(1, 3)
    expected = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), expected)
    other = generator(fields, delta, seed=5)
    assert torch.equal(generate(model, ids, assistant_model=other), expected)
    # A good assistant: most of what it drafts is kept.
    near = copy.deepcopy(model)
    with torch.no_grad():
        near.lm_head.weight.add_(0.02 * torch.randn(near.lm_head.weight.shape))
    assert torch.equal(generate(model, ids, assistant_model=near), expected)
    # No token that the target generates is padding to the assistant.
    for pad_token_id in expected[0, 18:].unique().tolist():
        model.generation_config.pad_token_id = near.generation_config.pad_token_id = pad_token_id
        whole = torch.ones_like(ids)
        assert torch.equal(generate(model, ids, attention_mask=whole, assistant_model=near), expected)
    fields = {name: getattr(model.config, name) for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    llama = LlamaForCausalLM(LlamaConfig(intermediate_size=8, num_hidden_layers=1, **fields)).eval()
    llama.generation_config.update(num_assistant_tokens=3, num_assistant_tokens_schedule="constant")
    assert torch.equal(generate(model, ids, assistant_model=llama), expected)


@pytest.mark.core
@both_rules
@all_modes
def test_turns_continue_the_memory(fields, delta):
    model, ids = generator(fields, delta), random_ids(2, 13)
    first = generate(model, ids, return_dict_in_generate=True, **left_padded(ids))
    turn = random_ids(2, 4, seed=9)
    history = torch.cat([first.sequences, turn], 1)
    mask = torch.cat([left_padded(ids)["attention_mask"], torch.ones(2, 18, dtype=torch.long)], 1)
    expected = generate(model, history, attention_mask=mask, use_cache=False)[:, history.shape[1] :]

    def continued(inputs=None, **options):
        cache = copy.deepcopy(first.past_key_values)
        return generate(model, inputs, past_key_values=cache, **options)[:, -14:]

    new = history[:, first.past_key_values.get_seq_length() :]
    assert torch.equal(continued(history, attention_mask=mask), expected)
    assert torch.equal(continued(new), expected)
    assert torch.equal(continued(new, attention_mask=torch.ones_like(new)), expected)
    assert torch.equal(continued(new, attention_mask=mask), expected)
    assert torch.equal(continued(new, prefill_chunk_size=2), expected)
    assert torch.equal(continued(history, attention_mask=mask, prefill_chunk_size=2), expected)
    assert torch.equal(continued(inputs_embeds=model.get_input_embeddings()(new)), expected)


@both_rules
@all_modes
def test_rows_that_have_ended_read_no_filler(fields, delta):
    model, ids = generator(fields, delta), random_ids(3, 7)
    plain = generate(model, ids)
    eos = plain[0, 9].item()
    first = generate(model, ids, eos_token_id=eos, return_dict_in_generate=True)
    is_new = torch.arange(first.sequences.shape[1]) >= 7
    ended = ((first.sequences == eos) & is_new).int().cumsum(1)
    mask = torch.cat([torch.ones(3, 1), (ended == 0).float()], 1)[:, :-1].long()  # up to and with the first eos
    assert mask.sum(1).min() < mask.sum(1).max()
    read = first.past_key_values.get_seq_length()
    assert first.past_key_values.tokens_read.tolist() == mask[:, :read].sum(1).tolist()
    history = torch.cat([first.sequences, random_ids(3, 4, seed=8)], 1)
    mask = torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], 1)
    expected = generate(model, history, attention_mask=mask, use_cache=False)
    found = generate(model, history, attention_mask=mask, past_key_values=first.past_key_values)
    assert torch.equal(found, expected)


class EndsRow(StoppingCriteria):
    """Ends one row at a length, as stop strings do."""

    def __call__(self, input_ids, scores, **kwargs):
        return (torch.arange(len(input_ids)) == 1) & (input_ids.shape[1] >= 10)


@all_modes
def test_rows_that_other_criteria_have_ended_read_no_filler(fields):
    model, ids = generator(fields), random_ids(3, 7)
    options = {"stopping_criteria": StoppingCriteriaList([EndsRow()]), "return_dict_in_generate": True}
    unused = sorted(set(range(31)) - set(generate(model, ids).flatten().tolist()))[0]
    first = generate(model, ids, eos_token_id=unused, **options)
    read = first.past_key_values.get_seq_length()
    assert first.past_key_values.tokens_read.tolist() == [read, 10, read]
    alone = model.new_cache()
    with torch.no_grad():
        model(first.sequences[1:2, :10], past_key_values=alone)
    first.past_key_values.batch_select_indices(torch.tensor([1]))
    new = random_ids(1, 4, seed=8)
    with torch.no_grad():
        found, expected = (model(new, past_key_values=cache).logits for cache in (first.past_key_values, alone))
    torch.testing.assert_close(found, expected)
    # Without EOS, transformers goes on with all rows.
    whole = generate(model, ids, eos_token_id=None, **options)
    assert whole.past_key_values.tokens_read.unique().numel() == 1


@all_modes
def test_assisted_decoding_continues_the_memory(fields):
    model, ids = generator(fields), random_ids(1, 13)
    first = generate(model, ids, return_dict_in_generate=True)
    new = torch.cat([first.sequences[:, -1:], random_ids(1, 4, seed=9)], 1)
    expected = generate(model, new, past_key_values=copy.deepcopy(first.past_key_values))
    found = generate(model, new, past_key_values=first.past_key_values, prompt_lookup_num_tokens=2)
    assert torch.equal(found, expected)


@pytest.mark.core
@all_modes
def test_beams_continue_a_repeated_memory(fields):
    model, ids = generator(fields), random_ids(1, 13)
    first = generate(model, ids, return_dict_in_generate=True)
    new = torch.cat([first.sequences[:, -1:], random_ids(1, 4, seed=9)], 1)
    history = torch.cat([first.sequences[:, :-1], new], 1)
    expected = generate(model, history, num_beams=3, use_cache=False)[:, history.shape[1] :]
    cache = first.past_key_values
    with pytest.raises(ValueError, match="batch_repeat_interleave"):
        generate(model, new, num_beams=3, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    assert torch.equal(generate(model, new, num_beams=3, past_key_values=cache)[:, new.shape[1] :], expected)


@all_modes
def test_embeddings_do_for_ids(fields):
    model, ids = generator(fields), random_ids(2, 13)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(generate(model, inputs_embeds=embeds), generate(model, ids)[:, 13:])


@all_modes
def test_outputs_of_every_kind_have_their_shapes(fields):
    model, ids = generator(fields), random_ids(2, 13)
    model.set_attn_implementation("eager")
    wanted = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
    outputs = generate(model, ids, return_dict_in_generate=True, **dict.fromkeys(wanted, True))
    assert isinstance(outputs.past_key_values, InfiniCache)
    assert len(outputs.scores) == len(outputs.logits) == 14
    for step, (attentions, hidden_states) in enumerate(zip(outputs.attentions, outputs.hidden_states)):
        queries = 13 if step == 0 else 1
        assert {a.shape for a in attentions} == {(2, 4, queries, 13 + step)}
        assert {h.shape for h in hidden_states} == {(2, queries, 24)}
        assert len(hidden_states) == len(attentions) + 1
        for weights in attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, queries))


def test_a_streamer_gets_every_token():
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    model, ids, streamer = generator({}), random_ids(1, 9), Collect()
    out = generate(model, ids, streamer=streamer)
    assert streamer.tokens == [*out[0].tolist(), "end"]


def test_a_long_prompt_is_read_in_chunks(monkeypatch):
    model, ids = generator({"local_attention": "sliding"}), random_ids(2, 64)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = generate(model, ids, attention_mask=mask, use_cache=False)
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr("modeling_infini.modeling_infini.PIECE_TOKENS", 10)
    assert torch.equal(generate(model, ids, attention_mask=mask), expected)
    # The token whose logits are asked for, and the tokens that are generated, are on their own.
    assert lengths[:9] == [10, 10, 10, 10, 10, 10, 3, 1, 1]
    lengths.clear()
    generate(model, ids[:1], prompt_lookup_num_tokens=2)
    assert max(lengths) == 10


NOT_FOR_THIS_MODEL = ["static", "offloaded", "quantized", "offloaded_static", "sliding_window", "hybrid_chunked"]


@pytest.mark.parametrize("name", NOT_FOR_THIS_MODEL)
def test_other_cache_implementations_are_refused(name):
    model, ids = generator({}), random_ids(1, 5)
    options = {"cache_implementation": name}
    cache = model.new_cache()
    for more in ({}, {"cache_config": {"nbits": 4}}, {"prompt_lookup_num_tokens": 2}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match=rf'cache_implementation="{name}" is not for this model'):
            generate(model, ids, **options, **more)
    with pytest.raises(ValueError, match="cache_config describes quantized caches"):
        generate(model, ids, cache_config={"nbits": 4})


LEGACY_CACHE = tuple((torch.zeros(1, 2, 3, 6), torch.zeros(1, 2, 3, 6)) for _ in range(2))
FOREIGN_CACHES = {
    "tuple": LEGACY_CACHE,
    "DynamicCache": DynamicCache(),
    "StaticCache": StaticCache(tiny_config(), max_cache_len=9),
    "EncoderDecoderCache": EncoderDecoderCache(DynamicCache(), DynamicCache()),
}


@pytest.mark.parametrize("name", FOREIGN_CACHES)
def test_foreign_caches_are_refused_in_the_same_words(name, monkeypatch):
    monkeypatch.setattr("modeling_infini.modeling_infini.PIECE_TOKENS", 10)
    model, cache = generator({}), FOREIGN_CACHES[name]
    classifier = InfiniForSequenceClassification(tiny_config())
    calls = [
        lambda ids: generate(model, ids, past_key_values=cache),
        lambda ids: generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=2),
        lambda ids: generate(model, ids, past_key_values=cache, use_cache=False),
        lambda ids: model(ids, past_key_values=cache),
        lambda ids: model(ids, past_key_values=cache, logits_to_keep=1),
        lambda ids: model.model(ids, past_key_values=cache),
        lambda ids: classifier(ids, past_key_values=cache),
    ]
    for call in calls:
        with (
            torch.no_grad(),
            pytest.raises(TypeError, match=f"past_key_values must be an InfiniCache, got {name}: no"),
        ):
            call(random_ids(1, 23))


def test_continuous_batching_is_refused():
    model = generator({})
    with pytest.raises(NotImplementedError, match="Continuous batching pages the keys"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(NotImplementedError, match="Continuous batching pages the keys"):
        generate(model, random_ids(1, 5), cache_implementation="paged")


def test_a_cache_without_a_use_is_refused():
    model, ids = generator({}), random_ids(1, 9)
    with pytest.raises(ValueError, match="use_cache=False reads the whole text again for every token"):
        generate(model, ids, use_cache=False, past_key_values=model.new_cache())


@all_modes
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_in_training_generate_needs_no_gradients(fields, use_reentrant, monkeypatch):
    monkeypatch.setattr("modeling_infini.modeling_infini.PIECE_TOKENS", 10)
    model, ids = generator(fields), random_ids(2, 33)
    expected = generate(model, ids)
    model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for options in ({}, {"past_key_values": model.new_cache()}, {"prefill_chunk_size": 4}, {"use_cache": False}):
        assert torch.equal(generate(model, ids, **options), expected)
    assert torch.equal(generate(model, ids[:1], prompt_lookup_num_tokens=2), expected[:1])
    with torch.no_grad():
        for length in (7, 33):
            outputs = model(ids[:, :length], use_cache=True, logits_to_keep=1)
            assert outputs.past_key_values.tokens_read.tolist() == [length, length]
    with pytest.raises(ValueError, match="use_reentrant") if use_reentrant else nullcontext():
        model(ids, past_key_values=model.new_cache())


def test_in_training_generate_drops_out():
    model = tiny_model(attention_dropout=0.5).train()

    def sampled(seed):
        torch.manual_seed(seed)
        return generate(model, random_ids(2, 13))

    assert torch.equal(sampled(0), sampled(0))
    assert not torch.equal(sampled(0), sampled(1))
