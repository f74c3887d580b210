"""
Serves a model as OpenAI-compatible `/v1/chat/completions`, with sessions whose memory goes on from request to
request: a book is sent once, and asked about many times. Each session is one cache, whose size never grows.

    pip install "transformers[serving]"
    python examples/serve.py path/to/model --memories memories

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.post("/sessions", body={"id": "moby"}, cast_to=object)
    chat, session = client.chat.completions, {"session": "moby"}
    chat.create(model="infini", messages=[{"role": "user", "content": book}], max_tokens=0, extra_body=session)
    chat.create(model="infini", messages=[{"role": "user", "content": question}], extra_body=session)
    client.post("/sessions/moby/save", body={}, cast_to=object)
    client.post("/sessions", body={"id": "moby-2", "memory": "moby"}, cast_to=object)  # goes on from the saved memory

In a session, `messages` are the new ones alone; without one, they are the whole conversation. `max_tokens=0` reads and
writes nothing. Fields of OpenAI's API that are not served may hold values that ask for nothing (`n=1`, `stop=null`);
others are refused by name. A request that fails, or whose client goes away before it is answered, leaves its session
as it was.
Requests are answered one after the other. vLLM answers many at once (docs/vllm.md), and has no sessions.
There is no authentication: listen to this machine alone.
"""

import argparse
import asyncio
import copy
import functools
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2.exceptions import TemplateError
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from transformers import AsyncTextIteratorStreamer, AutoTokenizer, PreTrainedTokenizerBase, StoppingCriteria

from modeling_infini import InfiniCache, InfiniForCausalLM


logger = logging.getLogger("uvicorn.error")

# For models without a chat template: the contents, one after the other.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
LAST_ANSWER = "the answer before the new messages"
# Before each call, reading a prompt ends if the client has gone away. The model itself reads about as many at once.
TOKENS_PER_CALL = 4096

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


