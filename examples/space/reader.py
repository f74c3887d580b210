"""What the page does: opens models, reads texts, writes from what was read, and keeps memories as files."""

import copy
import hashlib
import json
import lzma
import re
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock, Thread

import torch
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from infini_transformers.conversion import convert_to_infini
from infini_transformers.conversion.gguf_files import is_gguf
from infini_transformers.conversion.memory_weights import MemoryWeights
from infini_transformers.evaluation.examples import opening_ids
from infini_transformers.evaluation.haystacks import encode
from infini_transformers.evaluation.loading import load_model, load_tokenizer
from infini_transformers.evaluation.retrieval import weights_digest
from infini_transformers.evaluation.wordings import PAPER_WORDING
from modeling_infini import InfiniCache, InfiniConfig, state_nbytes


MEMORY_FILE = "memory.json"
CACHE_FILE = "infini_cache.safetensors"
MEMORY_FORMAT = "memory of a text"
SEGMENT_LENGTH = 512
# What reading an archive that somebody else made can raise: RuntimeError where it has a password, NotImplementedError
# (which is one) where it is compressed in a way that is not known here.
ARCHIVE_ERRORS = (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)

ShouldStop = Callable[[], bool]


class ReaderError(ValueError):
    """What whoever uses the page can put right; the message says how."""


