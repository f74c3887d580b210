"""
A page to read a long text with Infini-attention: watch a memory of constant size read it, ask it, keep it as a file.

    python examples/space/app.py                                  # SmolLM2-135M-Instruct and checkpoints/passkey
    python examples/space/app.py --model my-model --model me/llama-on-the-hub

As a Hub Space, see README.md beside this file.
"""

import argparse
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import torch
from reader import (
    Library,
    Memory,
    Progress,
    Reader,
    ReaderError,
    hide_number,
    load_memory,
    read,
    read_text_file,
    save_memory,
    text_ids,
    write,
)
from views import CSS, being_prepared, gates_figure, norms_figure, nothing_read, reading, remembering

from infini_transformers.evaluation.resources import king_james_bible, smollm2_file


HERE = Path(__file__).resolve().parent
BIBLE, PASTE, FILE = "The King James Bible", "A text I paste", "A .txt file"
FONT = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")
# As the number is announced, in the sentence that is hidden.
PASSKEY_QUESTION = "What is the pass key? The pass key is"


class Session:
    """What one open page holds."""

    def __init__(self):
        self.reader: Reader | None = None
        self.memory: Memory | None = None
        self.rest: torch.Tensor | None = None
        self.is_stopped = False


def checkpoint(name: str) -> Path | None:
    """A folder of this repository's checkpoints, if it is here."""
    folders = (parent / "checkpoints" / name for parent in (HERE, *HERE.parents))
    return next((folder for folder in folders if folder.is_dir()), None)


def default_library(converted: Path) -> Library:
    """SmolLM2 with its memory (on the Hub it has other weights, and none), and the small model that finds a number."""
    memory, passkey = checkpoint("smollm2-memory"), checkpoint("passkey")
    try:
        models = [str(smollm2_file())]
    except ModuleNotFoundError:
        models, memory = ["HuggingFaceTB/SmolLM2-135M-Instruct"], None
    memories = {} if memory is None else {models[0]: memory}
    return Library([*models, *([] if passkey is None else [str(passkey)])], converted, memories)


def tells_errors(handler):
    """What the user can put right is shown as a message, and not logged as a failure."""

    @functools.wraps(handler)
    def told(*arguments):
        try:
            yield from handler(*arguments)
        except ReaderError as error:
            raise gr.Error(str(error), duration=20, title="Please change something", print_exception=False) from error

    return told


