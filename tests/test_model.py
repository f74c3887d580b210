"""Attention backends, attention weights, initialization, heads, compilation, and the Auto classes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import reference_stream
from tiny import (
    MODES,
    config_fields,
    float64_weights,
    hurting_lengths,
    random_ids,
    randomize,
    relative_error,
    tiny_config,
    tiny_model,
)
from torch._dynamo.testing import CompileCounter
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modeling_infini import InfiniCache, InfiniForCausalLM, InfiniForSequenceClassification, InfiniModel


pytestmark = pytest.mark.usefixtures("small_passages")


@pytest.mark.core
@given(st.data())
def test_eager_and_sdpa_agree(data):
    fields = data.draw(config_fields())
    model, ids = tiny_model(**fields), random_ids(2, data.draw(hurting_lengths(fields["segment_length"])))
    mask = torch.ones_like(ids)
    mask[1, : data.draw(st.integers(0, ids.shape[1] - 1))] = 0
    logits = {}
    with torch.no_grad():
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            cache = InfiniCache(model.config)
            calls = [model(ids, attention_mask=mask, past_key_values=cache).logits]
            calls += [model(random_ids(2, 1, seed=t), past_key_values=cache).logits for t in range(3)]
            logits[implementation] = torch.cat(calls, 1)
    mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1).bool()
    torch.testing.assert_close(logits["eager"][mask], logits["sdpa"][mask], atol=1e-4, rtol=1e-4)


@given(st.data())
def test_attentions_are_the_local_weights_by_column(float64_norm_and_rope, data):
    fields = data.draw(config_fields()) | {"num_memory_slots": 0, "slot_layers": None}
    model = tiny_model(torch.float64, **fields)
    model.set_attn_implementation("eager")
    ids = random_ids(2, data.draw(hurting_lengths(fields["segment_length"])) + 1)
    length = ids.shape[1]
    mask = torch.ones_like(ids)
    mask[1, data.draw(st.lists(st.integers(1, length - 1), max_size=3))] = 0
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1))))
    cache, found = InfiniCache(model.config), []
    with torch.no_grad():
        for start, end in zip([0, *cuts], [*cuts, length]):
            call = {"attention_mask": mask[:, start:end], "past_key_values": cache, "output_attentions": True}
            attentions = model(ids[:, start:end], **call).attentions
            assert {a.shape for a in attentions} == {(2, 4, end - start, end)}
            found.append([torch.nn.functional.pad(a, (0, length - end)) for a in attentions])
    found = [torch.cat(layer, 2) for layer in zip(*found)]
    for row in range(2):
        columns = mask[row].nonzero().squeeze(1).tolist()
        _, attentions = reference_stream(ids[row, columns].tolist(), float64_weights(model), model.config)
        for layer, heads in enumerate(attentions):
            expected = torch.zeros(4, length, length, dtype=torch.float64)
            for head, tokens in enumerate(heads):
                for column, seen in zip(columns, tokens):
                    for position, weight in seen:
                        expected[head, column, columns[position]] = weight
            # The stock eager attention takes its softmax in float32.
            torch.testing.assert_close(found[layer][row][:, columns], expected[:, columns], atol=1e-5, rtol=1e-5)


def test_flash_attention_gets_what_its_interface_documents(monkeypatch):
    """No CUDA here: a stand-in with flash-attention's semantics checks the masks and arguments it is called with."""

    def flash(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
        queries, keys = query.shape[2], key.shape[2]
        at = torch.arange(queries).unsqueeze(1) + keys - queries
        visible = torch.arange(keys) <= at
        if sliding_window is not None:
            visible &= torch.arange(keys) > at - sliding_window
        visible = visible.expand(query.shape[0], 1, -1, -1)
        if attention_mask is not None:
            assert attention_mask.shape == (query.shape[0], keys)
            visible = visible & attention_mask[:, None, None, :].bool()
        groups = module.num_key_value_groups
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), visible, scale=scaling
        )
        return output.transpose(1, 2), None

    AttentionInterface.register("flash_attention_2", flash)
    try:
        for fields in MODES[:2]:
            model, ids = tiny_model(**fields), random_ids(2, 19)
            mask = torch.ones_like(ids)
            mask[1, :3] = 0
            outputs = {}
            for implementation in ("sdpa", "flash_attention_2"):
                model.config._attn_implementation = implementation
                cache = InfiniCache(model.config)
                with torch.no_grad():
                    calls = [model(ids[:, :13], attention_mask=mask[:, :13], past_key_values=cache).logits[:, 3:]]
                    calls += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(13, 16)]
                    calls += [model(ids[:, 16:], past_key_values=cache).logits, model(ids).logits]
                outputs[implementation] = torch.cat(calls, 1)
            torch.testing.assert_close(outputs["flash_attention_2"], outputs["sdpa"], atol=1e-4, rtol=1e-4)
        model = tiny_model(**MODES[2])
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="cannot express attention sinks"):
            model(random_ids(1, 3))
    finally:
        del AttentionInterface._global_mapping["flash_attention_2"]
        from transformers.integrations.flash_attention import flash_attention_forward

        AttentionInterface.register("flash_attention_2", flash_attention_forward)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("fields", MODES)