@dataclass
class Reader:
    """A model with Infini-attention, and its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def config(self) -> InfiniConfig:
        return self.model.config

    @property
    def can_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    @cached_property
    def weights_digest(self) -> str:
        """Tells models of the same shape apart."""
        return weights_digest(self.model)


@dataclass
class Memory:
    """
    What a model keeps of a text.

    Attributes:
        cache: has read all tokens but the last.
        last_token: read with whatever comes next, since it takes a new token to go on from a cache.
        title: of the text.
    """

    cache: InfiniCache
    last_token: int
    title: str

    @property
    def tokens(self) -> int:
        return int(self.cache.tokens_read) + 1

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def norms(self) -> torch.Tensor:
        """Frobenius norms of the memory M, `(layers, kv_heads)`: zero until the first segment has ended."""
        return torch.stack([layer.memory[0].norm(dim=(-2, -1)).cpu() for layer in self.cache.layers])


@dataclass(frozen=True)
class Progress:
    """
    How far a text has been read.

    Attributes:
        tokens: read so far, of `total`.
        rate: tokens per second.
    """

    memory: Memory
    tokens: int
    total: int
    rate: float

    @property
    def is_finished(self) -> bool:
        return self.tokens == self.total

    @property
    def tokens_in_the_end(self) -> int:
        """Of the memory, with what it held before."""
        return self.memory.tokens + self.total - self.tokens


class Library:
    """
    Models by their names, opened when they are first asked for.

    Args:
        sources: folders, `.gguf` files or ids on the Hub, of models with Infini-attention or of those that
            `convert_to_infini` takes.
        folder: where converted models are kept.
        memories: by the source, the folder of the memory that it is converted with.
    """

    def __init__(self, sources: list[str], folder: Path, memories: Mapping[str, Path] | None = None):
        sources = list(dict.fromkeys(sources))
        names = [_name(source) for source in sources]
        # Those with the same name go by where they are.
        self.sources = {name if names.count(name) == 1 else source: source for name, source in zip(names, sources)}
        self.folder = folder
        self.memories = memories or {}
        self._readers: dict[str, Reader] = {}
        self._lock = Lock()

    @property
    def names(self) -> list[str]:
        return list(self.sources)

    def open(self, name: str) -> Reader:
        """
        Raises:
            ReaderError: if there is no such model, or it cannot be loaded or converted.
        """
        if name not in self.sources:
            raise ReaderError(f"There is no model {name!r} here. Choose one of {', '.join(self.names)}.")
        with self._lock:
            if name not in self._readers:
                source = self.sources[name]
                self._readers[name] = open_reader(source, self.folder, name, self.memories.get(source))
        return self._readers[name]


def _name(source: str) -> str:
    """How a source is called on the page."""
    path = Path(source)
    if is_gguf(path):
        return path.name.split(".")[0]
    return path.resolve().name if path.is_dir() else source


def open_reader(source: str, folder: Path, name: str | None = None, memory: Path | None = None) -> Reader:
    """
    The model in a folder, a `.gguf` file or on the Hub, converted into a subfolder of `folder` if it is a Llama: with
    a memory that was trained for it, if there is one.

    Raises:
        ReaderError: if it cannot be loaded or converted; the message has the reason.
    """
    name = name or _name(source)
    try:
        if is_gguf(source) or AutoConfig.from_pretrained(source).model_type != "infini":
            digest = hashlib.sha256(source.encode()).hexdigest()[:8]
            trained = None if memory is None else MemoryWeights.load(memory)
            kind = SEGMENT_LENGTH if trained is None else trained.digest[:8]
            converted = folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}-{kind}-{digest}"
            if not converted.exists():
                segment_length = SEGMENT_LENGTH if trained is None else None
                convert_to_infini(source, converted, segment_length=segment_length, memory=trained)
            source = str(converted)
        return Reader(name, load_model(source).eval(), load_tokenizer(source))
    except (OSError, ValueError, ImportError) as error:
        raise ReaderError(f"The model {name} cannot be opened: {error}") from error


def full_attention_nbytes(reader: Reader, tokens: int) -> int:
    """Bytes of the keys and values that full attention keeps for `tokens` tokens."""
    config = reader.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    return numbers * reader.model.dtype.itemsize


def read_text_file(path: str | Path | None) -> str:
    """
    Raises:
        ReaderError: if there is no file, or it is no text in UTF-8.
    """
    if path is None:
        raise ReaderError("Choose a text file first: press the field for files, or drop one there.")
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ReaderError(f"{path.name} is not a text in UTF-8. Save it as plain text (.txt, UTF-8).") from error
    if "\0" in text:
        raise ReaderError(f"{path.name} is not a text but some other kind of file. Save it as plain text (.txt).")
    return text


def text_ids(reader: Reader, text: str, tokens: int) -> torch.Tensor:
    """
    Ids of the first `tokens` tokens of a text, `(tokens,)`, or fewer if it is shorter.

    Raises:
        ReaderError: if the text is shorter than two tokens, or so few are to be read.
    """
    _require_text(text)
    if tokens < 2:
        raise ReaderError("Read at least 2 tokens: the last one waits for what comes next.")
    ids = _first_ids(reader.tokenizer, text.strip(), tokens)
    if len(ids) < 2:
        raise ReaderError("The text is too short: it takes at least two tokens. Paste a few sentences.")
    return ids


def hide_number(reader: Reader, text: str, tokens: int, number: str, depth: float) -> torch.Tensor:
    """
    Ids of a text with a number hidden in it, as in the passkey task: `(tokens,)`, or fewer if the text is shorter.

    Args:
        depth: 0 at the start of the text, 1 at its end.

    Raises:
        ReaderError: if there is no text, the number is not one of five digits, or there is no room for it.
    """
    _require_text(text)
    number = number.strip()
    if not re.fullmatch(r"[0-9]{5}", number):
        raise ReaderError(f"The number to hide has five digits, as 48213 has; {number!r} is none.")
    tokenizer = reader.tokenizer
    opening = torch.cat([opening_ids(tokenizer), encode(tokenizer, PAPER_WORDING.opening)])
    needle = encode(tokenizer, " " + PAPER_WORDING.needle.format(key=number))
    least = len(opening) + len(needle) + 1
    if tokens < least:
        raise ReaderError(f"Read at least {least} tokens: so many take the number and what is said of it.")
    # White space is single spaces in that task.
    ids = _first_ids(tokenizer, " " + " ".join(text.split()), tokens - least + 1, add_special_tokens=False)
    cut = round(depth * len(ids))
    return torch.cat([opening, ids[:cut], needle, ids[cut:]])


def _require_text(text: str) -> None:
    if not text.strip():
        raise ReaderError("The text is empty. Paste some text, or choose another source.")


def _first_ids(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, **options) -> torch.Tensor:
    # A prefix is enough, and to split all of a book takes seconds.
    characters = 8 * tokens
    while True:
        ids = tokenizer(text[:characters], verbose=False, **options).input_ids
        if len(ids) > tokens or characters >= len(text):
            return torch.tensor(ids[:tokens], dtype=torch.long)
        characters *= 2


@torch.no_grad()
def read(
    reader: Reader,
    ids: torch.Tensor,
    title: str,
    memory: Memory | None = None,
    should_stop: ShouldStop = lambda: False,
    seconds_per_call: float = 0.5,
) -> Iterator[Progress]:
    """
    Reads a text in calls of about `seconds_per_call`, and says after each how far it is. Each call reads into a copy:
    a memory that was passed or yielded stays as it is, also where a later call fails.

    Args:
        ids: `(tokens,)`.
        title: of the text.
        memory: what was read before, which goes on; by default, nothing.
        should_stop: asked after each call, whether to leave it there.
    """
    cache = reader.model.new_cache() if memory is None else memory.cache
    ahead = ids if memory is None else torch.cat([torch.tensor([memory.last_token]), ids])
    done, length, begin = 0, 64, time.perf_counter()
    while done < len(ahead) - 1:
        call_begin = time.perf_counter()
        cache = copy.deepcopy(cache)
        chunk = ahead[done : min(done + length, len(ahead) - 1)]
        reader.model(chunk[None].to(reader.model.device), past_key_values=cache, logits_to_keep=1)
        done += len(chunk)
        now = time.perf_counter()
        if now - call_begin < seconds_per_call / 2:
            length = min(2 * length, max(4096, 4 * reader.config.segment_length))
        elif now - call_begin > 2 * seconds_per_call:
            length = max(64, length // 2)
        memory = Memory(cache, int(ahead[done]), title)
        yield Progress(memory, done + 1 - (len(ahead) - len(ids)), len(ids), done / (now - begin))
        if should_stop():
            return


def prompt_ids(reader: Reader, words: str, as_chat: bool) -> torch.Tensor:
    """Ids of what is said after the text, `(tokens,)`; no words are none."""
    if not words.strip():
        return torch.empty(0, dtype=torch.long)
    if as_chat:
        if not reader.can_chat:
            raise ReaderError(f"{reader.name} has no chat format. Untick it: the words then follow the text as typed.")
        turn = [{"role": "user", "content": words.strip()}]
        rendered = reader.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return encode(reader.tokenizer, rendered)
    # A space at the end stays: some tokenizers make it a token of its own, which a number has to follow.
    return encode(reader.tokenizer, words if words[0].isspace() else " " + words)


class _Stop(StoppingCriteria):
    def __init__(self, should_stop: ShouldStop):
        self.should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.should_stop(), device=input_ids.device)


def write(
    reader: Reader,
    memory: Memory,
    words: str = "",
    as_chat: bool = False,
    new_tokens: int = 60,
    temperature: float = 0.0,
    repetition_penalty: float = 1.0,
    should_stop: ShouldStop = lambda: False,
) -> Iterator[str]:
    """
    Goes on from a copy of the memory, which itself stays as it is: yields all that is written so far, again and again.

    Args:
        words: said after the text; by default nothing, and the text is continued.
        as_chat: whether they are a user's turn, in the chat format of the model.
        temperature: of sampling; 0 takes the likeliest token each time.
    """
    prompt = torch.cat([torch.tensor([memory.last_token]), prompt_ids(reader, words, as_chat)])[None]
    prompt = prompt.to(reader.model.device)
    cache = copy.deepcopy(memory.cache)
    streamer = TextIteratorStreamer(reader.tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    stopped = False
    errors: list[Exception] = []

    def generate() -> None:
        try:
            # generate() takes ids that are more than the cache has read for all of the text: it gets the last one.
            if prompt.shape[1] > 1:
                with torch.no_grad():
                    reader.model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1)
            reader.model.generate(
                prompt[:, -1:],
                attention_mask=torch.ones_like(prompt[:, -1:]),
                past_key_values=cache,
                max_new_tokens=new_tokens,
                repetition_penalty=repetition_penalty,
                stopping_criteria=StoppingCriteriaList([_Stop(lambda: stopped or should_stop())]),
                streamer=streamer,
                **sampling,
            )
        except Exception as error:
            errors.append(error)
        finally:
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    written = ""
    try:
        for piece in streamer:
            if piece:
                written += piece
                yield written
    finally:
        # Also where whoever listens has gone.
        stopped = True
        thread.join()
    if errors:
        raise errors[0]


def save_memory(reader: Reader, memory: Memory, folder: Path) -> Path:
    """Saves a memory as one file in `folder`: a zip archive of the cache's own file and what belongs to it."""
    title = re.sub(r"[^a-z0-9]+", "-", memory.title.lower()).strip("-") or "text"
    file = folder / f"memory-{title}-{memory.tokens}-tokens.zip"
    description = {
        "format": MEMORY_FORMAT,
        "model": reader.name,
        "weights": reader.weights_digest,
        "title": memory.title,
        "last_token": memory.last_token,
    }
    with tempfile.TemporaryDirectory() as cache_folder:
        memory.cache.save_pretrained(cache_folder)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(MEMORY_FILE, json.dumps(description, indent=2))
            archive.write(Path(cache_folder) / CACHE_FILE, CACHE_FILE)
    return file


