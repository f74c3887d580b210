"""vLLM's server, asked by OpenAI's own client."""

import asyncio

import openai
import pytest

from benchmarks.vllm_soak import CHECKPOINT, NAME, Soak, examples, server


LENGTH = 1024


@pytest.fixture(scope="module")
def address():
    settings = ("--dtype", "float32", "--max-model-len", str(LENGTH), "--max-num-seqs", "8", "--enforce-eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        with server(str(CHECKPOINT), *settings) as (address, _):
            yield address


@pytest.fixture(scope="module")
def pool():
    return examples(str(CHECKPOINT), [128, 192, 500, 1000])


def test_clients_get_the_answers_of_generate(address, pool):
    """More than are read at once; some read answers as they come, some go away before the end."""
    soak = Soak(address, pool)
    asyncio.run(soak.run(clients=16, seconds=10))
    assert min(soak.seen[way] for way in ("whole", "streamed", "left by the client")) > 0
    assert soak.seen["not those of generate()"] == 0


def test_usage(address, pool):
    client = openai.OpenAI(base_url=address, api_key="none")
    prompt, answer = pool[-1]
    found = client.completions.create(model=NAME, prompt=prompt, max_tokens=3, temperature=0)
    assert answer.startswith(found.choices[0].text)
    assert found.usage.completion_tokens == 3
    assert 990 < found.usage.prompt_tokens < 1000


def test_a_text_that_is_too_long_is_refused(address, pool):
    client = openai.OpenAI(base_url=address, api_key="none")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=NAME, prompt=pool[-1].prompt * 2, max_tokens=3)