def test_a_decode_step_compiles_once_whatever_was_read(fields, delta):
    torch._dynamo.reset()
    model, ids = tiny_model(use_mem_delta_rule=delta, **fields), random_ids(2, 40)
    counter = CompileCounter()
    with torch.no_grad():
        expected = model(ids).logits
        cache = InfiniCache(model.config)
        model(ids[:, :7], past_key_values=cache)
        step = torch.compile(model.forward, backend=counter, fullgraph=True)
        logits = [step(ids[:, t : t + 1], past_key_values=cache).logits for t in range(7, 40)]
    torch.testing.assert_close(torch.cat(logits, 1), expected[:, 7:], atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("auto_class", "shape"),
    [
        (AutoModel, (2, 12, 24)),
        (AutoModelForCausalLM, (2, 12, 31)),
        (AutoModelForSequenceClassification, (2, 3)),
        (AutoModelForTokenClassification, (2, 12, 3)),
        (AutoModelForQuestionAnswering, (2, 12)),
    ],
)
def test_auto_classes_save_and_load(tmp_path, auto_class, shape):
    model = auto_class.from_config(tiny_config(num_labels=3, pad_token_id=0)).eval()
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    with torch.no_grad():
        found, expected = loaded(random_ids(2, 12))[0], model(random_ids(2, 12))[0]
    assert found.shape == shape
    assert torch.equal(found, expected)


def test_gates_start_as_configured_and_stay_in_float32(tmp_path):
    model = InfiniForCausalLM(tiny_config(head_gate_init_value=2.0, head_gate_scale=4.0))
    gates = model.model.layers[0].self_attn.head_gates
    torch.testing.assert_close(gates.weight.data, torch.full((4,), 0.5))
    torch.testing.assert_close(gates().data, torch.full((4,), 2.0).sigmoid())
    model.save_pretrained(tmp_path)
    loaded = InfiniForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.layers[1].self_attn.head_gates.weight.dtype == torch.float32
    assert loaded.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.core
def test_closed_gates_shut_the_memory_out_and_open_ones_let_it_in():
    model, ids = tiny_model(), random_ids(1, 10)
    other = torch.cat([(ids[:, :5] + 1) % 31, ids[:, 5:]], 1)
    with torch.no_grad():
        for logit, sees_memory in ((1e3, False), (0.0, True)):
            for layer in model.model.layers:
                layer.self_attn.head_gates.weight.fill_(logit)
            same = torch.allclose(model(ids).logits[:, 5:], model(other).logits[:, 5:])
            assert same != sees_memory


def test_every_gradient_is_finite_and_gates_have_one():
    model = InfiniForCausalLM(tiny_config(use_mem_delta_rule=True))
    ids = random_ids(2, 23)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.core
def test_gradient_checkpointing_changes_no_gradient():
    model, ids = tiny_model(), random_ids(2, 17)
    expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    model.train()
    model.gradient_checkpointing_enable()
    found = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("fields", MODES)