def load_memory(reader: Reader, file: str | Path) -> Memory:
    """
    The memory that [`save_memory`] saved.

    Raises:
        ReaderError: if the file is none, is damaged, or was saved with another model.
    """
    file = Path(file)
    not_a_memory = ReaderError(f"{file.name} is not a memory. Load a .zip file that “Save memory” has made.")
    try:
        archive = zipfile.ZipFile(file)
    except ARCHIVE_ERRORS as error:
        raise not_a_memory from error
    with archive:
        parts = {part.filename: part for part in archive.infolist()}
        # Whoever sends a file decides how much is in it.
        if MEMORY_FILE not in parts or parts[MEMORY_FILE].file_size > 100_000:
            raise not_a_memory
        try:
            description = json.loads(archive.read(MEMORY_FILE))
        except ARCHIVE_ERRORS as error:
            raise not_a_memory from error
        if not isinstance(description, dict) or description.get("format") != MEMORY_FORMAT:
            raise not_a_memory
        if description.get("weights") != reader.weights_digest:
            raise ReaderError(
                f"{file.name} is a memory of the model {description.get('model')}; to {reader.name} it means nothing. "
                "Choose the model that it was made with, and load it again."
            )
        if sum(part.file_size for part in parts.values()) > 2 * state_nbytes(reader.config) + 1_000_000:
            raise ReaderError(f"{file.name} is larger than a memory of {reader.name} can be. Save the memory again.")
        cache = _extract_cache(reader, archive, file.name)
    last_token = description.get("last_token")
    if not isinstance(last_token, int) or not 0 <= last_token < reader.config.vocab_size:
        raise ReaderError(f"{file.name} is damaged: it does not say which token comes next. Save the memory again.")
    return Memory(cache, last_token, str(description.get("title")))


def _extract_cache(reader: Reader, archive: zipfile.ZipFile, name: str) -> InfiniCache:
    with tempfile.TemporaryDirectory() as folder:
        try:
            if CACHE_FILE in archive.namelist():
                archive.extract(CACHE_FILE, folder)
            cache = InfiniCache.from_pretrained(folder, reader.model)
        except ARCHIVE_ERRORS as error:
            reason = str(error).replace(folder, name)
            raise ReaderError(f"{name} cannot be loaded: {reason} Save the memory again.") from error
    if (rows := len(cache.tokens_read)) > 1:
        raise ReaderError(f"{name} holds the memories of {rows:,} texts; this page loads those of one.")
    return cache
