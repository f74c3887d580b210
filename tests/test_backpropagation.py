"""P8: chunked and whole back-propagation give the gradients of the reference; truncation ends them where it says."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_stream
from tiny import (
    EVERY_OPTION,
    MODES,
    config_fields,
    float64_weights,
    hurting_lengths,
    random_ids,
    randomize,
    relative_error,
    seeded,
    tiny_config,
    tiny_model,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.functional import cross_entropy
from transformers.integrations.neftune import activate_neftune

from modeling_infini import InfiniForCausalLM, InfiniForTokenClassification, modeling_infini
from modeling_infini.modeling_infini import InfiniDecoderLayer
from modeling_infini.streams import targets
from modeling_infini.training import backpropagate, backpropagation, loss_in_chunks
from modeling_infini.training.backpropagation import chunk_lengths, infini_module, prepared_inputs


pytestmark = pytest.mark.usefixtures("small_passages")


def gradients(model) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def plain_gradients(model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float = 1e-6):
    # The model's own loss and the stock norm compute in float32, whatever the model does.
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < bound * scale, name


@st.composite
def sequences(draw):
    """Model fields, and a batch whose rows are cut by padding, restarts and missing labels."""
    fields = draw(config_fields())
    length = draw(hurting_lengths(fields["segment_length"]).filter(lambda length: length > 1))
    ids = random_ids(2, length, seed=draw(st.integers(0, 99)))
    inputs = {"input_ids": ids}
    generator = seeded(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        inputs["attention_mask"] = (torch.rand(2, length, generator=generator) < 0.8).long()
    if draw(st.booleans()):
        restarts = torch.rand(2, length, generator=generator) < 0.2
        if "attention_mask" in inputs:
            restarts &= inputs["attention_mask"] == 1
        columns = torch.arange(length)
        inputs["position_ids"] = columns - torch.where(restarts, columns, 0).cummax(1).values
    labels = ids.masked_fill(torch.rand(2, length, generator=generator) < 0.2, -100)
    labels[0, -1] = ids[0, -1]
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, -2:] = 1
    return fields, {**inputs, "labels": labels}


@pytest.mark.core
@given(sequences(), st.integers(1, 3), st.booleans())
def test_chunked_gradients_equal_those_of_one_pass(case, chunk_segments, is_checkpointed):
    fields, inputs = case
    model = tiny_model(torch.float64, **fields).train()
    expected_loss, expected = plain_gradients(model, **inputs)
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    loss, cache = backpropagate(model, inputs, chunk_segments=chunk_segments)
    assert relative_error(loss, expected_loss) < 1e-6  # the loss itself is float32
    assert_same_gradients(gradients(model), expected)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


@pytest.mark.usefixtures("float64_norm_and_rope")
@settings(max_examples=15)
@given(config_fields(min_segment_length=2, max_segment_length=4), st.integers(1, 2), st.integers(0, 9))
def test_chunked_gradients_equal_those_of_the_reference(fields, chunk_segments, seed):
    model = tiny_model(torch.float64, seed, **fields)
    ids = random_ids(1, 4 * fields["segment_length"] + 1, seed=seed)
    weights = {name: weight.clone().requires_grad_() for name, weight in float64_weights(model).items()}
    logits, _ = reference_stream(ids[0].tolist(), weights, model.config)
    cross_entropy(logits[:-1], ids[0, 1:]).backward()
    # The choice of slots is not differentiated.
    of_model = {name: weights[name] for name, _ in model.named_parameters()}
    expected = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in of_model.items()}

    def float64_loss(chunk):
        targets = chunk.pop("shift_labels")
        chunk.pop("labels")
        outputs = model(**chunk)
        loss = cross_entropy(outputs.logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return loss / (ids.shape[1] - 1), outputs

    backpropagate(model, {"input_ids": ids, "labels": ids}, chunk_segments=chunk_segments, compute_loss=float64_loss)
    assert_same_gradients(gradients(model), expected, 1e-10)


@pytest.mark.parametrize("fields", MODES)
@pytest.mark.parametrize("use_mem_delta_rule", [False, True])
def test_detaching_cuts_gradients_at_every_kth_segment(fields, use_mem_delta_rule):
    model = tiny_model(torch.float64, use_mem_delta_rule=use_mem_delta_rule, **fields)
    ids = random_ids(2, 23)
    shift_labels = targets(ids, None)
    cache, count = None, 2 * (ids.shape[1] - 1)
    for piece, target in zip(ids.split(10, 1), shift_labels.split(10, 1)):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        loss = cross_entropy(outputs.logits.flatten(0, 1), target.flatten(), reduction="sum") / count
        loss.backward()
        cache = outputs.past_key_values.detached()
    expected = gradients(model)
    for chunk_segments in (None, 1):
        model.zero_grad()
        inputs = {"input_ids": ids, "labels": ids}
        _, found = backpropagate(model, inputs, chunk_segments=chunk_segments, detach_every_num_segments=2)
        assert_same_gradients(gradients(model), expected)
        assert relative_error(found.layers[-1].memory, cache.layers[-1].memory) < 1e-12
    _, whole = plain_gradients(model, **inputs)
    with pytest.raises(AssertionError):
        assert_same_gradients(whole, expected)


@pytest.mark.parametrize("fields", [*MODES, EVERY_OPTION])
@pytest.mark.parametrize("start", [4, 5, 7])
def test_going_on_from_a_cache_equals_reading_on_with_gradients_cut_there(fields, start):
    model = tiny_model(torch.float64, **fields)
    ids = random_ids(2, 29)
    cache = model.new_cache()
    with torch.no_grad():
        model(ids[:, :start], past_key_values=cache)
    model.zero_grad()
    model(ids[:, start:], labels=ids[:, start:], past_key_values=cache.detached()).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    inputs = {"input_ids": ids[:, start:], "labels": ids[:, start:]}
    _, after = backpropagate(model, inputs, chunk_segments=1, past_key_values=cache)
    assert_same_gradients(gradients(model), expected)
    assert cache.get_seq_length() == start
    with torch.no_grad():
        model(ids[:, start:], past_key_values=cache)
        expected_logits = model(random_ids(2, 9), past_key_values=cache).logits
        assert relative_error(model(random_ids(2, 9), past_key_values=after).logits, expected_logits) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("fields", MODES)
@pytest.mark.parametrize("use_mem_delta_rule", [False, True])
def test_rows_that_go_on_at_unequal_offsets_have_the_gradients_of_one_pass(fields, use_mem_delta_rule, dtype, bound):
    model = tiny_model(dtype, use_mem_delta_rule=use_mem_delta_rule, **fields)
    read, mask = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 23, dtype=torch.long)
    read[0, :3] = mask[1, -6:] = 0
    with torch.no_grad():
        cache = model(random_ids(2, 8), attention_mask=read, use_cache=True).past_key_values
    ids = random_ids(2, 23, seed=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    model(**inputs, past_key_values=cache.detached()).loss.backward()
    expected = gradients(model)
    for chunk_segments in (1, 2):
        model.zero_grad()
        _, after = backpropagate(model, inputs, chunk_segments=chunk_segments, past_key_values=cache)
        assert_same_gradients(gradients(model), expected, bound)
        assert after.tokens_read.tolist() == [5 + 23, 8 + 17]
        assert after.layers[0].memory.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_single_token_is_read_and_trains_nothing():
    model = tiny_model()
    loss, cache = backpropagate(model, {"input_ids": random_ids(2, 1), "labels": random_ids(2, 1)}, chunk_segments=1)
    assert loss == 0
    assert cache.tokens_read.tolist() == [1, 1]
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.usefixtures("float64_norm_and_rope")
def test_dropout_is_the_same_when_a_chunk_runs_again():
    model = tiny_model(torch.float64, attention_dropout=0.3).train()
    inputs = {"input_ids": random_ids(2, 20), "labels": random_ids(2, 20)}

    def run(chunk_segments):
        torch.manual_seed(3)
        model.zero_grad()
        loss, cache = backpropagate(model, inputs, chunk_segments=chunk_segments)
        return loss, gradients(model), cache, torch.rand(1)

    # By finite differences of the memory that chunks hand on: a chunk that drew anew would hand on something else.
    loss, found, cache, following = run(1)
    again_loss, again, again_cache, again_following = run(1)
    assert torch.equal(loss, again_loss)
    assert_same_gradients(found, again, 1e-12)
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("0.self_attn.k_proj.weight"))
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)

    def loss_at(step):
        with torch.no_grad():
            weight.add_(step * direction)
            torch.manual_seed(3)
            # With one chunk after the other and no second run, the generators draw in the order of the text.
            model.train()
            total = sum(
                cross_entropy(outputs.logits.flatten(0, 1), target.flatten(), reduction="sum", ignore_index=-100)
                for (_, outputs), target in zip(
                    loss_in_chunks(model, inputs, chunk_segments=1), targets(inputs["labels"], None).split(5, 1)
                )
            )
            weight.sub_(step * direction)
        return total / (2 * 19)

    numeric = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    assert abs(numeric - (found[name] * direction).sum()) < 1e-5 * abs(numeric) + 1e-8
    assert torch.equal(following, again_following)
    assert relative_error(cache.layers[0].memory, again_cache.layers[0].memory) == 0


def kept_states(cache) -> dict[str, torch.Tensor]:
    """Copies of a cache's states, without the stand-ins for those that nobody will see."""
    return {
        name: state.detach().clone()
        for name, state in cache.state_dict().items()
        if state.untyped_storage().nbytes() > state.element_size()
    }


