"""
Whether a model finds what stands far back: the passkey task by length and depth, with the standard heatmap, and other
tasks of recall.

    infini evaluate retrieval model --lengths 4096 131072 --fillers sentence moby_dick.txt --output docs/passkey

prints a Markdown table, and writes docs/passkey.jsonl, a line per trial as soon as it is done, and docs/passkey.png.
Called again, it goes on after the last trial in the file: more lengths, trials and fillers may be asked for.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.utils import logging

from .examples import Example
from .haystacks import Filler, find_filler
from .loading import load_model, load_tokenizer
from .losses import Progress, memory_off
from .mqar import mqar_example
from .needle import NUM_DECOYS, needle_example, number_example
from .passkey import passkey_example, passkey_text_example
from .variable_tracking import variable_tracking_example
from .wordings import HELD_OUT_WORDINGS, TRAINING_WORDINGS, Wording, draw_plain_wording, draw_wording


logger = logging.get_logger(__name__)


class Task(NamedTuple):
    """
    Attributes:
        draw: a trial from a tokenizer, filler, length, depth and random generator.
        has_depth: whether the depth is a matter of the task.
        is_text: whether it counts what `generate()` writes after the prompt ([`score_text`]), and not which tokens are
            the most probable ones ([`score`]).
    """

    draw: Callable[[PreTrainedTokenizerBase, Filler, int, float, np.random.Generator], Example]
    has_depth: bool
    is_text: bool = False


def _any_of(wordings: Sequence[Wording]) -> Callable[[np.random.Generator], Wording]:
    return lambda generator: wordings[int(generator.integers(len(wordings)))]


def _reworded(draw_wording: Callable[[np.random.Generator], Wording], is_text: bool = False) -> Task:
    """The passkey task in the wordings that a generator draws."""

    def draw(
        tokenizer: PreTrainedTokenizerBase, filler: Filler, length: int, depth: float, generator: np.random.Generator
    ) -> Example:
        wording = draw_wording(generator)
        make = passkey_text_example if is_text else passkey_example
        return make(tokenizer, filler, length, depth, generator, wording)

    return Task(draw, True, is_text)


TASKS = {
    "passkey": Task(passkey_example, True),
    # As examples/train_passkey.py trains them, and such as it does not.
    "passkey_trained_wordings": _reworded(_any_of(TRAINING_WORDINGS)),
    "passkey_unseen_wordings": _reworded(_any_of(HELD_OUT_WORDINGS)),
    # As text, in the paper's words, in those of the grammar that it trains, and in such as it does not.
    "passkey_text": _reworded(draw_plain_wording, is_text=True),
    "passkey_text_grammar": _reworded(draw_wording, is_text=True),
    "passkey_text_unseen": _reworded(_any_of(HELD_OUT_WORDINGS), is_text=True),
    "needle": Task(needle_example, True),
    # Among others of the same form: what is asked for is not the odd one out.
    "needles": Task(partial(needle_example, num_decoys=NUM_DECOYS), True),
    "numbers": Task(number_example, True),
    "passkey_decoys": Task(partial(passkey_example, num_decoys=NUM_DECOYS), True),
    "mqar": Task(
        lambda tokenizer, filler, length, depth, generator: mqar_example(tokenizer, filler, length, generator), False
    ),
    "variable_tracking": Task(
        lambda tokenizer, filler, length, depth, generator: variable_tracking_example(
            tokenizer, filler, length, generator
        ),
        False,
    ),
}


# What may be off, and the arguments of `memory_off` for it.
MEMORY_OFF: dict[str, dict[str, bool]] = {"all": {}, "matrix": {"slots": False}, "slots": {"matrix": False}}


class Score(NamedTuple):
    """
    Attributes:
        token_accuracy: the share of answer tokens that are the most probable ones.
        exact: whether all of them are.
        found: the most probable tokens, `(answers,)`, or those that were generated.
    """

    token_accuracy: float
    exact: bool
    found: torch.Tensor


@torch.no_grad()
def score(
    model: PreTrainedModel, example: Example, chunk_length: int = 4096, progress: Progress | None = None
) -> Score:
    """
    Reads an example through the model's own cache, chunk by chunk: in constant memory if that is an [`InfiniCache`].

    Args:
        chunk_length: number of tokens in a call.
    """
    cache, found = None, []
    # The last token predicts nothing.
    inputs, asked = example.input_ids[:-1], example.answer_positions - 1
    for start in range(0, len(inputs), chunk_length):
        chunk = inputs[start : start + chunk_length]
        kept = asked[(asked >= start) & (asked < start + len(chunk))] - start
        keep: Any = kept.to(model.device) if len(kept) else 1
        outputs = model(
            chunk.unsqueeze(0).to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=keep
        )
        cache = outputs.past_key_values
        if len(kept):
            found.append(outputs.logits[0].argmax(-1).cpu())
        if progress is not None:
            progress(len(chunk))
    tokens = torch.cat(found)
    is_right = tokens == example.input_ids[example.answer_positions]
    return Score(is_right.double().mean().item(), bool(is_right.all()), tokens)


@torch.no_grad()
def score_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    chunk_length: int = 4096,
    progress: Progress | None = None,
) -> Score:
    """
    Lets `generate()` write after the text before the answers. White space aside, it has to start with the answer;
    `token_accuracy` is the share of the answer's characters that are right.
    """
    prompt, answer = example.input_ids[None, : example.answer_positions[0]].to(model.device), example.facts["answer"]
    generate: Any = model.generate
    # Two more for white space.
    written = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(example.answer_positions) + 2,
        do_sample=False,
        prefill_chunk_size=chunk_length,
    )[0, prompt.shape[1] :].cpu()
    text = str(tokenizer.decode(written, skip_special_tokens=True)).strip()
    if progress is not None:
        progress(len(example.input_ids) - 1)
    right = [found == expected for found, expected in zip(text, answer)]
    return Score(sum(right) / len(answer), text.startswith(answer), written)


class Setting(NamedTuple):
    """What trials have in common: `depth` is the number of the part, of `depths`, that holds what is sought."""

    task: str
    filler: str
    length: int
    depth: int
    depths: int


def draw_example(
    tokenizer: PreTrainedTokenizerBase, filler: Filler, setting: Setting, trial: int, seed: int
) -> Example:
    """The same for the same arguments, whatever was drawn before. The depth is anywhere within the setting's part."""
    generator = np.random.default_rng([seed, setting.length, setting.depth, setting.depths, trial])
    depth = (setting.depth + generator.random()) / setting.depths
    return TASKS[setting.task].draw(tokenizer, filler, setting.length, depth, generator)


