"""examples/serve.py, asked by OpenAI's own client: it answers as generate() does, and its sessions remember."""

import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import get_type_hints
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from tiny import random_ids, tiny_model
from transformers import AutoTokenizer
from words import random_text, save_word_tokenizer


openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from openai.types.chat.completion_create_params import (  # noqa: E402
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)

from examples import serve  # noqa: E402
from examples.serve import Engine, build_app  # noqa: E402
from modeling_infini import InfiniForCausalLM  # noqa: E402


N = 5
END = 4
MODEL = {"num_hidden_layers": 1, "local_attention": "sliding", "num_sink_tokens": 2}
CHAT_TEMPLATE = (
    "w1 {% for message in messages %}{{ 'w2 ' if message.role == 'user' else 'w3 ' }}{{ message.content }} w4 "
    "{% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny_model(**MODEL).save_pretrained(path)
    save_word_tokenizer(path)
    return path


def make_engine(folder, chat_template=None, **options) -> Engine:
    model = tiny_model(**MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
        tokenizer.add_special_tokens({"eos_token": f"w{END}"})
        model.generation_config.eos_token_id = END
    return Engine(model, tokenizer, **options)


@contextmanager
def running(engine: Engine):
    """A client of a server on this machine."""
    server = uvicorn.Server(uvicorn.Config(build_app(engine, "infini"), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with client_of(port) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def client_of(port: int):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def engine(folder, tmp_path):
    return make_engine(folder, max_sessions=2, memories=tmp_path / "memories")


@pytest.fixture
def client(engine):
    with running(engine) as client:
        yield client


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def ask(client, messages, session=None, max_tokens=12, **options):
    messages = user(messages) if isinstance(messages, str) else messages
    extra = {} if session is None else {"extra_body": {"session": session}}
    options = {"model": "infini", "max_tokens": max_tokens, "temperature": 0, **extra, **options}
    return client.chat.completions.create(messages=messages, **options)


def text_of(completion) -> str:
    return completion.choices[0].message.content


def open_session(client, name: str, **fields) -> dict:
    return client.post("/sessions", body={"id": name, **fields}, cast_to=object)


def tokens_read(client, name: str) -> int:
    return client.get(f"/sessions/{name}", cast_to=object)["tokens_read"]


def generated(engine: Engine, text: str, max_new_tokens: int = 12) -> str:
    """What generate() writes after `text`, without a cache."""
    ids = engine.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    out = engine.model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, use_cache=False)
    return engine.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_an_answer_is_what_generate_writes(client, engine):
    text = random_text(3 * N + 2)
    completion = ask(client, text)
    assert text_of(completion) == generated(engine, text)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": 17,
        "completion_tokens": 12,
        "total_tokens": 29,
    }
    assert [model.id for model in client.models.list()] == ["infini"]


def test_a_streamed_answer_comes_in_pieces(client, engine):
    text = random_text(2 * N + 1)
    chunks = list(ask(client, text, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 3
    assert "".join(pieces) == generated(engine, text)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
def test_a_session_remembers_a_book_that_was_sent_once(client, engine, stream):
    chapters = [random_text(words, seed=words) for words in (23, 4, 31)]
    nbytes = []
    open_session(client, "book")
    for chapter in chapters:
        completion = ask(client, chapter, "book", max_tokens=0)
        assert text_of(completion) == ""
        nbytes.append(client.get("/sessions/book", cast_to=object)["bytes"])
    assert tokens_read(client, "book") == 58
    assert len(set(nbytes)) == 1
    history = " ".join(chapters)
    for turn in range(2):
        question = random_text(3, seed=turn)
        history += " " + question
        answer = ask(client, question, "book", stream=stream)
        answer = "".join(c.choices[0].delta.content or "" for c in answer) if stream else text_of(answer)
        assert answer == generated(engine, history)
        assert answer != generated(engine, question)
        history += " " + answer
    assert tokens_read(client, "book") == 58 + 2 * (3 + 12)


def test_turns_of_a_session_are_those_of_the_whole_conversation(folder):
    engine = make_engine(folder, CHAT_TEMPLATE)
    reasons = set()
    with running(engine) as client:
        open_session(client, "chat")
        conversation = []
        for turn in range(8):
            conversation += user(random_text(4, seed=turn))
            alone = ask(client, conversation, max_tokens=9)
            in_session = ask(client, conversation[-1:], "chat", max_tokens=9)
            assert text_of(in_session) == text_of(alone)
            assert in_session.choices[0].finish_reason == alone.choices[0].finish_reason
            reasons.add(alone.choices[0].finish_reason)
            conversation.append({"role": "assistant", "content": text_of(alone)})
    assert reasons == {"stop", "length"}


def test_a_saved_memory_is_gone_on_from_in_another_server(engine, folder):
    book, question = random_text(33), random_text(3, seed=5)
    with running(engine) as client:
        open_session(client, "book")
        ask(client, book, "book", max_tokens=0)
        assert client.post("/sessions/book/save", body={}, cast_to=object)["id"] == "book"
        expected = text_of(ask(client, question, "book"))
    with running(make_engine(folder, memories=engine.memories)) as client:
        for name in ("first", "second"):
            assert open_session(client, name, memory="book")["tokens_read"] == 33
            assert text_of(ask(client, question, name)) == expected
    assert expected == generated(engine, f"{book} {question}")


@pytest.mark.parametrize(
    ("rows", "dtype", "message"), [(2, torch.float32, "of 2 texts"), (1, torch.float64, "holds torch.float64 keys")]
)
def test_a_memory_that_no_session_can_go_on_from_is_refused(client, engine, rows, dtype, message):
    model = tiny_model(dtype, **MODEL)
    cache = model.new_cache()
    model(random_ids(rows, 7), past_key_values=cache)
    cache.save_pretrained(engine.memories / "book")
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        open_session(client, "a", memory="book")
    assert (caught.value.code, caught.value.param) == ("unfit_memory", "memory")
    assert client.get("/sessions", cast_to=object)["data"] == []


@pytest.mark.parametrize("options", [{"temperature": 1.5}, {"temperature": None}, {"temperature": None, "top_p": 0.9}])
def test_sampling_follows_its_seed(client, options):
    text = random_text(9)
    answers = [text_of(ask(client, text, seed=seed, **options)) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_nucleus_is_sampled_from(client):
    text = random_text(9)
    answers = {text_of(ask(client, text, temperature=None, top_p=0.99)) for _ in range(3)}
    assert len(answers) > 1
    first = {text_of(ask(client, text, temperature=None, top_p=1e-6)) for _ in range(2)}
    assert first == {text_of(ask(client, text))}


def test_a_seed_is_that_of_its_request_alone(client):
    text, unseeded = random_text(9), []
    for _ in range(2):
        ask(client, text, temperature=1.5, seed=1)
        unseeded.append(text_of(ask(client, text, temperature=1.5)))
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("adds_eos", [False, True])
def test_without_a_template_a_text_starts_as_the_tokenizer_starts_it(folder, adds_eos):
    engine = make_engine(folder)
    engine.tokenizer.add_special_tokens({"bos_token": "w5", "eos_token": f"w{END}"})
    engine.tokenizer.add_bos_token, engine.tokenizer.add_eos_token = True, adds_eos
    book, question = random_text(9), random_text(4, seed=1)
    assert engine.tokenizer(book).input_ids[0] == 5
    with running(engine) as client:
        open_session(client, "book")
        ask(client, book, "book", max_tokens=0)
        assert tokens_read(client, "book") == 1 + 9
        in_session = ask(client, question, "book")
        alone = ask(client, f"{book} {question}")
        assert text_of(in_session) == text_of(alone) == generated(engine, f"w5 {book} {question}")
        assert (in_session.usage.prompt_tokens, alone.usage.prompt_tokens) == (4, 1 + 9 + 4)
        with pytest.raises(openai.BadRequestError, match="The messages are empty"):
            ask(client, "")


def test_a_template_without_earlier_answers_has_no_sessions(folder):
    engine = make_engine(folder, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with running(engine) as client:
        open_session(client, "book")
        ask(client, random_text(4), "book")
        with pytest.raises(openai.BadRequestError, match="leaves earlier answers out"):
            ask(client, random_text(4), "book")


@pytest.mark.parametrize("content", ["w3 \ud800", [{"type": "text", "text": "\udc00"}]])
def test_half_a_character_is_refused(client, content):
    # As JavaScript writes it.
    body = json.dumps({"model": "infini", "messages": [{"role": "user", "content": content}]})
    with pytest.raises(HTTPError) as refusal:
        urlopen(Request(f"{client.base_url}chat/completions", body.encode(), {"Content-Type": "application/json"}))
    assert (refusal.value.code, b"half of a character" in refusal.value.read()) == (400, True)


def test_a_temperature_near_0_is_greedy(client, engine):
    text = random_text(7)
    assert text_of(ask(client, text, temperature=1e-40)) == generated(engine, text)


def test_a_template_writes_its_bos_token_itself(folder):
    engine = make_engine(folder, CHAT_TEMPLATE)
    engine.tokenizer.add_special_tokens({"bos_token": "w5"})
    engine.tokenizer.add_bos_token = True
    with running(engine) as client:
        assert ask(client, random_text(4)).usage.prompt_tokens == 1 + 1 + 4 + 1 + 1


def test_requests_at_once_do_not_mix(client, engine):
    texts = {name: [random_text(11, seed=start + turn) for turn in range(3)] for name, start in (("a", 0), ("b", 50))}
    for name in texts:
        open_session(client, name)

    def converse(name):
        return [text_of(ask(client, text, name)) for text in texts[name]]

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(texts, pool.map(converse, texts)))
    for name, answers in found.items():
        history = ""
        for text, answer in zip(texts[name], answers):
            history += f" {text}"
            assert answer == generated(engine, history)
            history += f" {answer}"


def test_a_client_that_goes_away_leaves_the_session_as_it_was(client, engine):
    open_session(client, "book")
    ask(client, random_text(13), "book", max_tokens=0)
    stream = ask(client, random_text(4), "book", max_tokens=100_000, stream=True)
    next(iter(stream))
    stream.close()
    # This is answered once the model is free again.
    assert text_of(ask(client, random_text(6))) == generated(engine, random_text(6))
    assert tokens_read(client, "book") == 13


@pytest.mark.parametrize(
    ("words", "max_tokens", "stream"), [(60 * N, 0, False), (60 * N, 0, True), (3, 100_000, False)]
)
def test_a_client_that_waits_no_longer_is_answered_no_longer(client, engine, monkeypatch, words, max_tokens, stream):
    open_session(client, "book")
    ask(client, random_text(13), "book", max_tokens=0)
    lengths, forward = [], engine.model.forward

    def slowly(input_ids, **options):
        lengths.append(input_ids.shape[1])
        time.sleep(0.05)
        return forward(input_ids, **options)

    monkeypatch.setattr(engine.model, "forward", slowly)
    monkeypatch.setattr(serve, "TOKENS_PER_CALL", N)
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.3), random_text(words), "book", max_tokens, stream=stream)
    # This is answered once the model is free again.
    assert text_of(ask(client, random_text(6))) == generated(engine, random_text(6))
    assert tokens_read(client, "book") == 13
    assert lengths.count(N) < 60


def test_sessions_are_listed_while_they_change(client, engine):
    class Changing:
        nbytes = 0

        @property
        def tokens_read(self):
            engine.sessions.pop("b", None)
            engine.sessions["c"] = engine.sessions["d"] = self
            return 7

    engine.sessions |= {"a": Changing(), "b": engine.model.new_cache()}
    listed = client.get("/sessions", cast_to=object)["data"]
    assert [(session["id"], session["tokens_read"]) for session in listed] == [("a", 7), ("b", 0)]


def test_refusals_are_errors_of_the_api(client, engine, monkeypatch):
    def refused(kind, code, call):
        with pytest.raises(kind) as caught:
            call()
        error = caught.value.body
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == code
        assert error["message"]
        return error

    bad, unknown = openai.BadRequestError, openai.NotFoundError
    assert "no session 'x'" in refused(unknown, "unknown_session", lambda: ask(client, "w1", "x"))["message"]
    refused(unknown, "unknown_session", lambda: list(ask(client, "w1", "x", stream=True)))
    refused(unknown, "unknown_session", lambda: client.delete("/sessions/x", cast_to=object))
    refused(unknown, "unknown_memory", lambda: open_session(client, "a", memory="x"))
    refused(unknown, "model_not_found", lambda: ask(client, "w1", model="gpt"))
    refused(unknown, None, lambda: client.embeddings.create(model="infini", input="w1"))
    open_session(client, "a")
    refused(openai.ConflictError, "session_exists", lambda: open_session(client, "a"))
    refused(bad, "empty_session", lambda: client.post("/sessions/a/save", body={}, cast_to=object))
    open_session(client, "b")
    refused(openai.RateLimitError, "too_many_sessions", lambda: open_session(client, "c"))
    client.delete("/sessions/b", cast_to=object)
    open_session(client, "c")
    assert refused(bad, None, lambda: ask(client, "w1", temperature=3))["param"] == "temperature"
    assert refused(bad, None, lambda: ask(client, "w1", seed=2**63))["param"] == "seed"
    assert refused(bad, None, lambda: ask(client, "w1", n=2))["param"] == "n"
    assert refused(bad, None, lambda: ask(client, []))["param"] == "messages"
    assert refused(bad, None, lambda: ask(client, ""))["param"] == "messages"
    assert refused(bad, None, lambda: open_session(client, "../x"))["param"] == "id"
    assert tokens_read(client, "a") == 0

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.model, "generate", fail)
    error = refused(openai.InternalServerError, None, lambda: ask(client, "w1 w2", "a"))
    assert "out of memory" in error["message"]
    with pytest.raises(openai.APIError, match="out of memory"):
        list(ask(client, "w1 w2", "a", stream=True))
    assert tokens_read(client, "a") == 0
    monkeypatch.setattr(engine, "describe", fail)
    error = refused(openai.InternalServerError, None, lambda: tokens_read(client, "a"))
    assert "out of memory" in error["message"]


# Fields of OpenAI's requests: values that ask for nothing, and values that ask for something.
NEUTRAL_AND_NOT = {
    "audio": ([], [{"voice": "alloy", "format": "wav"}]),
    "frequency_penalty": ([0, 0.0], [0.5, True]),
    "function_call": (["none", "auto"], [{"name": "f"}]),
    "functions": ([[]], [[{"name": "f"}]]),
    "logit_bias": ([{}], [{"3": 5}]),
    "logprobs": ([False], [True, 0]),
    "modalities": ([["text"]], [["text", "audio"]]),
    "moderation": ([], [{"model": "omni-moderation-latest"}]),
    "n": ([1], [2, True]),
    "parallel_tool_calls": ([True, False], ["yes"]),
    "prediction": ([], [{"type": "content", "content": "w1"}]),
    "presence_penalty": ([0, 0.0], [-1]),
    "prompt_cache_options": ([{"mode": "implicit"}], [{"mode": "explicit"}]),
    "prompt_cache_retention": (["in_memory"], ["24h"]),
    "reasoning_effort": (["none"], ["high"]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}]),
    "service_tier": (["auto", "default"], ["flex"]),
    "stop": ([[]], ["w3", ["w3"]]),
    "store": ([False], [True]),
    "stream_options": ([{}, {"include_usage": False, "include_obfuscation": False}], [{"include_obfuscation": True}]),
    "tool_choice": (["none", "auto"], ["required"]),
    "tools": ([[]], [[{"type": "function", "function": {"name": "f"}}]]),
    "top_logprobs": ([0], [3]),
    "verbosity": (["medium"], ["low"]),
    "web_search_options": ([], [{}]),
}
# Any value of a label leaves the answer as it is.
LABELS = {"metadata": {"run": "7"}, "prompt_cache_key": "x", "safety_identifier": "x", "user": "x"}
SERVED = {"model", "messages", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed"}


def test_fields_that_ask_for_nothing_pass_and_others_are_refused_by_name(client):
    known = get_type_hints(CompletionCreateParamsNonStreaming) | get_type_hints(CompletionCreateParamsStreaming)
    assert known.keys() <= NEUTRAL_AND_NOT.keys() | LABELS.keys() | SERVED
    text = random_text(9)
    expected = text_of(ask(client, text))
    for name, (neutral, others) in NEUTRAL_AND_NOT.items():
        for value in (None, *neutral):
            assert text_of(ask(client, text, extra_body={name: value})) == expected, (name, value)
        for value in others:
            with pytest.raises(openai.BadRequestError) as caught:
                ask(client, text, extra_body={name: value})
            assert caught.value.param.startswith(name), (name, value)
    for name, value in LABELS.items():
        for given in (None, value):
            assert text_of(ask(client, text, **{name: given})) == expected, name
    for name in SERVED - {"model", "messages", "temperature"}:
        limit = {} if name != "max_tokens" else {"max_completion_tokens": 12}
        assert text_of(ask(client, text, **{name: None, **limit})) == expected, name
    assert text_of(ask(client, text, extra_body={"top_k": None})) == expected
    with pytest.raises(openai.BadRequestError, match="top_k"):
        ask(client, text, extra_body={"top_k": 5})
    # All at once, as frameworks send them.
    everything = {name: neutral[0] if neutral else None for name, (neutral, _) in NEUTRAL_AND_NOT.items()}
    assert text_of(ask(client, text, extra_body={**everything, **LABELS})) == expected


def test_two_limits_must_agree(client):
    text = random_text(9)
    assert text_of(ask(client, text, max_completion_tokens=12)) == text_of(ask(client, text))
    with pytest.raises(openai.BadRequestError, match="differs from max_tokens"):
        ask(client, text, max_completion_tokens=3)


def test_messages_come_as_clients_send_them(folder):
    engine = make_engine(folder, CHAT_TEMPLATE)
    roles = ("system", "user", "assistant", "user")
    plain = [{"role": role, "content": random_text(4, seed=seed)} for seed, role in enumerate(roles)]
    parts = [
        {**message, "content": [{"type": "text", "text": text} for text in re.split("(?= )", message["content"])]}
        for message in plain
    ]
    unset = dict.fromkeys(("name", "refusal", "annotations", "audio", "function_call", "tool_calls"))
    with running(engine) as client:
        expected = ask(client, plain)
        for messages in (
            parts,
            [{**message, **unset} for message in plain],
            [{**message, "tool_calls": [], "annotations": []} for message in plain],
            [{**plain[0], "role": "developer"}, *plain[1:]],
        ):
            found = ask(client, messages)
            assert text_of(found) == text_of(expected)
            assert found.usage.prompt_tokens == expected.usage.prompt_tokens
        # What a client has got, it sends back.
        answer = expected.choices[0].message
        assert text_of(ask(client, [*plain, answer.model_dump(), *plain[1:2]])) == text_of(
            ask(client, [*plain, {"role": "assistant", "content": answer.content}, *plain[1:2]])
        )
        for refused in (
            [{**plain[1], "name": "Ada"}],
            [{**plain[1], "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
            [{**plain[1], "content": [{"type": "text", "text": "w1", "cache_control": {}}]}],
            [
                {
                    **plain[2],
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}],
                }
            ],
            [{"role": "tool", "content": "w1", "tool_call_id": "1"}],
            [{**plain[1], "content": None}],
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                ask(client, refused)
            assert caught.value.param.startswith("messages"), refused


def test_transformers_serve_must_be_given_the_class(folder, monkeypatch):
    from transformers.cli.serving import model_manager

    def load():
        manager = model_manager.ModelManager(device="cpu", force_model=str(folder), trust_remote_code=True)
        (served,) = manager.loaded_models.values()
        return served.model

    with pytest.raises(AttributeError, match="module transformers has no attribute InfiniForCausalLM"):
        load()
    monkeypatch.setattr(model_manager.transformers, "InfiniForCausalLM", InfiniForCausalLM, raising=False)
    assert isinstance(load(), InfiniForCausalLM)


@pytest.mark.slow
def test_the_command_serves_a_folder(folder):
    file = Path(__file__).parent.parent / "examples" / "serve.py"
    process = subprocess.Popen([sys.executable, file, folder, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stderr if "running on" in line)
        port = int(line.split("127.0.0.1:")[1].split()[0])
        with client_of(port) as client:
            expected = generated(make_engine(folder), random_text(9))
            assert text_of(ask(client, random_text(9))) == expected
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()