def states_at_boundaries(model, inputs, chunk_segments):
    """What each chunk but the first starts from, and what the chunk before it ends in when it runs again."""
    starts, ends = [], []

    def compute_loss(chunk):
        starts.append(kept_states(chunk["past_key_values"]))
        outputs = model(**chunk)
        ends.append(kept_states(chunk["past_key_values"]))
        return outputs.loss, outputs

    backpropagate(model, inputs, chunk_segments=chunk_segments, compute_loss=compute_loss)
    # Chunks run from the last to the first.
    return list(zip(starts[:-1], ends[1:]))


def with_lora(model):
    # Not above, so that the core tests run where PEFT is not installed.
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    return get_peft_model(model, lora).train()


def with_noise(model):
    activate_neftune(model, 5.0)
    return model.train()


def with_checkpointing(model):
    model.gradient_checkpointing_enable()
    return model.train()


def with_dropout_in_evaluation(model):
    model = with_lora(model).eval()
    for module in model.modules():
        module.train(isinstance(module, torch.nn.Dropout))
    return model


@pytest.mark.parametrize("piece_tokens", [5, 2048])
@pytest.mark.parametrize(
    "prepare",
    [
        InfiniForCausalLM.train,
        InfiniForCausalLM.eval,
        with_lora,
        with_noise,
        with_checkpointing,
        with_dropout_in_evaluation,
    ],
)
@pytest.mark.parametrize("fields", [*MODES[1:], EVERY_OPTION])
def test_a_chunk_starts_from_the_state_that_is_differentiated(monkeypatch, fields, prepare, piece_tokens):
    monkeypatch.setattr(modeling_infini, "PIECE_TOKENS", piece_tokens)
    model = prepare(tiny_model(torch.float64, attention_dropout=0.3, **fields))
    inputs = {"input_ids": random_ids(2, 43), "labels": random_ids(2, 43)}
    for start, end in states_at_boundaries(model, inputs, 3):
        for name, state in start.items():
            torch.testing.assert_close(state, end[name], msg=name, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("segment_length", [1000, 1100])
def test_chunks_on_both_sides_of_what_a_prompt_is_cut_into_draw_the_same_masks(segment_length):
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    fields |= {"head_dim": 16, "attention_dropout": 0.1, "initializer_range": 0.5}
    model = InfiniForCausalLM(tiny_config(segment_length=segment_length, **fields)).double().train()
    ids = random_ids(1, 3 * segment_length)
    ((start, end),) = states_at_boundaries(model, {"input_ids": ids, "labels": ids}, 2)
    assert torch.equal(start["layers.1.memory"], end["layers.1.memory"])


def test_generators_of_all_devices_that_hold_weights_are_set_back(monkeypatch):
    """Faked: a machine with several accelerators runs no test here."""
    states = {torch.device("cuda", 0): 5, torch.device("cuda", 1): 7}

    class Accelerators:
        device_count = staticmethod(lambda: 2)
        get_rng_state = staticmethod(states.__getitem__)
        set_rng_state = staticmethod(lambda state, device: states.__setitem__(device, state))

    monkeypatch.setattr(backpropagation.torch, "get_device_module", lambda device: Accelerators)
    earlier = backpropagation._random_states(set(states))
    states.update(dict.fromkeys(states, 9))
    with backpropagation._random_states_from(earlier):
        assert list(states.values()) == [5, 7]
    assert list(states.values()) == [9, 9]


@pytest.mark.parametrize("chunk_segments", [None, 1, 3])
def test_neftune_in_chunks_is_as_loud_as_in_the_whole_row(chunk_segments):
    model = tiny_model().train()
    embeddings = model.get_input_embeddings()
    activate_neftune(model, 5.0)
    noise = []
    embeddings.register_forward_hook(
        lambda module, args, output: noise.append((output - torch.nn.functional.embedding(*args, module.weight)).abs())
    )
    inputs = {"input_ids": random_ids(2, 113), "labels": random_ids(2, 113)}
    for run in (
        lambda: backpropagate(model, inputs, chunk_segments=chunk_segments),
        lambda: list(loss_in_chunks(model, inputs, chunk_segments=chunk_segments)),
    ):
        noise.clear()
        run()
        loudest = 5.0 / (113 * 24) ** 0.5
        for call in noise:
            assert 0.9 * loudest < call.max() < 1.001 * loudest
    assert embeddings.neftune_noise_alpha == 5.0


def test_activations_and_logits_are_those_of_one_chunk():
    model = tiny_model(segment_length=8)
    ids = random_ids(1, 8 * 64)
    widths = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    saved = 0

    def count(tensor):
        nonlocal saved
        saved += tensor.numel()
        return tensor

    peaks = {}
    for length in (16, 512):
        saved = peak = 0

        def backward(loss):
            nonlocal peak, saved
            peak, saved = max(peak, saved), 0
            loss.backward()

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            inputs = {"input_ids": ids[:, :length], "labels": ids[:, :length]}
            backpropagate(model, inputs, chunk_segments=2, backward=backward)
        peaks[length] = peak
    assert max(widths) == 16
    assert peaks[512] <= 1.5 * peaks[16]


def test_boundaries_between_segments_hold_no_keys_that_nobody_sees():
    for fields, unseen in ((MODES[0], ("keys", "values")), (MODES[2], ())):
        model = tiny_model(**fields)
        cache = model(random_ids(2, 10), use_cache=True).past_key_values
        boundary = cache.detached()
        for name, state in boundary.layers[0].states().items():
            stored = state.untyped_storage().nbytes()
            assert (stored == state.element_size()) == (name in unseen), name
        ids = random_ids(2, 8, seed=1)
        with torch.no_grad():
            for columns in (slice(0, 1), slice(1, 8)):
                expected = model(ids[:, columns], past_key_values=cache).logits
                assert torch.equal(model(ids[:, columns], past_key_values=boundary).logits, expected)


@pytest.mark.parametrize("detach_segments", [None, 1, 3])
@pytest.mark.parametrize("chunk_segments", [None, 1, 2])
def test_chunks_end_with_segments_and_are_equally_many_at_any_offset(chunk_segments, detach_segments):
    model = tiny_model(segment_length=5)
    counts = set()
    for read in range(1, 11):
        cache = model(random_ids(1, read), use_cache=True).past_key_values
        windows = chunk_lengths(38, chunk_segments, detach_segments, 5, cache)
        lengths = [length for window in windows for length in window]
        assert sum(lengths) == 38
        assert all(length > 0 for length in lengths)
        ends = torch.tensor(lengths).cumsum(0)[:-1] + read
        assert not (ends % 5).any()
        counts.add(tuple(map(len, windows)))
    assert len(counts) == 1


def test_what_has_no_columns_goes_into_each_chunk():
    model = tiny_model(torch.float64)
    ids = random_ids(1, 23)
    positions = torch.cat([torch.arange(9), torch.arange(14)]).unsqueeze(0)
    packed = {"cu_seq_lens_q": torch.tensor([0, 9, 23]), "max_length_q": 14, "seq_idx": (positions == 0).cumsum(1)}
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
    _, expected = plain_gradients(model, **inputs)
    for chunk_segments in (None, 1):
        model.zero_grad()
        backpropagate(model, {**inputs, **packed, "output_hidden_states": False}, chunk_segments=chunk_segments)
        assert_same_gradients(gradients(model), expected)


def test_a_backward_that_scales_the_loss_is_told_of():
    model = tiny_model(torch.float64)
    inputs = {"input_ids": random_ids(1, 23), "labels": random_ids(1, 23)}
    _, expected = plain_gradients(model, **inputs)
    model.zero_grad()
    backpropagate(model, inputs, chunk_segments=1, backward=lambda loss: (loss / 4).backward(), loss_scale=1 / 4)
    assert_same_gradients({name: 4 * gradient for name, gradient in gradients(model).items()}, expected)


def test_loss_in_chunks_is_the_loss():
    model = tiny_model(torch.float64, **MODES[2])
    inputs = {"input_ids": random_ids(2, 17), "labels": random_ids(2, 17)}
    expected = model(**inputs)
    parts = list(loss_in_chunks(model, inputs, chunk_segments=1))
    assert relative_error(sum(loss for loss, _ in parts), expected.loss) < 1e-6
    logits = torch.cat([outputs["logits"] for _, outputs in parts], 1)
    assert relative_error(logits, expected.logits) < 1e-12
    assert not any(loss.requires_grad for loss, _ in parts)


def test_bf16_autocast_gives_chunked_gradients_near_float32():
    model = InfiniForCausalLM(tiny_config(**MODES[1]))
    inputs = {"input_ids": random_ids(2, 23), "labels": random_ids(2, 23)}
    _, expected = plain_gradients(model, **inputs)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        _, cache = backpropagate(model, inputs, chunk_segments=1)
    found = gradients(model)
    assert cache.layers[0].memory.dtype == torch.float32
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 0.05 * gradient.norm() + 1e-4, name


def test_bad_arguments_are_refused():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model = tiny_model()
    inputs = {"input_ids": random_ids(1, 8)}
    with pytest.raises(ValueError, match="needs labels"):
        backpropagate(model, inputs)
    with pytest.raises(ValueError, match="chunk_segments=0 must be at least 1"):
        backpropagate(model, {**inputs, "labels": inputs["input_ids"]}, chunk_segments=0)
    with pytest.raises(ValueError, match="labels and shift_labels contradict"):
        backpropagate(model, {**inputs, "labels": inputs["input_ids"], "shift_labels": inputs["input_ids"]})
    prompted = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for run in (backpropagate, lambda *arguments: next(loss_in_chunks(*arguments))):
        with pytest.raises(ValueError, match="Prompt learning adds tokens to each call"):
            run(prompted, {**inputs, "labels": inputs["input_ids"]})
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[3])
    with pytest.raises(ValueError, match="activated LoRA looks for its invocation"):
        backpropagate(get_peft_model(tiny_model(), lora), {**inputs, "labels": inputs["input_ids"]})
    with pytest.raises(TypeError, match="Linear is no Infini-attention model"):
        infini_module(torch.nn.Linear(2, 2))
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        backpropagate(model, {**inputs, "labels": inputs["input_ids"]})


