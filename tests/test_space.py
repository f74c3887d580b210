"""The page of `examples/space`: what it does with a text and a memory, and the page itself in a browser."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from base_models import base_model
from tiny import tiny_model
from words import WORDS, random_text, save_word_tokenizer

from infini_transformers.conversion import convert_to_infini, save_memory
from infini_transformers.evaluation.haystacks import REPEATED_SENTENCE
from modeling_infini import InfiniCache


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "space"))
import reader as space
import views


ROOT = Path(__file__).parent.parent
SPACE = ROOT / "examples" / "space"
PASSKEY = ROOT / "checkpoints" / "passkey"
QUESTION = "What is the pass key? The pass key is"
TEXT = random_text(300)


def save_model(folder: Path, **fields) -> str:
    tiny_model(**fields).save_pretrained(folder)
    save_word_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> space.Reader:
    folder = tmp_path_factory.mktemp("models")
    return space.open_reader(save_model(folder / "tiny"), folder)


def read_all(reader, ids, **options) -> space.Memory:
    *_, last = space.read(reader, ids, "a text", **options)
    return last.memory


def written(reader, memory, *arguments, **options) -> str:
    *_, last = "", *space.write(reader, memory, *arguments, **options)
    return last


def tensors(memory: space.Memory) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in memory.cache.state_dict().items()}


def test_reading_in_calls_is_reading_at_once(reader):
    ids = space.text_ids(reader, TEXT, 300)
    memory = read_all(reader, ids, seconds_per_call=0)
    cache = reader.model.new_cache()
    with torch.no_grad():
        reader.model(ids[None, :-1], past_key_values=cache)
    assert (memory.tokens, memory.last_token) == (300, int(ids[-1]))
    for name, tensor in cache.state_dict().items():
        torch.testing.assert_close(memory.cache.state_dict()[name], tensor, rtol=1e-4, atol=1e-4)


def test_progress_counts_tokens_and_memory_stays_as_large(reader):
    ids = space.text_ids(reader, TEXT, 250)
    steps = [
        (progress.tokens, progress.memory.tokens, progress.memory.nbytes, progress.is_finished)
        for progress in space.read(reader, ids, "a text", seconds_per_call=0)
    ]
    tokens, of_memory, nbytes, finished = zip(*steps)
    assert len(steps) > 2
    assert tokens == of_memory
    assert list(tokens) == sorted(set(tokens))
    assert tokens[-1] == 250
    assert len(set(nbytes)) == 1
    assert finished == (*[False] * (len(steps) - 1), True)


def test_reading_stops_and_goes_on(reader):
    ids = space.text_ids(reader, TEXT, 300)
    stopped = list(space.read(reader, ids, "a text", should_stop=lambda: True, seconds_per_call=0))
    assert len(stopped) == 1
    first = stopped[0]
    assert 1 < first.tokens < 300
    assert first.tokens_in_the_end == 300
    for rest in space.read(reader, ids[first.tokens :], "a text", memory=first.memory, seconds_per_call=0):
        assert rest.tokens_in_the_end == 300
    assert rest.is_finished
    assert rest.memory.tokens == 300
    for name, tensor in tensors(read_all(reader, ids)).items():
        torch.testing.assert_close(rest.memory.cache.state_dict()[name], tensor, rtol=1e-4, atol=1e-4)


def test_a_call_that_fails_leaves_what_was_read_before(reader, monkeypatch):
    ids = space.text_ids(reader, TEXT, 300)
    first = read_all(reader, ids[:100])
    calls, layer = [], reader.model.model.layers[1]
    forward = layer.forward

    def fails_at_last(*arguments, **options):
        calls.append(arguments)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return forward(*arguments, **options)

    monkeypatch.setattr(layer, "forward", fails_at_last)
    steps = space.read(reader, ids[100:], "a text", memory=first, seconds_per_call=0)
    second = next(steps).memory
    with pytest.raises(RuntimeError, match="out of memory"):
        next(steps)
    monkeypatch.undo()
    whole = tensors(read_all(reader, ids))
    for memory, tokens in ((first, 100), (second, second.tokens)):
        assert 100 <= memory.tokens == tokens < 300
        for name, tensor in tensors(read_all(reader, ids[tokens:], memory=memory)).items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("words", ["", " ".join(WORDS[3:9])])
@pytest.mark.parametrize("tokens", [2, 5, 200])
def test_writes_what_follows_the_whole_text(reader, words, tokens):
    ids = space.text_ids(reader, TEXT, tokens)
    whole = torch.cat([ids, space.prompt_ids(reader, words, as_chat=False)])[None]
    assert whole.shape[1] == tokens + len(words.split())
    expected = reader.model.generate(whole, max_new_tokens=12, do_sample=False, use_cache=False)
    answer = written(reader, read_all(reader, ids), words, new_tokens=12)
    assert answer.split() == reader.tokenizer.decode(expected[0, whole.shape[1] :], skip_special_tokens=True).split()


def test_questions_leave_the_memory_as_it_is(reader):
    memory = read_all(reader, space.text_ids(reader, TEXT, 203))
    before = tensors(memory)
    first = written(reader, memory, "w1 w2", new_tokens=9)
    other = written(reader, memory, "w8 w20 w3", new_tokens=9)
    assert first != other
    assert written(reader, memory, "w1 w2", new_tokens=9) == first
    for name, tensor in tensors(memory).items():
        assert torch.equal(tensor, before[name])


def test_writing_streams_and_stops(reader):
    memory = read_all(reader, space.text_ids(reader, TEXT, 100))
    pieces = list(space.write(reader, memory, new_tokens=10))
    assert len(pieces) > 5
    assert all(later.startswith(earlier) for earlier, later in pairwise(pieces))
    stopped = written(reader, memory, new_tokens=1000, should_stop=lambda: True)
    assert len(stopped.split()) == 1


def test_writing_tells_what_went_wrong(reader):
    memory = read_all(reader, space.text_ids(reader, TEXT, 100))
    with pytest.raises(IndexError):
        written(reader, space.Memory(memory.cache, 10_000, "a text"))


def test_chat_format_is_used_where_there_is_one(reader, tmp_path):
    memory = read_all(reader, space.text_ids(reader, TEXT, 100))
    with pytest.raises(space.ReaderError, match="no chat format"):
        written(reader, memory, "w1 w2", as_chat=True)
    chatty = space.open_reader(save_model(tmp_path / "chatty"), tmp_path)
    chatty.tokenizer.chat_template = "w7 {{ messages[0].content }} w9"
    ids = space.prompt_ids(chatty, " w1 w2 ", as_chat=True)
    assert chatty.tokenizer.decode(ids) == "w7 w1 w2 w9"


def test_saved_memory_goes_on_as_the_one_it_was(reader, tmp_path):
    memory = read_all(reader, space.text_ids(reader, TEXT, 153))
    file = space.save_memory(reader, memory, tmp_path)
    assert file.name == "memory-a-text-153-tokens.zip"
    loaded = space.load_memory(reader, file)
    assert (loaded.tokens, loaded.title) == (153, "a text")
    assert written(reader, loaded, "w4", new_tokens=9) == written(reader, memory, "w4", new_tokens=9)


def test_saved_memory_is_a_cache_for_others(reader, tmp_path):
    memory = read_all(reader, space.text_ids(reader, TEXT, 153))
    with zipfile.ZipFile(space.save_memory(reader, memory, tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked")
    cache = InfiniCache.from_pretrained(tmp_path / "unpacked", reader.model)
    assert int(cache.tokens_read) == 152
    assert json.loads((tmp_path / "unpacked" / "memory.json").read_text())["last_token"] == memory.last_token


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 1}, "is a memory of the model tiny; to other it means nothing"),
        (
            {"segment_length": 6},
            "memory-a-text-50-tokens.zip belongs to another model: it was made with segment_length=5",
        ),
    ],
    ids=["weights", "configuration"],
)
def test_memory_of_another_model_is_refused(reader, tmp_path, fields, message):
    file = space.save_memory(reader, read_all(reader, space.text_ids(reader, TEXT, 50)), tmp_path)
    other = space.open_reader(save_model(tmp_path / "other", **fields), tmp_path)
    with pytest.raises(space.ReaderError, match=message):
        space.load_memory(other, file)


def changed_archive(file: Path, output: Path, **contents: bytes | None) -> Path:
    """A copy of an archive with other contents, by the name of the file: `None` leaves it out."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = contents.get(name.replace(".", "_"), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return output


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"memory_json": None}, "is not a memory"),
        ({"memory_json": b"[]"}, "is not a memory"),
        ({"memory_json": b"{"}, "is not a memory"),
        ({"memory_json": b" " * 200_000}, "is not a memory"),
        ({"infini_cache_safetensors": None}, "bad.zip holds no saved cache"),
        ({"infini_cache_safetensors": b"0" * 100}, "bad.zip is damaged"),
        ({"infini_cache_safetensors": b"0" * 10_000_000}, "larger than a memory of tiny can be"),
    ],
)
def test_damaged_memory_is_refused(reader, tmp_path, contents, message):
    file = space.save_memory(reader, read_all(reader, space.text_ids(reader, TEXT, 50)), tmp_path)
    with pytest.raises(space.ReaderError, match=message):
        space.load_memory(reader, changed_archive(file, tmp_path / "bad.zip", **contents))