# Fields of the API that are not served, and their values that ask for nothing. So does null, of any field.
UNSERVED: dict[str, list] = {
    "audio": [],
    "frequency_penalty": [0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "logprobs": [False],
    "modalities": [["text"]],
    "moderation": [],
    "n": [1],
    "parallel_tool_calls": [True, False],
    "prediction": [],
    "presence_penalty": [0],
    "prompt_cache_options": [{}, {"mode": "implicit"}],
    "prompt_cache_retention": ["in_memory"],
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "service_tier": ["auto", "default"],
    "stop": [[]],
    "store": [False],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
    "verbosity": ["medium"],
    "web_search_options": [],
}
UNSERVED_OF_MESSAGES: dict[str, list] = {
    "annotations": [[]],
    "audio": [],
    "function_call": [],
    "name": [],
    "refusal": [],
    "tool_calls": [[]],
}


class Body(BaseModel):
    # A field that is not served is refused, and not ignored.
    model_config = ConfigDict(extra="forbid")
    unserved: ClassVar[dict[str, list]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body):
        if not isinstance(body, dict):
            return body
        body = {name: value for name, value in body.items() if value is not None}
        for name, neutral in cls.unserved.items():
            # By type as well, since True is 1 in Python.
            asks = name in body and not any(
                body[name] == same and isinstance(body[name], bool) == isinstance(same, bool) for same in neutral
            )
            if asks:
                raise PydanticCustomError("unserved", "{name} is not served: leave it out", {"name": name})
        return {name: value for name, value in body.items() if name not in cls.unserved}


def _whole(text: str) -> str:
    """Clients that cut a text may leave half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half of a character (a surrogate), where it was cut") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    unserved = UNSERVED_OF_MESSAGES
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[TextPart], Tag("parts")],
        Discriminator(lambda content: "parts" if isinstance(content, list) else "text"),
    ]

    def turn(self) -> dict[str, str]:
        """The message as chat templates know it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(Body):
    include_usage: bool = False
    # True would ask for padding around each piece.
    include_obfuscation: Literal[False] = False


class ChatRequest(Body):
    unserved = UNSERVED
    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    session: Name | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    # Labels of the request: no answer depends on them.
    user: str | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _have_one_limit(cls, value, info):
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise ValueError("differs from max_tokens, its older name: leave one of them out")
        return value


class NewSession(Body):
    id: Name | None = None
    memory: Name | None = None


class SaveRequest(Body):
    memory: Name | None = None


class ApiError(Exception):
    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        self.status, self.message, self.param, self.code = status, message, param, code


def error_response(error: ApiError) -> JSONResponse:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    body = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return JSONResponse({"error": body}, error.status)


class Answer(NamedTuple):
    text: str
    finish_reason: Literal["stop", "length"]
    usage: CompletionUsage


class StopWhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def sampling_options(request: ChatRequest) -> dict:
    """Options of generate(); what the request leaves open is as in the model's generation configuration."""
    # The best token is certain there, and logits that are divided by less become infinite.
    if request.temperature is not None and request.temperature < 1e-5:
        return {"do_sample": False}
    options = {"temperature": request.temperature, "top_p": request.top_p}
    options = {name: value for name, value in options.items() if value is not None}
    # A seed asks for sampling too.
    return {"do_sample": True, **options} if options or request.seed is not None else {}


class Engine:
    """The model and its sessions. One thread alone runs the model, so requests are answered one after the other."""

    def __init__(
        self,
        model: InfiniForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        max_sessions: int = 16,
        memories: Path | None = None,
        max_new_tokens: int = 256,
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_sessions, self.memories, self.max_new_tokens = max_sessions, memories, max_new_tokens
        self.sessions: dict[str, InfiniCache] = {}
        self.thread = ThreadPoolExecutor(max_workers=1)

    async def run(self, function, *arguments):
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)
        except ApiError:
            raise
        except Exception as error:
            logger.exception("A request failed")
            raise ApiError(500, f"{type(error).__name__}: {error}") from error

    def session(self, name: str) -> InfiniCache:
        # Once, since the engine's thread may close it meanwhile.
        cache = self.sessions.get(name)
        if cache is None:
            message = f"There is no session {name!r}: POST /v1/sessions first."
            raise ApiError(404, message, "session", "unknown_session")
        return cache

    def describe(self, name: str, cache: InfiniCache) -> dict:
        tokens = 0 if cache.tokens_read is None else int(cache.tokens_read)
        return {"id": name, "object": "session", "tokens_read": tokens, "bytes": cache.nbytes}

    def open(self, request: NewSession) -> dict:
        name = request.id or uuid.uuid4().hex
        if name in self.sessions:
            raise ApiError(409, f"There is a session {name!r} already.", "id", "session_exists")
        if len(self.sessions) >= self.max_sessions:
            message = f"All {self.max_sessions} sessions are in use: DELETE /v1/sessions/ID first."
            raise ApiError(429, message, code="too_many_sessions")
        cache = self.model.new_cache() if request.memory is None else self.load(request.memory)
        self.sessions[name] = cache
        return self.describe(name, cache)

    def load(self, memory: str) -> InfiniCache:
        """A saved memory, which a session can go on from."""
        folder = self.folder(memory)
        try:
            cache = type(self.model.new_cache()).from_pretrained(folder, self.model)
            rows, dtype = len(cache.tokens_read), cache.layers[0].keys.dtype
            if rows != 1:
                raise ValueError(f"The memory {memory!r} is of {rows} texts, and a session reads one.")
            if dtype != self.model.dtype:
                raise ValueError(f"The memory {memory!r} is of {dtype}, and the model of {self.model.dtype}.")
        except FileNotFoundError:
            raise ApiError(404, f"No memory {memory!r} is saved.", "memory", "unknown_memory") from None
        except ValueError as error:
            raise ApiError(400, str(error), "memory", "unfit_memory") from None
        return cache

    def save(self, name: str, memory: str) -> dict:
        try:
            self.session(name).save_pretrained(self.folder(memory))
        except ValueError as error:
            raise ApiError(400, str(error), code="empty_session") from None
        return {"id": memory, "object": "memory"}

    def close(self, name: str) -> dict:
        self.session(name)
        del self.sessions[name]
        return {"id": name, "object": "session", "deleted": True}

    def folder(self, memory: str) -> Path:
        if self.memories is None:
            raise ApiError(400, "This server saves no memories: start it with --memories FOLDER.", "memory")
        return self.memories / memory

    def prompt(self, messages: list[Message], goes_on: bool) -> torch.Tensor:
        """The ids of `messages`, `(1, length)`; where they go on, of all that follows the last answer."""
        turns = [message.turn() for message in messages]
        if goes_on:
            turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": LAST_ANSWER}, *turns]
        template = self.tokenizer.chat_template or PLAIN_TEMPLATE
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise ApiError(400, f"The model's chat template refuses the messages: {error}", "messages") from None
        if goes_on:
            if LAST_ANSWER not in text:
                message = "The model's chat template leaves earlier answers out, so that no session can go on with it."
                raise ApiError(400, message, "session")
            text = text.partition(LAST_ANSWER)[2]
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        if ids.shape[1] == 0:
            raise ApiError(400, "The messages are empty: there is nothing to read.", "messages")
        if not goes_on and self.tokenizer.chat_template is None:
            ids = torch.cat([ids.new_tensor([self.opening()]), ids], 1)
        return ids.to(self.model.device)

    def opening(self) -> list[int]:
        """What the tokenizer puts before every text, its BOS token or nothing; chat templates write it themselves."""
        # Not all that it puts around a text: some add an EOS token too.
        first = self.tokenizer("").input_ids[:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    @torch.no_grad()
    def answer(
        self, request: ChatRequest, streamer: AsyncTextIteratorStreamer | None, stop: threading.Event
    ) -> Answer:
        """Reads the messages and generates; only then, the session has read both."""
        # A copy, so that nothing is half read where something goes wrong.
        cache = self.model.new_cache() if request.session is None else copy.deepcopy(self.session(request.session))
        ids = self.prompt(request.messages, goes_on=cache.get_seq_length() > 0)
        limit = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
        limit = self.max_new_tokens if limit is None else limit
        # generate() takes ids longer than what was read for the whole history: it gets the last one alone.
        self.read(ids if limit == 0 else ids[:, :-1], cache, stop)
        new = ids.new_empty(0)
        if limit > 0 and not stop.is_set():
            new = self.generate(ids[:, -1:], cache, request, limit, streamer, stop)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        is_complete = len(new) > 0 and int(new[-1]) in ends
        if request.session in self.sessions and not stop.is_set():
            # The last token was generated, but not read. The one that ends an answer is the template's to write.
            if len(new) > 0 and not is_complete:
                self.model(new[None, -1:], past_key_values=cache)
            self.sessions[request.session] = cache
        usage = CompletionUsage(
            prompt_tokens=ids.shape[1], completion_tokens=len(new), total_tokens=ids.shape[1] + len(new)
        )
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return Answer(text, "stop" if is_complete else "length", usage)

    def read(self, ids: torch.Tensor, cache: InfiniCache, stop: threading.Event) -> None:
        """Reads `ids`, `(1, length)`, or only some of them where `stop` is set."""
        for start in range(0, ids.shape[1], TOKENS_PER_CALL):
            if stop.is_set():
                return
            self.model(ids[:, start : start + TOKENS_PER_CALL], past_key_values=cache, logits_to_keep=1)

    def generate(
        self,
        last: torch.Tensor,
        cache: InfiniCache,
        request: ChatRequest,
        limit: int,
        streamer: AsyncTextIteratorStreamer | None,
        stop: threading.Event,
    ) -> torch.Tensor:
        """At most `limit` new ids, `(length,)`, after all that `cache` has read and the `last` id, `(1, 1)`."""
        # A seed is that of its request alone.
        with torch.random.fork_rng(enabled=request.seed is not None):
            if request.seed is not None:
                torch.manual_seed(request.seed)
            return self.model.generate(
                last,
                attention_mask=torch.ones_like(last),
                past_key_values=cache,
                max_new_tokens=limit,
                streamer=streamer,
                stopping_criteria=[StopWhenSet(stop)],
                **sampling_options(request),
            )[0, 1:]

    async def stream(self, request: ChatRequest, stop: threading.Event) -> AsyncIterator[str | Answer]:
        """The answer's text piece by piece, and then all of it."""
        streamer = AsyncTextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def run() -> Answer:
            try:
                return self.answer(request, streamer, stop)
            finally:
                streamer.end()

        answer = asyncio.ensure_future(self.run(run))
        try:
            async for text in streamer:
                if text:
                    yield text
            yield await answer
        finally:
            stop.set()


def build_app(engine: Engine, name: str) -> FastAPI:
    """The HTTP interface of `engine`, whose model is called `name`."""
    app, started = FastAPI(), int(time.time())

    @app.exception_handler(ApiError)
    async def _refuse(_: Request, error: ApiError):
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def _refuse_body(_: Request, error: RequestValidationError):
        first = error.errors()[0]
        where = [*first["loc"][1:], *([first["ctx"]["name"]] if first["type"] == "unserved" else [])]
        param = ".".join(map(str, where)) or None
        return error_response(ApiError(400, f"{param or 'body'}: {first['msg']}", param))

    @app.exception_handler(HTTPException)
    async def _refuse_route(_: Request, error: HTTPException):
        return error_response(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def _fail(_: Request, error: Exception):
        return error_response(ApiError(500, f"{type(error).__name__}: {error}"))

    @app.get("/v1/models")
    async def models():
        model = {"id": name, "object": "model", "created": started, "owned_by": "local"}
        return {"object": "list", "data": [model]}

    @app.get("/v1/sessions")
    async def list_sessions():
        # A copy, since the engine's thread opens and closes sessions meanwhile.
        sessions = engine.sessions.copy()
        return {"object": "list", "data": [engine.describe(session, cache) for session, cache in sessions.items()]}

    @app.post("/v1/sessions", status_code=201)
    async def open_session(request: NewSession):
        return await engine.run(engine.open, request)

    @app.get("/v1/sessions/{session}")
    async def describe_session(session: str):
        return engine.describe(session, engine.session(session))

    @app.delete("/v1/sessions/{session}")
    async def close_session(session: str):
        return await engine.run(engine.close, session)

    @app.post("/v1/sessions/{session}/save")
    async def save_session(session: str, request: SaveRequest):
        return await engine.run(engine.save, session, request.memory or session)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: Request):
        if request.model != name:
            raise ApiError(
                404, f"The model {request.model!r} is not served, but {name!r}.", "model", "model_not_found"
            )
        stop = threading.Event()
        fields = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if not request.stream:
            answer = await watched(engine.run(engine.answer, request, None, stop), http, stop)
            message = {"role": "assistant", "content": answer.text}
            choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
            completion = {**fields, "object": "chat.completion", "choices": [choice], "usage": answer.usage}
            return ChatCompletion.model_validate(completion).model_dump(exclude_none=True)
        # What is refused before the first piece is refused as a response, with its status.
        pieces = engine.stream(request, stop)
        first = await watched(anext(pieces), http, stop)
        chunk = functools.partial(event, {**fields, "object": "chat.completion.chunk"})
        include_usage = request.stream_options is not None and request.stream_options.include_usage
        return StreamingResponse(events(chunk, first, pieces, include_usage), media_type="text/event-stream")

    return app


async def watched(work: Awaitable, http: Request, stop: threading.Event):
    """What `work` gives; `stop` is set where the client goes away before."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        stop.set()

    watch_task = asyncio.create_task(watch())
    try:
        return await work
    finally:
        watch_task.cancel()


def event(fields: dict, choices: list[dict], usage: CompletionUsage | None = None) -> str:
    chunk = ChatCompletionChunk.model_validate({**fields, "choices": choices, "usage": usage})
    return f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"


async def events(chunk, first: str | Answer, pieces: AsyncIterator[str | Answer], include_usage: bool):
    """The server-sent events of an answer that comes in `pieces` after the `first`."""
    yield chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    piece = first
    try:
        while isinstance(piece, str):
            yield chunk([{"index": 0, "delta": {"content": piece}}])
            piece = await anext(pieces)
    except ApiError as error:
        yield f"data: {error_response(error).body.decode()}\n\n"
        return
    finally:
        await pieces.aclose()
    yield chunk([{"index": 0, "delta": {}, "finish_reason": piece.finish_reason}])
    if include_usage:
        yield chunk([], piece.usage)
    yield "data: [DONE]\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub id")
    parser.add_argument("--name", default="infini", help="of the model in requests (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as saved)")
    parser.add_argument("--max-sessions", type=int, default=16, help="kept at once (default: %(default)s)")
    parser.add_argument("--memories", type=Path, help="folder that sessions are saved in and loaded from")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="where a request sets none")
    options = parser.parse_args()

    model = InfiniForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    engine = Engine(model, tokenizer, options.max_sessions, options.memories, options.max_new_tokens)
    uvicorn.run(build_app(engine, options.name), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