def gradients_of_calls(model, ids, chunk_length):
    model.zero_grad()
    cache = model.new_cache()
    sum(model(part, past_key_values=cache).logits.square().sum() for part in ids.split(chunk_length, 1)).backward()
    return {name.replace("_checkpoint_wrapped_module.", ""): found for name, found in gradients(model).items()}


@pytest.mark.parametrize("fields", [{}, {"use_mem_delta_rule": True}, EVERY_OPTION], ids=["linear", "delta", "all"])
def test_layers_that_others_wrap_for_checkpointing_keep_their_gradients(fields):
    """As FSDP's activation checkpointing does, which does not tell the model."""
    ids = random_ids(2, 23)
    model = tiny_model(torch.float64, **fields).train()
    expected = [gradients_of_calls(model, ids, length) for length in (1, 5, 23)]
    _, whole = plain_gradients(model, input_ids=ids, labels=ids)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, InfiniDecoderLayer))
    for length, right in zip((1, 5, 23), expected):
        assert_same_gradients(gradients_of_calls(model, ids, length), right, 1e-9)
    for run in (
        lambda: model(ids, labels=ids).loss.backward(),
        lambda: backpropagate(model, {"input_ids": ids, "labels": ids}, chunk_segments=2),
    ):
        model.zero_grad()
        run()
        found = {name.replace("_checkpoint_wrapped_module.", ""): of for name, of in gradients(model).items()}
        assert_same_gradients(found, whole)