@pytest.mark.parametrize(
    ("part", "message"), [("memory.json", "is not"), ("infini_cache.safetensors", "cannot be loaded")]
)
@pytest.mark.parametrize(
    ("field", "value"),
    [("flag_bits", 1), ("compress_type", 99), ("compress_type", zipfile.ZIP_DEFLATED)],
    ids=["password", "unknown compression", "damaged compression"],
)
def test_archive_that_cannot_be_read_is_refused(reader, tmp_path, part, message, field, value):
    file = space.save_memory(reader, read_all(reader, space.text_ids(reader, TEXT, 50)), tmp_path)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "bad.zip", "w") as bad:
        for name in old.namelist():
            # No deflated data begins so.
            bad.writestr(name, (b"\xff" if name == part else b"") + old.read(name))
        setattr(bad.getinfo(part), field, value)
    with pytest.raises(space.ReaderError, match=f"bad.zip {message}"):
        space.load_memory(reader, tmp_path / "bad.zip")


@pytest.mark.parametrize("token", [-1, 31, "3", None])
def test_memory_with_a_token_that_is_none_is_refused(reader, tmp_path, token):
    file = space.save_memory(reader, read_all(reader, space.text_ids(reader, TEXT, 50)), tmp_path)
    with zipfile.ZipFile(file) as archive:
        description = json.loads(archive.read("memory.json"))
    description["last_token"] = token
    bad = changed_archive(file, tmp_path / "bad.zip", memory_json=json.dumps(description).encode())
    with pytest.raises(space.ReaderError, match="does not say which token comes next"):
        space.load_memory(reader, bad)