def test_under_autocast_the_memory_stays_in_float32(fields, delta):
    model, ids, cache = tiny_model(use_mem_delta_rule=delta, **fields), random_ids(2, 17), None
    memories = {}
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            cache = model(ids[:, :13]).past_key_values
            for t in range(13, 17):
                model(ids[:, t : t + 1], past_key_values=cache)
        layer = cache.layers[0]
        assert layer.memory.dtype == torch.float32
        # M is made of bfloat16 keys and values, but without further rounding: z is a sum of sigma(K), exactly.
        memories[autocast] = layer.normaliser
    torch.testing.assert_close(memories[True], memories[False], atol=0.05, rtol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("fields", MODES)
def test_under_autocast_a_cache_is_saved_and_goes_on(fields, tmp_path):
    # The norms of Qwen3 have float32 weights, and so give float32.
    model, ids = tiny_model(qk_norm=True, **fields), random_ids(2, 17)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model(ids[:, :13]).past_key_values
        cache.save_pretrained(tmp_path)
        expected = model(ids[:, 13:], past_key_values=cache).logits
        loaded = InfiniCache.from_pretrained(tmp_path, model)
        assert torch.equal(model(ids[:, 13:], past_key_values=loaded).logits, expected)
    with torch.no_grad(), pytest.raises(ValueError, match=r"bfloat16 keys, but the model computes in torch\.float32"):
        model(ids[:, :2], past_key_values=cache)


@pytest.mark.parametrize("delta", [False, True])
def test_under_autocast_cuts_do_not_change_the_memory(delta):
    model, ids, memories = tiny_model(use_mem_delta_rule=delta, num_hidden_layers=1), random_ids(1, 23), []
    for chunk in (1, 8, 23):
        cache = InfiniCache(model.config)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            for call in ids.split(chunk, 1):
                model(call, past_key_values=cache)
        layer = cache.layers[0]
        memories.append(torch.cat([layer.memory.flatten(), layer.pending_memory.flatten()]))
    torch.testing.assert_close(memories[1], memories[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(memories[2], memories[0], atol=1e-5, rtol=1e-5)


def test_hidden_states_are_those_of_every_layer():
    outputs = tiny_model()(random_ids(2, 9), output_hidden_states=True)
    assert [h.shape for h in outputs.hidden_states] == [(2, 9, 24)] * 3


def test_the_base_model_takes_ids_or_embeddings():
    model = tiny_model().model
    assert isinstance(model, InfiniModel)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_gates_and_norms_of_a_half_model_are_made_in_float32():
    # transformers makes a model under the default dtype that it is loaded in.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = InfiniForCausalLM(tiny_config(memory_norm_init_scale=3.0))
    finally:
        torch.set_default_dtype(default)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.dtype == torch.bfloat16
    exact = (attention.head_gates, attention.memory.query_norm, attention.memory.key_norm)
    assert [module.weight.dtype for module in exact] == [torch.float32] * 3


def test_servers_are_told_that_attention_over_paged_keys_does_not_fit():
    # vLLM and SGLang ask this before they put their own attention into a model of transformers.
    assert not InfiniForCausalLM.is_backend_compatible()


@given(st.data())
def test_the_loss_of_padded_rows_is_that_of_the_rows_alone(data):
    """Wherever padding stands, a token is predicted by the token before it, and padding predicts nothing."""
    model = tiny_model(**data.draw(config_fields()))
    ids, labels = random_ids(3, 14), random_ids(3, 14, seed=1)
    cells = st.lists(st.integers(0, 1), min_size=14, max_size=14).filter(lambda row: sum(row) > 1)
    mask = torch.tensor(data.draw(st.lists(cells, min_size=3, max_size=3)))
    with torch.no_grad():
        found = model(ids, attention_mask=mask, labels=labels).loss
        sums = [
            model(row_ids[is_token][None], labels=row_labels[is_token][None], num_items_in_batch=1).loss
            for row_ids, row_labels, is_token in zip(ids, labels, mask.bool())
        ]
    assert relative_error(found, sum(sums) / (mask.sum() - 3)) < 1e-5


@pytest.mark.parametrize("fields", MODES, ids=["segment", "sliding", "sinks"])
def test_texts_are_classified_by_their_last_tokens(fields):
    torch.manual_seed(0)
    model = InfiniForSequenceClassification(tiny_config(pad_token_id=0, num_labels=3, **fields)).double().eval()
    ids = random_ids(4, 13, seed=2).clamp(min=1)
    patterns = ("1" * 13, "1111111100000", "0011001011000", "0000001111111")
    mask = torch.tensor([[int(column) for column in pattern] for pattern in patterns])
    with torch.no_grad():
        expected = torch.cat([model(row[seen > 0][None]).logits for row, seen in zip(ids, mask)])
        for padding in (0, 7):  # the mask says what padding is, whatever its id
            found = model(ids.masked_fill(mask == 0, padding), attention_mask=mask, labels=torch.tensor([0, 1, 2, 0]))
            torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(
            model(inputs_embeds=embeds[3:], attention_mask=mask[3:]).logits, expected[3:], atol=1e-5, rtol=1e-5
        )
        with pytest.raises(ValueError, match="The last column is classified, and it is padding"):
            model(inputs_embeds=embeds, attention_mask=mask)


def test_the_loss_of_numbered_documents_is_that_of_the_documents_alone():
    model, ids = tiny_model(), random_ids(1, 14)
    numbers = torch.tensor([[1] * 6 + [0] + [2] * 7])
    with torch.no_grad():
        found = model(ids, attention_mask=numbers, labels=ids).loss
        alone = [model(part, labels=part, num_items_in_batch=1).loss for part in (ids[:, :6], ids[:, 7:])]
    assert relative_error(found, sum(alone) / (5 + 6)) < 1e-5


@pytest.mark.parametrize("fields", MODES, ids=["segment", "sliding", "sinks"])
def test_answers_stand_in_the_text_and_not_in_its_padding(fields):
    model = randomize(AutoModelForQuestionAnswering.from_config(tiny_config(**fields))).eval()
    ids, lengths, ends = random_ids(3, 13), [13, 7, 9], [(2, 5), (0, 6), (8, 8)]
    mask = (torch.arange(13) < torch.tensor(lengths).unsqueeze(1)).long()
    starts, stops = map(torch.tensor, zip(*ends))
    with torch.no_grad():
        found = model(ids, attention_mask=mask, start_positions=starts, end_positions=stops)
        alone = [
            model(ids[row : row + 1, :length], start_positions=start.view(1), end_positions=stop.view(1))
            for row, (length, start, stop) in enumerate(zip(lengths, starts, stops))
        ]
    assert relative_error(found.loss, sum(row.loss for row in alone) / 3) < 1e-5
    assert found.start_logits.argmax(1).tolist() == [row.start_logits.argmax().item() for row in alone]
    assert found.end_logits.argmax(1).tolist() == [row.end_logits.argmax().item() for row in alone]
    with torch.no_grad():
        loss, *_ = model(ids, attention_mask=mask, start_positions=starts, end_positions=stops, return_dict=False)
    assert torch.equal(loss, found.loss)


@pytest.mark.parametrize("fields", MODES, ids=["segment", "sliding", "sinks"])
def test_padding_is_of_no_class(fields):
    model = randomize(AutoModelForTokenClassification.from_config(tiny_config(**fields))).eval()
    ids, classes, lengths = random_ids(2, 13), random_ids(2, 13) % 2, [13, 7]
    mask = (torch.arange(13) < torch.tensor(lengths).unsqueeze(1)).long()
    with torch.no_grad():
        found = model(ids, attention_mask=mask, labels=classes)
        assert torch.equal(model(ids, mask, None, None, None, classes).loss, found.loss)
        loss, logits = model(ids, attention_mask=mask, labels=classes, return_dict=False)
        assert torch.equal(loss, found.loss)
        assert torch.equal(logits, found.logits)
        for wrong in (mask[:, None, None], mask[:, :5]):
            with pytest.raises(ValueError, match="attention_mask"):
                model(ids, attention_mask=wrong, labels=classes)
        alone = [
            model(ids[row : row + 1, :length], labels=classes[row : row + 1, :length]).loss * length
            for row, length in enumerate(lengths)
        ]
    assert relative_error(found.loss, sum(alone) / sum(lengths)) < 1e-5


def test_attention_in_both_directions_is_refused():
    with pytest.raises(ValueError, match="is_causal=False is not supported"):
        tiny_model()(random_ids(1, 7), is_causal=False)