def test_reentrant_wrappers_are_refused_where_they_lose_gradients():
    model, ids = tiny_model().train(), random_ids(1, 12)
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)
    is_layer = lambda module: isinstance(module, InfiniDecoderLayer)  # noqa: E731
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=is_layer)
    with pytest.raises(ValueError, match="Reentrant gradient checkpointing loses the gradient"):
        model(ids, labels=ids)
    model(ids, labels=ids, use_cache=False).loss.backward()


@pytest.mark.parametrize(
    "run", [backpropagate, lambda *arguments, **kwargs: next(loss_in_chunks(*arguments, **kwargs))]
)
def test_inputs_that_are_none_of_a_sequence_are_refused(run):
    model, ids = tiny_model(), random_ids(2, 8)
    inputs = {"input_ids": ids, "labels": ids}
    for name, value in (("past_key_values", model.new_cache()), ("num_items_in_batch", 3), ("logits_to_keep", 1)):
        with pytest.raises(ValueError, match=f"{name} describes a call, not a sequence"):
            run(model, {**inputs, name: value})
    with pytest.raises(ValueError, match=r"position_ids must be of shape \(batch=2, columns\)"):
        run(model, {**inputs, "position_ids": torch.arange(8)})
    with pytest.raises(ValueError, match=r"labels are of shape \(2, 9\), but the inputs of \(2, 8\)"):
        run(model, {**inputs, "labels": random_ids(2, 9)})


