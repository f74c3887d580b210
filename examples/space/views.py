"""What the page shows: numbers in words and bars, and plots of what is inside the memory."""

import html

import torch
from matplotlib.figure import Figure

from reader import Memory, Progress, Reader, full_attention_nbytes


COLOURS = {"memory": "#0d9488", "full attention": "#f59e0b"}

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.head h1 { font-size: 1.7rem; line-height: 1.2; margin: .4rem 0 .3rem; letter-spacing: -.015em; }
.head p { margin: 0; max-width: 46rem; color: var(--body-text-color-subdued); }
.step { font-weight: 650; font-size: 1.05rem; margin: 0; }
.card { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 1rem 1.1rem;
        background: var(--block-background-fill); }
.card .line { display: flex; justify-content: space-between; align-items: baseline; gap: .2rem .8rem; flex-wrap: wrap; }
.card .line b { font-weight: 650; }
.card .line span { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.card .bar { height: 10px; border-radius: 6px; background: var(--border-color-primary); overflow: hidden;
             margin: .35rem 0 .9rem; }
.card .bar i { display: block; height: 100%; border-radius: 6px; background: var(--primary-500); min-width: 3px;
               transition: width .25s linear; }
.card p { margin: .1rem 0 0; color: var(--body-text-color-subdued); font-size: .92rem; }
.card .numbers { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin: 0 0 1rem; }
.card .numbers div { min-width: 5.5rem; }
.card .numbers strong { display: block; font-size: 1.35rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.card .numbers small { color: var(--body-text-color-subdued); }
"""


def size(nbytes: float) -> str:
    """Megabytes, with a digit after the point where that says something."""
    megabytes = nbytes / 1e6
    digits = 2 if megabytes < 1 else 1 if megabytes < 100 else 0
    return f"{megabytes:,.{digits}f} MB"


def nothing_read() -> str:
    return (
        '<div class="card" role="status"><div class="line"><b>Nothing read yet</b></div><p>Choose a text and a model, '
        "and press “Read it”. Or load a memory that you saved before.</p></div>"
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
    title = f"{state} {progress.memory.title}"
    return _card(
        f'<div class="line"><b>{html.escape(title)}</b><span>{share:.0%}{wait}</span></div>'
        f"{_bar(share, 'var(--primary-500)')}"
        f"{_numbers((f'{progress.tokens:,}', f'of {progress.total:,} tokens'), (f'{progress.rate:,.0f}', 'tokens/s'))}",
        reader,
        progress.memory,
    )


def remembering(reader: Reader, memory: Memory, state: str) -> str:
    """A memory that is there, with no reading going on."""
    return _card(
        f'<div class="line"><b>{html.escape(f"{state} {memory.title}")}</b><span>by {html.escape(reader.name)}</span></div>'
        f"{_numbers((f'{memory.tokens:,}', 'tokens read'))}",
        reader,
        memory,
    )


def _duration(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def _numbers(*numbers: tuple[str, str]) -> str:
    items = "".join(f"<div><strong>{number}</strong><small>{unit}</small></div>" for number, unit in numbers)
    return f'<div class="numbers">{items}</div>'


def _bar(share: float, colour: str) -> str:
    return f'<div class="bar"><i style="width:{100 * share:.2f}%;background:{colour}"></i></div>'


def _card(head: str, reader: Reader, memory: Memory) -> str:
    kept, full = memory.nbytes, full_attention_nbytes(reader, memory.tokens)
    largest = max(kept, full)
    if full > kept:
        comparison = f"{full / kept:,.1f} times as much as this memory."
    else:
        even = -(-kept * memory.tokens // full)
        comparison = f"less than this memory so far, and more from {even:,} tokens on."
    return (
        f'<div class="card" role="status">{head}'
        f'<div class="line"><b>This memory</b><span>{size(kept)}, whatever the length</span></div>'
        f"{_bar(kept / largest, COLOURS['memory'])}"
        f'<div class="line"><b>A KV cache</b><span>{size(full)}, growing with every token</span></div>'
        f"{_bar(full / largest, COLOURS['full attention'])}"
        f"<p>Full attention would keep the keys and values of all {memory.tokens:,} tokens: {comparison}</p></div>"
    )


def gates_figure(shares: torch.Tensor) -> Figure:
    """What each head takes from local attention and what from the memory; `shares` `(layers, heads)`."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
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
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    layers, mean = range(len(norms)), norms.mean(1)
    spread = torch.stack([mean - norms.min(1).values, norms.max(1).values - mean])
    axes.bar(layers, mean, color=COLOURS["memory"], width=0.8)
    axes.errorbar(layers, mean, yerr=spread, fmt="none", ecolor="#134e4a", elinewidth=1)
    axes.set(xlabel="layer", ylabel="norm of M", title="The memory: mean of its heads, from least to greatest")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)
    _whole_ticks(axes.xaxis, len(norms))
    return figure


def _whole_ticks(axis, count: int) -> None:
    axis.set_ticks(range(0, count, max(1, -(-count // 10))))