def test_memory_of_several_texts_is_refused(reader, tmp_path):
    memory = read_all(reader, space.text_ids(reader, TEXT, 50))
    file = space.save_memory(reader, memory, tmp_path)
    memory.cache.batch_repeat_interleave(2)
    memory.cache.save_pretrained(tmp_path)
    of_two = (tmp_path / "infini_cache.safetensors").read_bytes()
    bad = changed_archive(file, tmp_path / "bad.zip", infini_cache_safetensors=of_two)
    with pytest.raises(space.ReaderError, match="memories of 2 texts"):
        space.load_memory(reader, bad)


def test_what_is_no_archive_is_refused(reader, tmp_path):
    (tmp_path / "book.zip").write_text("no archive")
    with pytest.raises(space.ReaderError, match=r"book\.zip is not a memory\. Load a \.zip file"):
        space.load_memory(reader, tmp_path / "book.zip")


def test_text_files_are_utf_8(tmp_path):
    file = tmp_path / "book.txt"
    file.write_bytes("\ufeffNaïve.".encode())
    assert space.read_text_file(file) == "Naïve."
    for content, message in (("Naïve.".encode("latin-1"), "not a text in UTF-8"), (b"a\0b", "not a text but")):
        file.write_bytes(content)
        with pytest.raises(space.ReaderError, match=message):
            space.read_text_file(file)
    with pytest.raises(space.ReaderError, match="Choose a text file first"):
        space.read_text_file(None)