def test_a_loss_that_is_not_known_to_be_a_sum_over_the_next_tokens_is_refused():
    ids = random_ids(2, 8)
    own_loss = tiny_model()
    own_loss.loss_function = lambda **kwargs: kwargs["logits"].mean()
    other_head = randomize(InfiniForTokenClassification(tiny_config(num_labels=31)))
    for model in (own_loss, other_head):
        with pytest.raises(ValueError, match="pass compute_loss"):
            backpropagate(model, {"input_ids": ids, "labels": ids})
        with pytest.raises(ValueError, match="pass compute_loss"):
            next(loss_in_chunks(model, {"input_ids": ids, "labels": ids}))


@pytest.mark.parametrize("seed", range(5))
def test_targets_alone_are_prepared_as_with_their_labels(seed):
    generator = torch.Generator().manual_seed(seed)
    ids, mask = random_ids(3, 9, seed=seed), (torch.rand(3, 9, generator=generator) < 0.6).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    whole = prepared_inputs({**inputs, "labels": ids})
    alone = prepared_inputs({**inputs, "shift_labels": whole["shift_labels"]})
    assert torch.equal(prepared_inputs(alone)["shift_labels"], whole["shift_labels"])
    is_target = alone["labels"] != -100
    assert torch.equal(alone["labels"][is_target], ids[is_target])
    assert is_target.sum() == (whole["shift_labels"] != -100).sum()


