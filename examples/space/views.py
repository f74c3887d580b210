"""What the page shows: numbers in words and bars, and plots of what is inside the memory."""

import html

import torch
from matplotlib.figure import Figure
from reader import Memory, Progress, Reader, full_attention_nbytes


COLOURS = {"memory": "#0d9488", "full attention": "#f59e0b"}

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important;
                    --quiet: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
:is(.head, .step, .card-holder, .note) .html-container { padding: 0 !important; }
.head h1 { font-size: 1.75rem; line-height: 1.2; margin: .5rem 0 .4rem; letter-spacing: -.015em; }
:is(.head, .step, .note) p { margin: 0 0 .5rem; max-width: 48rem; color: var(--quiet); line-height: 1.5; }
.step h2 { font-size: 1.08rem; font-weight: 650; margin: .4rem 0 0 !important; }
.step p { margin: .2rem 0 0; font-size: .94rem; }
.card { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 1rem 1.1rem;
        background: var(--block-background-fill); }
.card .line { display: flex; justify-content: space-between; align-items: baseline; flex-wrap: wrap;
              gap: .1rem .8rem; }
.card .line b { font-weight: 650; overflow-wrap: anywhere; }
.card .line span { color: var(--quiet); font-variant-numeric: tabular-nums; }
.card .bar { height: 10px; border-radius: 6px; background: var(--border-color-primary); overflow: hidden;
             margin: .4rem 0 .95rem; }
.card .bar i { display: block; height: 100%; border-radius: 6px; min-width: 3px; transition: width .25s linear; }
.card p { margin: .1rem 0 0; color: var(--quiet); font-size: .92rem; line-height: 1.45; }
.card .numbers { display: flex; flex-wrap: wrap; gap: .3rem 1.8rem; margin: 0 0 1rem; }
.card .numbers strong { display: block; font-size: 1.4rem; line-height: 1.2; font-weight: 650;
                        font-variant-numeric: tabular-nums; }
.card .numbers small { color: var(--quiet); font-size: .86rem; }
"""


def size(nbytes: float) -> str:
    """Megabytes, with a digit after the point where that says something."""
    megabytes = nbytes / 1e6
    digits = 2 if megabytes < 1 else 1 if megabytes < 100 else 0
    return f"{megabytes:,.{digits}f} MB"


def nothing_read() -> str:
    return (
        '<div class="card" role="status"><div class="line"><b>Nothing read yet</b></div><p>Choose a text and a model, '
        "and press “Read it”. Or load a memory that was saved before.</p></div>"
    )


def being_prepared(reader_name: str) -> str:
    return (
        f'<div class="card" role="status"><div class="line"><b>Opening {html.escape(reader_name)} …</b></div>'
        "<p>The first time, a Llama is converted to Infini-attention: that takes a minute or so.</p></div>"
    )


def reading(reader: Reader, progress: Progress, state: str) -> str:
    """How far a text has been read; `state` is what is done with it, in a word or two."""
    share = progress.tokens / progress.total
    left = (progress.total - progress.tokens) / progress.rate
    wait = "" if progress.is_finished else f" · about {_duration(left)} left"
    done, rate = (f"{progress.tokens:,}", f"of {progress.total:,} tokens"), (f"{progress.rate:,.0f}", "tokens/s")
    head = _line(f"{state} {progress.memory.title}", f"{share:.0%}{wait}") + _bar(share, "var(--primary-500)")
    # So that the bar of the KV cache grows as it would.
    return _card(head + _numbers(done, rate), reader, progress.memory, progress.tokens_in_the_end)


def remembering(reader: Reader, memory: Memory, state: str) -> str:
    """A memory that is there, with no reading going on."""
    head = _line(f"{state} {memory.title}", f"by {reader.name}")
    return _card(head + _numbers((f"{memory.tokens:,}", "tokens read")), reader, memory, memory.tokens)


def _line(left: str, right: str) -> str:
    return f'<div class="line"><b>{html.escape(left)}</b><span>{html.escape(right)}</span></div>'


def _duration(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def _numbers(*numbers: tuple[str, str]) -> str:
    items = "".join(f"<div><strong>{number}</strong><small>{unit}</small></div>" for number, unit in numbers)
    return f'<div class="numbers">{items}</div>'


def _bar(share: float, colour: str) -> str:
    return f'<div class="bar"><i style="width:{100 * share:.2f}%;background:{colour}"></i></div>'


def _card(head: str, reader: Reader, memory: Memory, scale: int) -> str:
    """The card of a memory, whose bars are as long as the KV cache of `scale` tokens at most."""
    kept, full = memory.nbytes, full_attention_nbytes(reader, memory.tokens)
    largest = max(kept, full_attention_nbytes(reader, scale))
    if full > kept:
        times = full / kept
        comparison = f"{times:,.{0 if times >= 10 else 1}f} times as much as this memory."
    else:
        even = -(-kept * memory.tokens // full)
        comparison = f"less than this memory so far, and more from {even:,} tokens on."
    return (
        f'<div class="card" role="status">{head}'
        f"{_line('This memory', f'{size(kept)}, whatever the length')}{_bar(kept / largest, COLOURS['memory'])}"
        f"{_line('A KV cache', f'{size(full)}, growing with every token')}"
        f"{_bar(full / largest, COLOURS['full attention'])}"
        f"<p>Full attention would keep the keys and values of all {memory.tokens:,} tokens: {comparison}</p></div>"
    )


def gates_figure(shares: torch.Tensor) -> Figure:
    """What each head takes from local attention and what from the memory; `shares` `(layers, heads)`."""
    figure = Figure(figsize=(5.2, 3.1), dpi=200, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.T.detach(), cmap="BrBG_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(xlabel="layer", ylabel="head", title=f"Gates: {shares.mean():.0%} local attention on average")
    _whole_ticks(axes.xaxis, shares.shape[0])
    _whole_ticks(axes.yaxis, shares.shape[1])
    bar = figure.colorbar(image, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["memory", "half", "local"])
    return figure


def norms_figure(norms: torch.Tensor) -> Figure:
    """How large the memory is in each layer; `norms` `(layers, kv_heads)`."""
    figure = Figure(figsize=(5.2, 3.1), dpi=200, layout="constrained")
    axes = figure.subplots()
    layers, mean = range(len(norms)), norms.mean(1)
    axes.vlines(layers, norms.min(1).values, norms.max(1).values, color=COLOURS["memory"], alpha=0.35, linewidth=4)
    axes.plot(layers, mean, "o", color=COLOURS["memory"], markersize=5)
    axes.set(xlabel="layer", ylabel="norm of M", title="Memory of each layer: mean and range of its heads")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.5 / len(norms))
    if norms.min() > 0:
        axes.set_yscale("log")
    elif norms.max() == 0:
        axes.set_ylim(0, 1)
        axes.text(0.5, 0.5, "Empty until the first segment has ended", ha="center", transform=axes.transAxes)
    _whole_ticks(axes.xaxis, len(norms))
    return figure


def _whole_ticks(axis, count: int) -> None:
    axis.set_ticks(range(0, count, max(1, -(-count // 10))))
