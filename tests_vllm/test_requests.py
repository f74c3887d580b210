"""Requests get what `generate()` gives, whatever else the engine reads at the same time."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving import greedy
from tiny import random_ids

from modeling_infini import InfiniConfig, state_nbytes
from vllm_infini.backend import StepBuilder


class Request(NamedTuple):
    """At which step of the engine it comes, its numbers of tokens, and after how many steps the client goes away."""

    arrival: int
    prompt_length: int
    max_tokens: int
    patience: int | None


REQUESTS = st.builds(
    Request,
    arrival=st.integers(0, 12),
    prompt_length=st.sampled_from([1, 2, 4, 5, 6, 9, 10, 11, 17, 26, 40]),
    max_tokens=st.sampled_from([1, 4, 6, 13]),
    patience=st.sampled_from([None, None, None, 1, 4]),
)


@given(requests=st.lists(REQUESTS, min_size=2, max_size=7), preemption=st.integers(0, 15))
def test_requests_that_come_and_go(served, requests, preemption):
    """More requests than pages, prompts cut anywhere, answers given up, all that run preempted once."""
    engine, outputs, step = served.llm.llm_engine, {}, 0
    last_arrival = max(request.arrival for request in requests)
    while step <= last_arrival or engine.has_unfinished_requests():
        for name, request in enumerate(requests):
            if request.arrival == step:
                prompt = {"prompt_token_ids": random_ids(request.prompt_length, seed=name).tolist()}
                engine.add_request(str(name), prompt, greedy(max_tokens=request.max_tokens))
            if request.patience is not None and request.arrival + request.patience == step:
                engine.abort_request([str(name)])
        if step == preemption:
            engine.reset_prefix_cache(reset_running_requests=True)
        outputs.update({int(output.request_id): output for output in engine.step() if output.finished})
        step += 1
    for name, request in enumerate(requests):
        if name in outputs:
            served.check(outputs[name], request.max_tokens)
        else:
            assert request.patience is not None


def test_a_page_is_cleared_for_the_next_request(served, monkeypatch):
    """The control: with what another request has left in the page, answers are others."""
    prompt = random_ids(9, seed=1).tolist()
    served.check(served.answers([prompt])[0], 8)
    build = StepBuilder.build

    def build_without_new_requests(self, *args):
        step = build(self, *args)
        return step._replace(new_requests=step.new_requests[:0])

    monkeypatch.setattr(StepBuilder, "build", build_without_new_requests)
    # There are three pages: the last request takes one of them a second time.
    *_, last = served.answers([prompt] * 4)
    with pytest.raises(AssertionError):
        served.check(last, 8)


def test_several_answers_to_a_prompt(served):
    """Sampled tokens have the log-probabilities that the model gives them."""
    prompt = random_ids(13).tolist()
    (output,) = served.answers([prompt], n=3, temperature=1, max_tokens=9)
    answers = [list(answer.token_ids) for answer in output.outputs]
    assert len({tuple(answer) for answer in answers}) > 1
    for answer, found in zip(answers, output.outputs):
        with torch.no_grad():
            logits = served.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for position, token in enumerate(answer):
            assert abs(found.logprobs[position][token].logprob - expected[position, token].item()) < 1e-4


def test_a_page_has_the_states_of_a_request(served):
    """As many bytes as in an `InfiniCache`, in all layers what any of them has; 4 for the place of a token, not 8."""
    config = served.model.config
    scheduler = served.llm.llm_engine.engine_core.engine_core.scheduler
    (group,) = scheduler.kv_cache_config.kv_cache_groups
    layers = {
        "num_hidden_layers": 1,
        "memory_layers": [0] if config.layers_with_memory else [],
        "slot_layers": [0] if config.num_memory_slots else None,
    }
    of_layer = state_nbytes(InfiniConfig(**{**config.to_dict(), **layers}))
    assert group.kv_cache_spec.page_size_bytes == of_layer - 4 * config.num_memory_slots