def build(library: Library) -> gr.Blocks:
    """The page."""

    def buttons(session: Session, is_busy: bool) -> dict:
        has_memory = session.memory is not None
        return {
            read_button: gr.Button(interactive=not is_busy),
            stop_button: gr.Button(interactive=is_busy),
            read_on_button: gr.Button(visible=session.rest is not None, interactive=not is_busy),
            ask_button: gr.Button(interactive=has_memory and not is_busy),
            continue_button: gr.Button(interactive=has_memory and not is_busy),
            save_button: gr.Button(interactive=has_memory and not is_busy),
            load_button: gr.UploadButton(interactive=not is_busy),
        }

    def start(session: Session) -> dict:
        session.is_stopped = False
        # Gradio frees, once their page is closed, those states alone that a handler has returned.
        return {state: session, **buttons(session, is_busy=True)}

    def finish(session: Session) -> dict:
        return buttons(session, is_busy=False)

    def stop(session: Session) -> None:
        session.is_stopped = True

    def inside(session: Session) -> dict:
        return {
            gates: gr.Plot(gates_figure(session.reader.model.local_shares()), visible=True),
            norms: gr.Plot(norms_figure(session.memory.norms()), visible=True),
        }

    def resets_status(handler):
        """After an error, the card shows what the session holds; the first argument is the session."""

        @functools.wraps(handler)
        def reset(session, *arguments):
            try:
                yield from handler(session, *arguments)
            except Exception:
                yield {status: shown(session)}
                raise

        return reset

    def follow(session: Session, ids: torch.Tensor, title: str) -> Iterator[dict]:
        """Reads `ids` into the memory of the session, and shows how far it is."""
        progress: Progress | None = None
        for progress in read(session.reader, ids, title, session.memory, lambda: session.is_stopped):
            session.memory = progress.memory
            session.rest = None if progress.is_finished else ids[progress.tokens :]
            yield {status: reading(session.reader, progress, "Reading")}
        end = "Read" if progress.is_finished else "Stopped in"
        yield {status: reading(session.reader, progress, end), **inside(session)}

    @tells_errors
    @resets_status
    def read_it(session, model, source, pasted, file, tokens, hides, number, depth) -> Iterator[dict]:
        if source == BIBLE:
            text, title = king_james_bible(), "the King James Bible"
        elif source == PASTE:
            text, title = pasted, "the pasted text"
        else:
            text, title = read_text_file(file), Path(file or "").name
        yield {status: being_prepared(model)}
        reader = library.open(model)
        count = int(tokens or 0)
        ids = hide_number(reader, text, count, number, depth / 100) if hides else text_ids(reader, text, count)
        # While it waited for other pages, or for the model: then what was there before stays.
        if session.is_stopped:
            yield {status: shown(session)}
            return
        session.reader, session.memory, session.rest = reader, None, None
        yield {answers: [], saved: gr.File(value=None, visible=False)}
        yield from follow(session, ids, title)

    @tells_errors
    @resets_status
    def read_on(session) -> Iterator[dict]:
        if session.memory is None or session.rest is None:
            raise ReaderError("There is nothing left to read on. Press “Read it” first.")
        yield {saved: gr.File(value=None, visible=False)}
        yield from follow(session, session.rest, session.memory.title)

    def shown(session: Session) -> str:
        return nothing_read() if session.memory is None else remembering(session.reader, session.memory, "Remembers")

    @tells_errors
    def ask(session, history, words, as_chat, *settings) -> Iterator[dict]:
        if not words.strip():
            raise ReaderError("Type a question first, or press “Continue the text”.")
        yield from say(session, history, words, as_chat, *settings)

    @tells_errors
    def continue_text(session, history, *settings) -> Iterator[dict]:
        yield from say(session, history, "", False, *settings)

    def say(session, history, words, as_chat, new_tokens, temperature, penalty) -> Iterator[dict]:
        if session.memory is None:
            raise ReaderError("There is no memory to ask yet. Press “Read it”, or load a memory.")
        reader = session.reader
        history = [*history, {"role": "user", "content": words.strip() or "(Continue the text.)"}]
        written = ""
        yield {answers: [*history, {"role": "assistant", "content": "…"}]}
        for written in write(
            reader,
            session.memory,
            words,
            as_chat and reader.can_chat,
            new_tokens,
            temperature,
            penalty,
            lambda: session.is_stopped,
        ):
            yield {answers: [*history, {"role": "assistant", "content": written}]}
        if not written.strip():
            yield {answers: [*history, {"role": "assistant", "content": "(The model wrote nothing.)"}]}

    @tells_errors
    def save(session) -> Iterator[dict]:
        if session.memory is None:
            raise ReaderError("There is no memory to save yet. Press “Read it” first.")
        with tempfile.TemporaryDirectory() as folder:
            # Gradio copies the file to where it can be downloaded.
            yield {saved: gr.File(value=str(save_memory(session.reader, session.memory, Path(folder))), visible=True)}

    @tells_errors
    @resets_status
    def load(session, model, file) -> Iterator[dict]:
        yield {status: being_prepared(model)}
        reader = library.open(model)
        memory = load_memory(reader, file)
        # As in `read_it`.
        if session.is_stopped:
            yield {status: shown(session)}
            return
        session.reader, session.memory, session.rest = reader, memory, None
        yield {status: remembering(reader, memory, "Loaded:"), answers: [], **inside(session)}

    def choose_source(source: str) -> dict:
        return {pasted: gr.Textbox(visible=source == PASTE), file: gr.File(visible=source == FILE)}

    def choose_model(model: str) -> dict:
        """Settings that suit the model; a page that is open keeps its memory until it reads anew."""
        finds_a_number = model == "passkey"
        return {
            hides: gr.Checkbox(value=finds_a_number),
            number_options: gr.Row(visible=finds_a_number),
            words: gr.Textbox(value=PASSKEY_QUESTION if finds_a_number else ""),
            new_tokens: gr.Slider(value=6 if finds_a_number else 60),
            penalty: gr.Slider(value=1.0 if finds_a_number else 1.1),
        }

    with gr.Blocks(title="A text of any length", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        state = gr.State(Session())
        gr.HTML(
            "<h1>A text of any length, a memory of constant size</h1>"
            "<p>A language model with Infini-attention reads a book and keeps what it read in a memory that does not "
            "grow. Ask it, save the memory to a file, go on tomorrow.</p>",
            elem_classes="head",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                gr.HTML("<h2>1 · Choose a text</h2>", elem_classes="step")
                with gr.Group():
                    model = gr.Dropdown(library.names, value=library.names[0], label="Model", elem_id="model")
                    source = gr.Radio([BIBLE, PASTE, FILE], value=BIBLE, label="Text", elem_id="source")
                    pasted = gr.Textbox(
                        label="Your text", lines=7, max_lines=12, placeholder="Paste it here", visible=False
                    )
                    file = gr.File(label="Text file (UTF-8)", file_types=[".txt"], visible=False, height=130)
                    tokens = gr.Number(20_000, label="Read at most so many tokens", precision=0, minimum=2)
                    hides = gr.Checkbox(label="Hide a number in it, to ask for later", elem_id="hides")
                    with gr.Row(visible=False) as number_options:
                        number = gr.Textbox("48213", label="Number (five digits)", max_lines=1, min_width=130)
                        depth = gr.Slider(0, 100, 30, step=1, label="Where, in % of the text", min_width=180)
                with gr.Row():
                    read_button = gr.Button("Read it", variant="primary", min_width=110)
                    stop_button = gr.Button("Stop", variant="stop", interactive=False, min_width=90)
                    read_on_button = gr.Button("Read on", visible=False, min_width=110)
            with gr.Column(scale=6, min_width=320):
                gr.HTML("<h2>2 · Watch it read</h2>", elem_classes="step")
                status = gr.HTML(nothing_read(), elem_id="status", elem_classes="card-holder")
                with gr.Row():
                    save_button = gr.Button("Save memory", interactive=False, min_width=130, size="md")
                    load_button = gr.UploadButton(
                        "Load memory", file_types=[".zip"], min_width=130, size="md", elem_id="load"
                    )
                saved = gr.File(label="Your memory, to download", visible=False, interactive=False, elem_id="saved")
        gr.HTML(
            "<h2>3 · Ask</h2><p>Each question starts from the memory of the text, and leaves it as it is.</p>",
            elem_classes="step",
        )
        answers = gr.Chatbot(
            label="Questions and answers",
            show_label=False,
            placeholder="Read a text first. Answers appear here.",
            height=260,
            render_markdown=False,
            feedback_options=None,
            buttons=[],
            elem_id="answers",
        )
        with gr.Row(equal_height=True):
            words = gr.Textbox(
                show_label=False,
                placeholder="A question, or words that the text should go on with",
                container=False,
                scale=6,
                min_width=260,
                max_lines=4,
                elem_id="words",
            )
            ask_button = gr.Button("Ask", variant="primary", interactive=False, scale=1, min_width=90)
            continue_button = gr.Button("Continue the text", interactive=False, scale=2, min_width=160)
        with gr.Accordion("How it writes", open=False):
            as_chat = gr.Checkbox(
                True,
                label="Ask in the model's chat format, if it has one (else the words follow the text just as typed)",
            )
            with gr.Row():
                new_tokens = gr.Slider(1, 400, 60, step=1, label="Tokens to write, at most", min_width=200)
                temperature = gr.Slider(
                    0, 1.5, 0, step=0.1, label="Temperature (0: the likeliest each time)", min_width=200
                )
                penalty = gr.Slider(1, 1.5, 1.1, step=0.05, label="Penalty on repetition (1: none)", min_width=200)
        gr.HTML("<h2>4 · Look inside</h2>", elem_classes="step")
        with gr.Row():
            gates = gr.Plot(show_label=False, visible=False, min_width=320, elem_id="gates")
            norms = gr.Plot(show_label=False, visible=False, min_width=320, elem_id="norms")
        gr.HTML(
            "<p>Each head of each layer mixes what it sees nearby with what it reads from the memory; its gate says "
            "in which shares. The memory of a head is a matrix M, to which every finished segment is added.</p><p>A "
            "model that was only converted stays fluent but does not use its memory yet: it answers from the last few "
            "hundred tokens. To use it has to be learned in training. The small <b>passkey</b> model has learned one "
            "task: it finds a number that was hidden in a long text.</p>",
            elem_classes="note",
        )

        all_buttons = [
            read_button,
            stop_button,
            read_on_button,
            ask_button,
            continue_button,
            save_button,
            load_button,
        ]
        writing = [new_tokens, temperature, penalty]

        def runs(event, handler, inputs, outputs) -> None:
            """One at a time for all pages; the buttons say so, also after an error."""
            quietly = {"show_progress": "hidden", "queue": False}
            work = event(start, state, [state, *all_buttons], **quietly).then(
                handler, [state, *inputs], outputs, concurrency_id="model", show_progress="hidden"
            )
            # In Gradio 6.31, `then` does not follow an error.
            work.then(finish, state, all_buttons, **quietly)
            work.failure(finish, state, all_buttons, **quietly)

        texts = [model, source, pasted, file, tokens, hides, number, depth]
        shows = [status, answers, saved, gates, norms]
        runs(read_button.click, read_it, texts, shows)
        runs(read_on_button.click, read_on, [], shows)
        for event in (ask_button.click, words.submit):
            runs(event, ask, [answers, words, as_chat, *writing], [answers])
        runs(continue_button.click, continue_text, [answers, *writing], [answers])
        runs(save_button.click, save, [], [saved])
        runs(load_button.upload, load, [model, load_button], shows)
        stop_button.click(stop, state, None, queue=False, show_progress="hidden")
        source.input(choose_source, source, [pasted, file], queue=False, show_progress="hidden")
        # Not `change`: what `choose_model` sets would ask for an update of its own, while the user already goes on.
        hides.input(lambda shown: gr.Row(visible=shown), hides, number_options, queue=False, show_progress="hidden")
        gr.on(
            [page.load, model.change],
            choose_model,
            model,
            [hides, number_options, words, new_tokens, penalty],
            queue=False,
            show_progress="hidden",
        )
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        action="append",
        help="a folder, a .gguf file or a Hub id; may be given several times (default: the environment variable "
        "INFINI_MODELS, with commas between them, or else SmolLM2-135M-Instruct and checkpoints/passkey)",
    )
    parser.add_argument(
        "--converted",
        type=Path,
        default=Path("demo-output"),
        help="where converted models are kept (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    options = parser.parse_args()
    named = [name.strip() for name in os.environ.get("INFINI_MODELS", "").split(",") if name.strip()]
    models = options.model or named
    library = Library(models, options.converted) if models else default_library(options.converted)
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="stone", radius_size="lg", font=FONT, font_mono=MONO)
    build(library).queue().launch(
        server_port=options.port,
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size="1gb",
        # A session holds a memory: those not used for longest are forgotten.
        state_session_capacity=50,
    )


if __name__ == "__main__":
    main()