def test_texts_are_cut_to_so_many_tokens(reader):
    text = "  " + " ".join(f"{word}      " + " " * 40 for word in TEXT.split())
    whole = reader.tokenizer(text).input_ids
    for tokens in (2, 40, 299, 300, 1000):
        assert space.text_ids(reader, text, tokens).tolist() == whole[:tokens]


@pytest.mark.parametrize(
    ("text", "tokens", "message"),
    [(" \n", 10, "The text is empty"), ("w1", 10, "too short"), ("w1 w2", 1, "at least 2 tokens")],
)
def test_texts_that_cannot_be_read_are_refused(reader, text, tokens, message):
    with pytest.raises(space.ReaderError, match=message):
        space.text_ids(reader, text, tokens)


@pytest.mark.parametrize("depth", [0.0, 0.4])
def test_passkey_model_finds_the_hidden_number(tmp_path, depth):
    reader = space.open_reader(str(PASSKEY), tmp_path)
    ids = space.hide_number(reader, 300 * (REPEATED_SENTENCE + "\n"), 4096, " 73519 ", depth)
    assert len(ids) == 4096
    assert reader.tokenizer.decode(ids).count("73519") == 2
    memory = read_all(reader, ids)
    assert written(reader, memory, QUESTION, new_tokens=6) == " 73519"


@pytest.mark.parametrize(
    ("number", "tokens", "message"),
    [("4821", 4096, "five digits"), ("４８２１３", 4096, "five digits"), ("48213", 40, r"Read at least \d+ tokens")],
)
def test_numbers_that_cannot_be_hidden_are_refused(tmp_path, number, tokens, message):
    reader = space.open_reader(str(PASSKEY), tmp_path)
    with pytest.raises(space.ReaderError, match=message):
        space.hide_number(reader, REPEATED_SENTENCE, tokens, number, 0.5)


def test_library_opens_each_model_once(tmp_path):
    here, there = (save_model(tmp_path / parent / "model", seed=seed) for seed, parent in enumerate("ab"))
    library = space.Library([here, there, here, save_model(tmp_path / "third")], tmp_path)
    assert library.names == [here, there, "third"]
    assert library.open("third") is library.open("third")
    assert library.open(here).weights_digest != library.open(there).weights_digest
    with pytest.raises(space.ReaderError, match="no model 'fourth' here"):
        library.open("fourth")