Row = dict[str, Any]


def run_trials(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fillers: dict[str, Filler],
    settings: Iterable[tuple[Setting, int]],
    seed: int = 0,
    chunk_length: int = 4096,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """
    Runs trials one by one.

    Args:
        fillers: by the name that a setting has for it.
        settings: and the number of the trial in each.

    Yields:
        For each the fields of its setting, `trial`, `seed`, the facts of its example, `found` (text), `token_accuracy`
        and `exact`: what [`markdown`] and [`plot`] take.
    """
    for setting, trial in settings:
        example = draw_example(tokenizer, fillers[setting.filler], setting, trial, seed)
        if TASKS[setting.task].is_text:
            scored = score_text(model, tokenizer, example, chunk_length, progress)
        else:
            scored = score(model, example, chunk_length, progress)
        facts = {**example.facts}
        if "depth" in facts:
            facts["depth_drawn"] = facts.pop("depth")
        results = {
            "found": tokenizer.decode(scored.found),
            "token_accuracy": scored.token_accuracy,
            "exact": scored.exact,
        }
        yield {**setting._asdict(), "trial": trial, "seed": seed, **facts, **results}


class RetrievalCallback(TrainerCallback):
    """
    Logs how well examples are answered, as `eval_{name}_exact` and `eval_{name}_token_accuracy`, after each
    evaluation: `trainer.add_callback(RetrievalCallback(trainer, "passkey", examples))`. They are also in the metrics
    of the evaluation, by which the best checkpoint can be chosen.
    """

    def __init__(self, trainer: Trainer, name: str, examples: Sequence[Example], chunk_length: int = 4096):
        self.trainer, self.name, self.examples, self.chunk_length = trainer, name, examples, chunk_length

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        was_training = model.training
        model.eval()
        scores = [score(model, example, self.chunk_length) for example in self.examples]
        model.train(was_training)
        found = {
            f"eval_{self.name}_exact": float(np.mean([scored.exact for scored in scores])),
            f"eval_{self.name}_token_accuracy": float(np.mean([scored.token_accuracy for scored in scores])),
        }
        if metrics is not None:
            metrics.update(found)
        self.trainer.log(found)


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _groups(rows: Sequence[Row], names: Sequence[str]) -> dict[tuple, list[Row]]:
    """Rows that agree in all of the named fields, in the order of these fields."""
    keys = sorted({tuple(row[name] for name in names) for row in rows})
    return {key: [row for row in rows if tuple(row[name] for name in names) == key] for key in keys}


def markdown(rows: Sequence[Row]) -> str:
    """A table of exact answers by task, filler and length, with the worst of the depths."""
    lines = [
        "| task | filler | tokens | trials | exact | tokens right | worst depth |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for (task, filler, length), group in _groups(rows, ("task", "filler", "length")).items():
        worst = ""
        if TASKS[task].has_depth:
            by_depth = _groups(group, ("depth", "depths"))
            (part, parts), worst_rows = min(by_depth.items(), key=lambda item: _mean(item[1], "exact"))
            right = sum(row["exact"] for row in worst_rows)
            worst = f"{part / parts:.0%} to {(part + 1) / parts:.0%}: {right} of {len(worst_rows)}"
        right = sum(row["exact"] for row in group)
        shares = f"{right} ({right / len(group):.0%})", f"{_mean(group, 'token_accuracy'):.1%}"
        lines.append(f"| {' | '.join([task, filler, f'{length:,}', f'{len(group)}', *shares, worst])} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], file: str | Path) -> None:
    """The heatmap, depth by length, of exact answers; one per task and filler. Needs matplotlib."""
    from matplotlib.figure import Figure

    panels = _groups(rows, ("task", "filler"))
    figure = Figure(figsize=(1.5 + 5 * len(panels), 4.5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, ((task, filler), group) in zip(all_axes, panels.items()):
        lengths = sorted({row["length"] for row in group})
        parts = max(row["depths"] for row in group)
        shares = np.full((parts, len(lengths)), np.nan)
        for (part, depths, length), cell in _groups(group, ("depth", "depths", "length")).items():
            shares[part * parts // depths : (part + 1) * parts // depths, lengths.index(length)] = _mean(cell, "exact")
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", extent=(0, len(lengths), 100, 0))
        for (part, column), share in np.ndenumerate(shares):
            if not np.isnan(share):
                axes.text(column + 0.5, (part + 0.5) * 100 / parts, f"{share:.0%}", ha="center", va="center", size=8)
        axes.set_xticks(np.arange(len(lengths)) + 0.5, [f"{length:,}" for length in lengths])
        axes.set(title=f"{task}: exact answers, filler: {filler}", xlabel="tokens", ylabel="depth (% of the filler)")
    figure.colorbar(image, ax=all_axes)
    figure.savefig(file, dpi=150)


def weights_digest(model: PreTrainedModel) -> str:
    """
    By which files of trials know the weights of any causal model: hexadecimal, different where a weight or dtype is.
    """
    digest = hashlib.sha256()
    # By the names that they had when the trials in docs/recall were recorded.
    weights = {
        name.replace("memory.write_strength", "write_strength").replace("memory.", "memory_"): weight
        for name, weight in model.state_dict().items()
    }
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def config_digest(model: PreTrainedModel) -> str:
    """By which files of trials know what else a model computes with: conversions of one base have the same weights."""
    config: Any = model.config
    if hasattr(config, "memory_fields"):
        fields = config.memory_fields()
    else:
        others = ("transformers_version", "dtype", "use_cache", "architectures", "_name_or_path")
        fields = {name: value for name, value in config.to_diff_dict().items() if name not in others}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _start_or_continue(file: Path, made_by: dict[str, str], fillers: Mapping[str, str]) -> list[Row]:
    """
    The trials that a file holds; a new file, of `made_by` alone, if there is none. A last line that a full disk or a
    kill has cut is dropped. Files of earlier versions do not say everything.

    Args:
        fillers: the digest of each, by name.

    Raises:
        ValueError: if another model made them, or the same with another part of its memory off, or a filler of the
            same name was another text.
    """
    *lines, rest = file.read_text(encoding="utf-8").split("\n") if file.is_file() else [""]
    if rest:
        logger.warning("The last line of %s was not whole: that trial is run again.", file)
    if rest or not lines:
        lines = lines or [json.dumps(made_by)]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    first, *rows = map(json.loads, lines)
    if first != {name: made_by.get(name) for name in first}:
        raise ValueError(f"{file} holds trials of {first}, not of {made_by}: name another --output.")
    for row in rows:
        if len({row.get("filler_digest"), fillers.get(row["filler"])} - {None}) > 1:
            raise ValueError(f"{file} holds trials of another text {row['filler']}: name another --output.")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a .gguf file or a Hub id of a causal language model")
    parser.add_argument("--task", choices=TASKS, default="passkey", help="(default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], help="in tokens (default: 4096)")
    parser.add_argument(
        "--fillers",
        nargs="+",
        default=["sentence", "bible"],
        help='"sentence" (repeated), "bible" (the King James Bible) or text files (default: sentence bible)',
    )
    parser.add_argument(
        "--depths", type=int, default=10, help="into how many parts the depth is divided (default: %(default)s)"
    )
    parser.add_argument("--trials", type=int, default=5, help="for each part of the depth (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the trials (default: %(default)s)")
    parser.add_argument(
        "--memory-off",
        nargs="?",
        choices=MEMORY_OFF,
        const="all",
        help='shut the memory out, or a part of it: "matrix", "slots" (default: if given, all)',
    )
    parser.add_argument("--chunk-length", type=int, default=4096, help="tokens in a call (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as they are saved)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--output", help="where to write OUTPUT.jsonl, as it goes, and OUTPUT.png")
    options = parser.parse_args(arguments)
    if options.output and importlib.util.find_spec("matplotlib") is None:
        parser.error("--output draws a heatmap: pip install matplotlib")
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    tokenizer = load_tokenizer(options.model)
    found = [find_filler(tokenizer, name) for name in options.fillers]
    fillers = {filler.name: filler for filler in found}
    if len(fillers) < len(found):
        parser.error(f"fillers go by the names of their files, which must differ: {', '.join(options.fillers)}")
    digests = {name: hashlib.sha256(filler.ids.numpy().tobytes()).hexdigest()[:16] for name, filler in fillers.items()}
    # What a trial cannot be made of is known before hours of the others.
    for filler, length in product(fillers.values(), options.lengths):
        draw_example(tokenizer, filler, Setting(options.task, filler.name, length, 0, 1), 0, options.seed)
    model = load_model(options.model, dtype=options.dtype, device_map=options.device)
    if options.memory_off and not hasattr(model.config, "segment_length"):
        parser.error(f"--memory-off: {options.model} has no memory, it is no Infini-attention model")
    if options.memory_off == "slots" and not model.config.layers_with_slots:
        parser.error(f"--memory-off slots: {options.model} has no slots")
    file = Path(f"{options.output}.jsonl") if options.output else None
    state = (
        "on" if options.memory_off is None else "off" if options.memory_off == "all" else f"{options.memory_off} off"
    )
    made_by = {"weights": weights_digest(model), "memory": state, "config": config_digest(model)}
    rows = [] if file is None else _start_or_continue(file, made_by, digests)
    done = {(Setting(*(row[name] for name in Setting._fields)), row["trial"], row["seed"]) for row in rows}
    wanted = [
        (Setting(options.task, filler, length, depth, options.depths), trial)
        for length in options.lengths
        for filler in fillers
        for trial in range(options.trials)
        for depth in range(options.depths)
    ]
    wanted = [(setting, trial) for setting, trial in wanted if (setting, trial, options.seed) not in done]
    total = sum(setting.length - 1 for setting, _ in wanted)
    with (
        tqdm(total=total, unit="token", unit_scale=True, file=sys.stderr) as progress,
        memory_off(model, **MEMORY_OFF[options.memory_off]) if options.memory_off else nullcontext(),
    ):
        run = run_trials(model, tokenizer, fillers, wanted, options.seed, options.chunk_length, progress.update)
        for row in run:
            row["filler_digest"] = digests[row["filler"]]
            rows.append(row)
            progress.set_postfix(exact=f"{_mean(rows, 'exact'):.0%}")
            if file is not None:
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row) + "\n")
    print(markdown(rows))
    if options.output:
        plot(rows, f"{options.output}.png")


if __name__ == "__main__":
    main()