def test_embeddings_that_need_gradients_are_not_cut_into_chunks():
    model, ids = tiny_model(), random_ids(2, 8)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "labels": ids}
    with pytest.raises(ValueError, match="inputs_embeds need gradients"):
        backpropagate(model, inputs, chunk_segments=1)
    assert all(parameter.grad is None for parameter in model.parameters())
    backpropagate(model, inputs)
    assert model.get_input_embeddings().weight.grad.any()


@pytest.mark.parametrize("length", [1, 5, 6])
@pytest.mark.parametrize("is_delta", [False, True])
def test_every_parameter_has_a_gradient_whatever_the_length(is_delta, length):
    """Processes whose texts differ in length exchange the gradients of the same parameters."""
    fields = {"use_mem_delta_rule": is_delta, "learned_delta_update": is_delta, "qk_norm": True}
    model = tiny_model(**{**EVERY_OPTION, "memory_layers": None, "segment_length": 5, **fields}).train()
    ids = random_ids(2, length)
    model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("chunk_segments", [1, 2])
def test_a_loss_of_ones_own_may_read_what_the_model_does_not(chunk_segments):
    model = tiny_model(torch.float64)
    ids, goals = random_ids(2, 23), torch.randn(2, 23, 31, dtype=torch.float64)

    def compute_loss(chunk):
        read = {name: states for name, states in chunk.items() if name not in ("labels", "shift_labels", "goals")}
        outputs = model(**read)
        return (outputs.logits - chunk["goals"]).square().sum(), outputs

    compute_loss({"input_ids": ids, "goals": goals})[0].backward()
    expected = gradients(model)
    model.zero_grad()
    inputs = {"input_ids": ids, "labels": ids, "goals": goals}
    loss = {"compute_loss": compute_loss, "loss_inputs": ["goals"]}
    backpropagate(model, inputs, chunk_segments=chunk_segments, **loss)
    assert_same_gradients(gradients(model), expected)