def test_library_converts_with_the_memory_of_a_model(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    options = {"segment_length": 7, "num_memory_slots": 3}
    convert_to_infini(tmp_path / "base", tmp_path / "trained", **options)
    save_memory(tmp_path / "trained", tmp_path / "memory")
    save_word_tokenizer(tmp_path / "base")
    source = str(tmp_path / "base")
    library = space.Library([source], tmp_path / "converted", {source: tmp_path / "memory"})
    config = library.open("base").config
    assert (config.segment_length, config.num_memory_slots) == (7, 3)


def test_library_says_why_a_model_cannot_be_opened(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(space.ReaderError, match=r"The model empty cannot be opened: .*config\.json"):
        space.Library([str(tmp_path / "empty")], tmp_path).open("empty")


def test_library_converts_a_llama(tmp_path):
    base = base_model("llama", max_position_embeddings=2048)
    base.save_pretrained(tmp_path / "llama")
    save_word_tokenizer(tmp_path / "llama")
    reader = space.open_reader(str(tmp_path / "llama"), tmp_path / "converted")
    (converted,) = (tmp_path / "converted").iterdir()
    assert (reader.config.model_type, reader.config.segment_length) == ("infini", 512)
    ids = space.text_ids(reader, TEXT, 50)[None]
    torch.testing.assert_close(reader.model(ids).logits, base(ids).logits)
    made = converted.stat().st_mtime_ns
    space.open_reader(str(tmp_path / "llama"), tmp_path / "converted")
    assert converted.stat().st_mtime_ns == made


def test_card_compares_the_memory_with_a_kv_cache(reader):
    memory = read_all(reader, space.text_ids(reader, TEXT, 250))
    # 2 layers, 2 KV heads of 6 numbers, keys and values of 4 bytes each.
    assert space.full_attention_nbytes(reader, 250) == 250 * 2 * 2 * 2 * 6 * 4
    card = views.remembering(reader, memory, "Read")
    assert "250" in card
    assert f"{memory.nbytes / 1e6:.2f} MB, whatever the length" in card
    assert "0.05 MB, growing with every token" in card


def test_card_shows_titles_as_text(reader):
    memory = read_all(reader, space.text_ids(reader, TEXT, 50))
    memory.title = "<b>title</b>"
    assert "&lt;b&gt;title&lt;/b&gt;" in views.remembering(reader, memory, "Read")


def test_plots_show_gates_and_norms(reader):
    shares = reader.model.local_shares()
    axes = views.gates_figure(shares).axes[0]
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array().data), shares.detach().T, check_dtype=False)
    memory = read_all(reader, space.text_ids(reader, TEXT, 250))
    norms = memory.norms()
    assert norms.shape == (2, 2)
    expected = memory.cache.layers[1].memory[0, 1].square().sum().sqrt()
    torch.testing.assert_close(norms[1, 1], expected)
    axes = views.norms_figure(norms).axes[0]
    torch.testing.assert_close(torch.tensor(axes.lines[0].get_ydata()), norms.mean(1), check_dtype=False)
    assert not axes.texts


def test_plot_says_that_a_memory_is_empty(reader):
    memory = read_all(reader, space.text_ids(reader, TEXT, 4))
    figure = views.norms_figure(memory.norms())
    assert "Empty until" in figure.axes[0].texts[0].get_text()


class Handlers:
    """The handlers of a page that is open nowhere, with a model "tiny"; what they show is by the components' ids."""

    def __init__(self, folder: Path):
        self.gradio = pytest.importorskip("gradio", reason="Gradio is not installed")
        import app

        self.app = app
        self.library = space.Library([save_model(folder / "tiny")], folder)
        self.page = app.build(self.library)

    def session(self, **fields):
        session = self.app.Session()
        vars(session).update(fields)
        return session

    def named(self, name: str):
        return next(function for function in self.page.fns.values() if function.name == name)

    def run(self, name: str, *arguments):
        for step in self.named(name).fn(*arguments):
            yield {component.elem_id: shown for component, shown in step.items()}

    def read_it(self, session):
        return self.run("read_it", session, "tiny", self.app.PASTE, TEXT, None, 200, False, "", 0)


@pytest.fixture
def handlers(tmp_path) -> Handlers:
    return Handlers(tmp_path)


def test_reading_on_with_nothing_left_is_refused(handlers, reader):
    memory = read_all(reader, space.text_ids(reader, TEXT, 50))
    for session in (handlers.session(), handlers.session(reader=reader, memory=memory)):
        with pytest.raises(handlers.gradio.Error, match="nothing left to read on"):
            list(handlers.run("read_on", session))


def test_what_was_stopped_before_it_began_leaves_the_memory(handlers, reader, tmp_path):
    memory = read_all(reader, space.text_ids(reader, TEXT, 50))
    session = handlers.session(reader=reader, memory=memory, is_stopped=True)
    file = space.save_memory(handlers.library.open("tiny"), memory, tmp_path)
    for steps in (handlers.read_it(session), handlers.run("load", session, "tiny", file)):
        *_, last = steps
        assert "Remembers a text" in last["status"]
        assert session.memory is memory


def test_after_any_error_the_card_shows_what_is_there(handlers, reader, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    def statuses(steps):
        shown = []
        with pytest.raises(RuntimeError, match="out of memory"):
            shown.extend(step.get("status") for step in steps)
        return shown

    ids = space.text_ids(reader, TEXT, 300)
    session = handlers.session(reader=reader, memory=read_all(reader, ids[:50]), rest=ids[50:])
    monkeypatch.setattr(handlers.app, "read", fail)
    assert "Remembers a text" in statuses(handlers.run("read_on", session))[-1]
    monkeypatch.setattr(handlers.library, "open", fail)
    assert "Remembers a text" in statuses(handlers.read_it(session))[-1]
    assert "Remembers a text" in statuses(handlers.run("load", session, "tiny", "book.zip"))[-1]


def test_memory_of_a_closed_page_is_freed(handlers):
    from gradio.state_holder import StateHolder

    holder = StateHolder()
    holder.set_blocks(handlers.page)
    opened = holder["a page"]
    asyncio.run(handlers.page.process_api(handlers.named("start"), [None], opened))
    holder.delete_all_expired_state()
    (session,) = opened.state_data.values()
    assert isinstance(session, handlers.app.Session)
    # An hour, in Gradio 6.31, but for its tests.
    opened.is_closed, opened.STATE_TTL_WHEN_CLOSED = True, -1
    holder.delete_all_expired_state()
    assert not opened.state_data


CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
# The machine may be busy.
PATIENCE = 120_000


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page, run from a folder that is made as README.md says of a Space."""
    pytest.importorskip("gradio", reason="Gradio is not installed")
    folder = tmp_path_factory.mktemp("space")
    (commands,) = re.findall(r"^mkdir -p build/space.*?(?=^hf upload)", readme(), re.MULTILINE | re.DOTALL)
    subprocess.run(commands.replace("build/space", str(folder)), shell=True, check=True, cwd=ROOT)
    save_model(folder / "other")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"INFINI_MODELS": "checkpoints/passkey, other", "GRADIO_ANALYTICS_ENABLED": "False"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder / "temporary")}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "app.py", "--port", str(port)]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/", process, folder / "log")
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
            process.wait()
    assert "Traceback" not in (folder / "log").read_text()


def readme() -> str:
    return (SPACE / "README.md").read_text(encoding="utf-8")


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(2 * PATIENCE // 500):
        assert process.poll() is None, log.read_text()
        try:
            opener.open(url).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}: apt-get install -y chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGUMENTS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, wide, which asks nothing of any other machine and raises no error."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    open_page(page, address)
    yield page
    page.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


def open_page(page, address: str) -> None:
    page.goto(address)
    shows(page, "#status", "Nothing read yet")
    # The settings that suit the model come last.
    page.wait_for_function("document.querySelector('#words textarea')?.value.startsWith('What is')")


def shows(page, place: str, text: str) -> None:
    page.locator(place).get_by_text(text).first.wait_for()


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def paste(page, text: str, tokens: int) -> None:
    page.get_by_label("A text I paste").click()
    page.get_by_label("Your text").fill(text)
    page.get_by_label("Read at most so many tokens").fill(str(tokens))


def answers(page, count: int) -> list[str]:
    """The model's answers, once there are `count` and the last is complete."""
    answers = page.locator("#answers [data-testid=bot]")
    answers.nth(count - 1).wait_for()
    page.locator("button:enabled").get_by_text("Ask", exact=True).wait_for()
    return [answer.strip() for answer in answers.all_inner_texts()]


def load(page, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        press(page, "Load memory")
    chooser.value.set_files(file)


def choose(page, address: str, file: Path) -> None:
    """Chooses a text file, anew on a new page where this one does not show it: a busy machine may lose an update."""
    playwright = pytest.importorskip("playwright.sync_api")
    page.set_default_timeout(PATIENCE / 4)
    for _ in range(4):
        with suppress(playwright.TimeoutError):
            page.get_by_label("A .txt file").click()
            with page.expect_file_chooser() as chooser:
                page.get_by_text("Click to Upload").click()
            chooser.value.set_files(file)
            page.get_by_text(file.name).first.wait_for()
            break
        open_page(page, address)
    else:
        raise AssertionError(f"{file.name} is not shown:\n{page.inner_text('body')}")
    page.set_default_timeout(PATIENCE)


@pytest.mark.slow
def test_page_reads_a_text_answers_and_keeps_its_memory(page, address, tmp_path):
    paste(page, 300 * (REPEATED_SENTENCE + " "), 6000)
    page.get_by_label("Number (five digits)").fill("73519")
    press(page, "Read it")
    shows(page, "#status", "Read the pasted text")
    status = page.locator("#status").inner_text()
    assert re.search(r"6,000\s+of 6,000 tokens\s+[\d,]+\s+tokens/s", status)
    assert re.search(r"0\.33 MB, whatever the length\s+A KV cache\s+18\.4 MB, growing", status)
    for plot in ("#gates img", "#norms img"):
        page.wait_for_function(f"document.querySelector('{plot}')?.naturalWidth > 300")

    press(page, "Ask")
    assert answers(page, 1) == ["73519"]
    press(page, "Continue the text")
    answers(page, 2)
    press(page, "Ask")
    assert answers(page, 3)[2] == "73519"

    press(page, "Save memory")
    with page.expect_download() as download:
        page.locator("#saved a").first.click()
    file = tmp_path / download.value.suggested_filename
    assert file.name == "memory-the-pasted-text-6000-tokens.zip"
    download.value.save_as(file)

    open_page(page, address)
    load(page, file)
    shows(page, "#status", "Loaded: the pasted text")
    press(page, "Ask")
    assert answers(page, 1) == ["73519"]


@pytest.mark.slow
def test_page_stops_reading_and_goes_on(page):
    page.get_by_label("Read at most so many tokens").fill("900000")
    press(page, "Read it")
    shows(page, "#status", "tokens/s")
    press(page, "Stop")
    shows(page, "#status", "Stopped in the King James Bible")
    press(page, "Ask")
    answers(page, 1)
    stopped_at = tokens_shown(page)
    press(page, "Read on")
    shows(page, "#status", "Reading the King James Bible")
    press(page, "Stop")
    shows(page, "#status", "Stopped in the King James Bible")
    assert 0 < tokens_shown(page) < 900_000
    kept = re.search(r"A KV cache\s+([\d.,]+) MB", page.locator("#status").inner_text())[1]
    # 3 layers, 4 heads of 32 numbers, keys and values of 4 bytes each; all tokens, before and after the stop.
    assert float(kept.replace(",", "")) * 1e6 > 2 * 3 * 4 * 32 * 4 * stopped_at


def tokens_shown(page) -> int:
    return int(re.search(r"([\d,]+)\s+of [\d,]+ tokens", page.locator("#status").inner_text())[1].replace(",", ""))


@pytest.mark.slow
def test_page_says_what_to_do_about_errors(page, tmp_path, reader):
    paste(page, "  ", 6000)
    press(page, "Read it")
    page.get_by_text("The text is empty. Paste some text").wait_for()
    shows(page, "#status", "Nothing read yet")

    page.get_by_label("A .txt file").click()
    press(page, "Read it")
    page.get_by_text("Choose a text file first").wait_for()

    (tmp_path / "book.zip").write_text("no archive")
    load(page, tmp_path / "book.zip")
    page.get_by_text("book.zip is not a memory").wait_for()

    memory = read_all(reader, space.text_ids(reader, TEXT, 50))
    file = space.save_memory(reader, memory, tmp_path)
    load(page, file)
    page.get_by_text("is a memory of the model tiny; to passkey it means nothing").wait_for()
    # The other model of the page has the very weights of `reader`.
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="other").click()
    load(page, file)
    shows(page, "#status", "Loaded: a text")


@pytest.mark.slow
def test_page_reads_a_file_and_fits_a_phone(page, address, tmp_path):
    page.set_viewport_size({"width": 390, "height": 844})
    (tmp_path / "book.txt").write_text(60 * (REPEATED_SENTENCE + " "), encoding="utf-8")
    choose(page, address, tmp_path / "book.txt")
    press(page, "Read it")
    shows(page, "#status", "Read book.txt")
    page.wait_for_function("document.querySelector('#norms img')?.naturalWidth > 300")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [page.get_by_role("button", name=name, exact=True).bounding_box() for name in ("Read it", "Ask")]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
