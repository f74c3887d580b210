"""
Attention transfer (LoLCATs, arXiv 2410.10254): teaches the memories of a conversion what its windows do not show.

The teacher is the base with full attention, whose weights are in the conversion. Each layer learns by itself, from the
teacher's hidden states, to give the attention's output that full attention gives; only the memory's own parameters
change, and nothing is propagated through the network.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, embedding, linear
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import logging

from modeling_infini import InfiniConfig
from modeling_infini.cache import Past
from modeling_infini.cache_layer import LayerPast
from modeling_infini.local_attention import angle_table, angles_of_call, local_attention_mask
from modeling_infini.memory import MemoryState
from modeling_infini.modeling_infini import InfiniAttention, InfiniDecoderLayer

from .architectures import MEMORY_OPTIONS, base_config
from .base_fingerprint import EMBEDDINGS, base_fingerprint
from .checkpoints import Checkpoint, is_memory_weight, named_full_disk, read_json, write_json
from .in_place import replace_memory
from .memory_weights import initial_memory_weights, is_taught
from .slot_facts import fact_windows
from .slot_scores import fit_slot_score
from .small_files import tokenizer_of


# What the memories become.
FIELDS = {"memory_feature_map": "exp", "token_gates": True}

# Of the texts, at most, where nothing else is asked for; long windows need more.
TOKENS = 57_344
# Segments in a calibration window: what full attention sees is at most this.
WINDOW_SEGMENTS = 8
# One of so many windows is not trained on: by these the layers are chosen, which takes two of them.
HELD_OUT = 7
LEAST_WINDOWS = HELD_OUT + 2
# Windows with facts, by which the scores of slots are fitted.
FACT_WINDOWS = 40

# Below this share of the output's square error that local attention leaves, a layer looks for nothing far away.
LEAST_MISSING = 0.015
# What a text's own memory must explain beyond another text's, as a share of what local attention leaves, and of what
# its own memory explains: most of what the lower layers look for far away is the same in all texts.
LEAST_MARGIN = 0.03
LEAST_OWN_SHARE = 1 / 3

# Under Adam. A token's gate is a sum over hidden_size inputs, and learns nothing at greater rates.
LEARNING_RATE = 0.01
TOKEN_GATE_LEARNING_RATE = 0.001
BETAS = (0.9, 0.99)
WARM_UP = 5
# Queries of one window are much alike: of each so many, a step takes one.
QUERY_STRIDE = 8

LOGITS_AT_A_TIME = 512
PROGRESS = ".transfer"
ENDED = ".transfer-ended"
# What a recorded argument is to a user.
ARGUMENTS = {"fingerprint": "the base's weights", "ids": "texts or tokens", "memory": "the memory's configuration"}

logger = logging.get_logger(__name__)


@dataclass
class LayerTransfer:
    """
    What one layer has learned, on calibration text that it was not trained on.

    Attributes:
        missing: square error of local attention after `o_proj`, as a share of full attention's output.
        own, foreign: the share of it that the memory explains, 1 - error / error of local attention, with the memory
            of the text itself and with another text's; `None` where nothing was missing.
        is_kept: whether the layer gets a memory of M and z.
    """

    layer: int
    missing: float
    own: float | None = None
    foreign: float | None = None
    is_kept: bool = False

    @property
    def looks_far(self) -> bool:
        """Whether there is something to learn. Such a layer gets slots, where the model has some."""
        return self.missing >= LEAST_MISSING

    def __str__(self) -> str:
        text = f"layer {self.layer}: the window leaves {self.missing:.1%} of the output"
        if self.own is None:
            return f"{text}: no memory"
        verdict = "a memory" if self.is_kept else "no memory, since it explains little, or another text's as much"
        return f"{text}, of which its own memory explains {self.own:.2f}, another text's {self.foreign:.2f}: {verdict}"


@dataclass
class Transfer:
    """
    Attributes:
        layers: of each layer, what it learned.
        slot_layers: the layers with slots.
        loss_off, loss_on: nats per token of calibration text that was not trained on, without and with the memories
            and slots; `None` where no layer has any.
    """

    layers: list[LayerTransfer]
    slot_layers: list[int] = field(default_factory=list)
    loss_off: float | None = None
    loss_on: float | None = None

    @property
    def memory_layers(self) -> list[int]:
        return [layer.layer for layer in self.layers if layer.is_kept]


class Example(NamedTuple):
    """
    One layer's attention of one window, but for M and z.

    Attributes:
        hidden_states: `(T, hidden_size)`, after the input norm.
        queries, local, target: `(T, heads, head_dim)`; without RoPE; output of local attention, which sees window and
            slots, and of full attention.
        keys, values: `(T, kv_heads, head_dim)`, keys without RoPE.
    """

    hidden_states: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    local: torch.Tensor
    target: torch.Tensor


def transfer(
    folder: str | os.PathLike,
    texts: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    teacher: str | os.PathLike | None = None,
    tokens: int | None = None,
    steps: int = 400,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    report: Callable[[LayerTransfer], object] | None = None,
) -> Transfer:
    """
    Trains the memories of a conversion by attention transfer, in place. Layers whose memory is of no use get none.

    In a model with `num_memory_slots`, each layer that looks beyond its window gets slots, with a score that keeps the
    tokens of stated facts ([`fit_slot_score`]); M and z learn what window and slots do not show.

    One layer's weights, the hidden states of the texts and what one layer makes of them are held in memory at a time.
    An interrupted run goes on where it was if it is called again; until it has ended, the conversion is as it was.

    Args:
        folder: a conversion on this machine, with its tokenizer.
        texts: files of plain text, and folders with `.txt` files; one, or several.
        teacher: a folder or file with the base, if not its weights in the conversion are to be read.
        tokens: of the texts, at most; by default 57,344, or nine windows of eight segments if these are more. With
            slots, they are read in 40 windows more.
        steps: of Adam, per layer.
        seed: of the choice of texts and of the order of the steps.
        dtype: of the teacher. The memories are trained in float32.
        report: is called with what each layer has learned.

    Raises:
        ValueError: if the checkpoint is no conversion, the teacher has other weights, the texts are too short, or an
            unfinished run was started with other arguments.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: what is on the Hub is downloaded first.")
    texts = [texts] if isinstance(texts, (str, os.PathLike)) else texts
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    checkpoint = Checkpoint(folder)
    all_layers = {"memory_layers": None, "slot_layers": None}
    config = _config(checkpoint.infini_config, **FIELDS, **all_layers, head_gate_init_value=0.0)
    fingerprint = base_fingerprint(checkpoint)
    weights = checkpoint if teacher is None else Checkpoint(teacher)
    # In the conversion's dtype: in float16, small weights are others.
    as_here = checkpoint.shapes[EMBEDDINGS].dtype
    if teacher is not None and fingerprint not in (base_fingerprint(weights), base_fingerprint(weights, as_here)):
        raise ValueError(f"{teacher} is not the base of {folder}: its weights are others. Leave the teacher out.")
    tokenizer, (ids, of_texts, used) = _calibration(folder, config, texts, tokens, seed)
    if len(set(of_texts)) == 1:
        logger.warning(
            "All windows are of one text: what another text's memory explains is that of another part of it."
        )
    is_fact = None
    if config.num_memory_slots:
        with_facts, is_fact = fact_windows(tokenizer, used, ids.shape[1], FACT_WINDOWS, seed)
        ids = torch.cat([ids, with_facts])
    arguments = {
        "fingerprint": fingerprint,
        "ids": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "memory": {name: getattr(config, name) for name in MEMORY_OPTIONS},
        "steps": steps,
        "seed": seed,
        "dtype": str(dtype),
    }
    for ended in folder.glob(f"{ENDED}-*"):
        shutil.rmtree(ended, ignore_errors=True)
    progress = _Progress(folder / PROGRESS, arguments)
    if (before := progress.hidden_states()) is not None:
        logger.warning("An unfinished run goes on: %d of %d layers are done.", before[0], config.num_hidden_layers)
    else:
        _warn_of_loss(checkpoint)
    run = _Run(weights, config, ids, dtype, progress, of_texts, is_fact)
    try:
        with named_full_disk(folder):
            done = run.choose(run.train(steps, seed, report))
    except KeyboardInterrupt:
        logger.warning(
            "Interrupted: %s is as it was. The same call or command goes on, by what is in %s; remove that folder if "
            "you do not want to.",
            folder,
            folder / PROGRESS,
        )
        raise
    fields = {**FIELDS, "memory_layers": done.memory_layers, "slot_layers": done.slot_layers or None}
    if not done.slot_layers:
        fields["num_memory_slots"] = 0
    replace_memory(folder, run.trained(done.memory_layers, done.slot_layers), fields)
    # At once: a kill in the midst of the removal would leave hidden states without what they were made of.
    ended = folder / f"{ENDED}-{uuid4().hex[:8]}"
    os.replace(folder / PROGRESS, ended)
    shutil.rmtree(ended)
    return done


def require_texts(folder: str | os.PathLike, texts: Sequence[str | os.PathLike]) -> None:
    """Raises what [`transfer`] would raise for texts that it cannot use."""
    _calibration(folder, Checkpoint(folder).infini_config, texts)


def _calibration(
    folder: str | os.PathLike,
    config: InfiniConfig,
    texts: Sequence[str | os.PathLike],
    tokens: int | None = None,
    seed: int = 0,
) -> tuple[PreTrainedTokenizerBase, tuple[torch.Tensor, list[int], list[str]]]:
    """The tokenizer, and what [`_calibration_windows`] makes of the texts."""
    length, tokenizer = _window_length(config), tokenizer_of(folder)
    tokens = max(TOKENS, LEAST_WINDOWS * length) if tokens is None else tokens
    return tokenizer, _calibration_windows(tokenizer, _read_texts(texts, seed), length, tokens)


def _warn_of_loss(checkpoint: Checkpoint) -> None:
    """A memory that was taught is replaced when the transfer ends."""
    applied = ((checkpoint.infini_config.converted_from or {}).get("memory") or {}).get("name")
    if applied or is_taught(checkpoint):
        logger.warning(
            "%s has a memory that was taught or applied already%s: it is learned anew, and replaced when this has "
            "ended. To keep it, interrupt this, and save it first: infini save-memory.",
            checkpoint.folder,
            f" ({applied})" if applied else "",
        )


def _config(config: InfiniConfig, **fields) -> InfiniConfig:
    changed = InfiniConfig.from_dict({**deepcopy(config.to_dict()), **fields})
    changed._attn_implementation = "sdpa"
    return changed


def _window_length(config: InfiniConfig) -> int:
    """Tokens in a calibration window: whole segments, and no more than the base was trained on."""
    segments = min(WINDOW_SEGMENTS, config.max_position_embeddings // config.segment_length)
    if segments < 3:
        raise ValueError(
            f"segment_length={config.segment_length} leaves nothing to learn from: the teacher was trained on "
            f"{config.max_position_embeddings} positions, and three segments are needed. Convert it with "
            "a smaller one."
        )
    return segments * config.segment_length


def _read_texts(texts: Sequence[str | os.PathLike], seed: int) -> Iterator[str]:
    """What stands in the files, in random order."""
    files: list[Path] = []
    for path in map(Path, texts):
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {path}.")
        files += sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"There is no .txt file in {', '.join(map(str, texts))}.")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    for file in (files[index] for index in order):
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8: {error}.") from error


def _calibration_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int, tokens: int
) -> tuple[torch.Tensor, list[int], list[str]]:
    """
    Windows `(windows, length)` from as many texts as are needed, in turn, and spread over each; the number of each
    window's text; and these texts.
    """
    count, too_short = tokens // length, 0
    found, used = [], []
    for text in texts:
        text_ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        if len(text_ids) >= length:
            found.append(text_ids[: len(text_ids) // length * length].view(-1, length))
            used.append(text)
        else:
            too_short += 1
        if len(found) == count:
            break
    if too_short:
        logger.warning("%d texts are of no use: they have fewer than %d tokens, a window.", too_short, length)
    quota = [0] * len(found)
    while sum(quota) < min(count, sum(map(len, found))):
        for index, windows in enumerate(found):
            quota[index] += sum(quota) < count and quota[index] < len(windows)
    spread = [windows[torch.arange(n) * len(windows) // max(n, 1)] for windows, n in zip(found, quota)]
    turns = [(text, turn) for turn in range(max(quota, default=0)) for text, n in enumerate(quota) if turn < n]
    chosen = [spread[text][turn] for text, turn in turns]
    if len(chosen) < LEAST_WINDOWS:
        raise ValueError(
            f"The texts and tokens={tokens} give {len(chosen)} windows of {length} tokens; at least {LEAST_WINDOWS} "
            "are needed. Allow more tokens, or give longer texts: files shorter than a window are of no use."
        )
    return torch.stack(chosen), [text for text, _ in turns], used


class _Progress:
    """What an unfinished run has done, on disk: the memory and figures of each layer, and the last hidden states."""

    def __init__(self, folder: Path, arguments: dict[str, Any]):
        self.folder = folder
        file = folder / "arguments.json"
        if file.is_file() and (before := read_json(file)) != arguments:
            changed = [name for name in arguments if before.get(name) != arguments[name]]
            if "seed" in changed and "ids" in changed:
                # By which texts are chosen.
                changed.remove("ids")
            names = ", ".join(ARGUMENTS.get(name, name) for name in changed)
            raise ValueError(
                f"{folder} holds an unfinished run with other arguments ({names}). Repeat that command to go on, or "
                "remove this folder to start anew."
            )
        folder.mkdir(exist_ok=True)
        write_json(file, arguments)

    def memory(self, layer: int) -> dict[str, torch.Tensor]:
        """Weights of a layer's memory by their names in the model."""
        return load_file(self.folder / f"layer-{layer}.safetensors")

    def hidden_states(self) -> tuple[int, torch.Tensor, list[LayerTransfer]] | None:
        """The next layer, its inputs, and what the layers before it have learned; `None` at the start."""
        file = self.folder / "hidden_states.safetensors"
        if not file.is_file():
            return None
        with safe_open(file, "pt") as content:
            figures = [LayerTransfer(**layer) for layer in json.loads(content.metadata()["layers"])]
            return len(figures), content.get_tensor("hidden_states"), figures

    def save(self, hidden_states: torch.Tensor, layers: list[LayerTransfer], memory: dict[str, torch.Tensor]) -> None:
        """Records a finished layer, the last of `layers`."""
        if memory:
            save_file(memory, self.folder / f"layer-{layers[-1].layer}.safetensors")
        # The hidden states last, and at once: by them a run goes on.
        file = self.folder / f"{uuid4().hex}.unfinished"
        figures = json.dumps([asdict(layer) for layer in layers])
        save_file({"hidden_states": hidden_states}, file, metadata={"layers": figures})
        os.replace(file, self.folder / "hidden_states.safetensors")


@dataclass
class _Run:
    weights: Checkpoint
    config: InfiniConfig
    ids: torch.Tensor
    dtype: torch.dtype
    progress: _Progress
    # Of each window of plain text. After them come windows with facts: `is_fact` says which of their tokens, `(F, T)`.
    texts: list[int]
    is_fact: torch.Tensor | None = None

    @cached_property
    def held_out(self) -> list[int]:
        """Of each `HELD_OUT` windows the first of the text that has the fewest so far, but not one text in a row."""
        found: list[int] = []
        of_texts: list[int] = []
        for start in range(0, len(self.texts), HELD_OUT):
            block = range(start, min(start + HELD_OUT, len(self.texts)))
            found.append(min(block, key=lambda w: (of_texts.count(self.texts[w]), self.texts[w] in of_texts[-1:])))
            of_texts.append(self.texts[found[-1]])
        return found

    @property
    def foreign(self) -> list[int]:
        """Which of the held-out windows is another text's to each of them: the next one that is, if any is."""
        of_texts = [self.texts[window] for window in self.held_out]
        count = len(of_texts)
        orders = [[(own + step) % count for step in range(1, count)] for own in range(count)]
        return [
            next((other for other in order if of_texts[other] != of_texts[own]), order[0])
            for own, order in enumerate(orders)
        ]

    def read(self, name: str) -> torch.Tensor:
        return self.weights.read(name).to(self.dtype)

    def layer(self, config: InfiniConfig, index: int, memory: Mapping[str, torch.Tensor]) -> InfiniDecoderLayer:
        """A layer of the model with the weights of the base, and those of a memory by their names in the model."""
        with torch.device("meta"):
            layer = InfiniDecoderLayer(config, index)
        prefix = f"model.layers.{index}."
        state = {}
        for name in layer.state_dict():
            is_kept_wide = any(f".{module}." in f".{name}" for module in config.float32_modules)
            if not is_memory_weight(prefix + name):
                state[name] = self.read(prefix + name)
            else:
                state[name] = memory[prefix + name] if is_kept_wide else memory[prefix + name].to(self.dtype)
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False)

    def call(self, config: InfiniConfig, has_memory: bool) -> dict[str, Any]:
        """The arguments of a layer that reads one window."""
        states = torch.empty(0, dtype=self.dtype)
        layout = Past().plan_call(None, None, (1, self.ids.shape[1]), config, states.device, {})
        angles = angles_of_call(angle_table(LlamaRotaryEmbedding(config=config), config, states), layout)
        mask = local_attention_mask(config, layout, states)
        past = LayerPast(has_memory)
        return {"position_embeddings": angles, "attention_mask": mask, "layout": layout, "past": past}

    def teacher_config(self, index: int) -> InfiniConfig:
        """Full attention over a window, or over the base's own sliding window, as local attention."""
        base = base_config(self.config)
        kinds = getattr(base, "layer_types", None)
        slides = kinds is None or kinds[index] == "sliding_attention"
        window, length = getattr(base, "sliding_window", None) if slides else None, self.ids.shape[1]
        fields = {"segment_length": length, "local_attention": "segment"}
        if window is not None and window < length:
            fields = {"segment_length": window, "local_attention": "sliding"}
        return _config(self.config, **fields, num_sink_tokens=0, memory_layers=[], num_memory_slots=0)

    def train(self, steps: int, seed: int, report: Callable[[LayerTransfer], object] | None) -> list[LayerTransfer]:
        """Every layer in turn, whose inputs are those of the teacher."""
        start, hidden_states, done = self.progress.hidden_states() or (0, self.embedded(), [])
        count = self.config.num_hidden_layers
        with tqdm(total=count, initial=start, desc="Transfer", unit="layer") as progress:
            for index in range(start, count):
                with torch.no_grad():
                    missing, read, with_facts = self.attend(index, hidden_states)
                figures, trained = LayerTransfer(index, missing), {}
                if figures.looks_far:
                    memory = initial_memory_weights(self.config, index)
                    if self.is_fact is not None:
                        score = fit_slot_score(with_facts, self.is_fact[:, self.config.num_sink_tokens :])
                        # Not held while the layer learns.
                        with_facts.clear()
                        memory[f"model.layers.{index}.self_attn.slot_score.weight"] = score
                    student: Any = self.layer(self.config, index, memory).self_attn
                    examples, held_out = self.examples(student, read)
                    task = _LayerTask(student, self.call(self.config, True)["layout"])
                    task.train(examples, steps, seed + index)
                    figures.own, figures.foreign = task.explained(held_out, self.foreign)
                    margin = figures.own - figures.foreign
                    figures.is_kept = figures.own >= LEAST_MARGIN
                    figures.is_kept &= margin >= max(LEAST_MARGIN, LEAST_OWN_SHARE * figures.own)
                    prefix = f"model.layers.{index}.self_attn."
                    learned = (name for name in memory if "slot_score" not in name)
                    trained = memory | {
                        name: student.get_parameter(name.removeprefix(prefix)).detach() for name in learned
                    }
                done.append(figures)
                self.progress.save(hidden_states, done, trained)
                progress.update()
                if report is not None:
                    progress.clear()
                    report(figures)
        return done

    def embedded(self) -> torch.Tensor:
        return embedding(self.ids, self.read("model.embed_tokens.weight"))

    def attend(
        self, index: int, hidden_states: torch.Tensor
    ) -> tuple[float, dict[int, tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
        """
        Reads all windows by the teacher, in place.

        Returns:
            What local attention misses, as in [`LayerTransfer`]; the inputs of attention `(T, hidden_size)` and its
            output before `o_proj` `(T, heads * head_dim)` by window of plain text; and the inputs of each window with
            facts. The last two for a layer that looks far.
        """
        config = self.teacher_config(index)
        teacher, call = self.layer(config, index, {}), self.call(config, False)
        plain_config = _config(self.config, memory_layers=[], num_memory_slots=0)
        plain: Any = self.layer(plain_config, index, {}).self_attn
        plain_call, weight, after = self.call(plain_config, False), plain.o_proj.weight, self.config.segment_length
        error, norm = 0.0, torch.finfo(torch.float32).tiny
        read: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        with_facts: list[torch.Tensor] = []
        others = (window for window in range(len(self.ids)) if window not in self.held_out)
        for window in (*self.held_out, *others):
            states = hidden_states[window].clone().unsqueeze(0)
            with _inputs_of(teacher.self_attn.o_proj) as target:
                hidden_states[window] = teacher(states, **call)[0]
            inputs = teacher.input_layernorm(states)
            if window in self.held_out:
                with _inputs_of(plain.o_proj) as local:
                    plain(inputs, **plain_call)
                error += linear((local[0] - target[0])[after:], weight).float().square().sum().item()
                norm += linear(target[0][after:], weight).float().square().sum().item()
            elif not LayerTransfer(index, error / norm).looks_far:
                continue
            if window < len(self.texts):
                read[window] = inputs[0], target[0]
            else:
                with_facts.append(inputs[0, self.config.num_sink_tokens :])
        return error / norm, read, with_facts

    @torch.no_grad()
    def examples(
        self, student: InfiniAttention, read: dict[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[list[Example], list[Example]]:
        """What a layer learns from, and what it is judged by, of what the teacher has read."""
        call = self.call(self.config, False)
        examples = {window: _example(student, *of, call) for window, of in read.items()}
        held_out = [examples.pop(window) for window in self.held_out]
        return list(examples.values()), held_out

    def trained(self, memory_layers: Sequence[int], slot_layers: Sequence[int]) -> dict[str, torch.Tensor]:
        """The weights of the memories and of the slots' scores that are in use."""
        found: dict[str, torch.Tensor] = {}
        for layer in {*memory_layers, *slot_layers}:
            for name, weight in self.progress.memory(layer).items():
                if layer in (slot_layers if "slot_score" in name else memory_layers):
                    found[name] = weight
        return found

    def choose(self, layers: list[LayerTransfer]) -> Transfer:
        """Drops the half of the layers whose memories explain least, until the rest helps the model on new text."""
        with_slots = [layer.layer for layer in layers if layer.looks_far and self.is_fact is not None]
        off = self.losses([], [])
        least = self.losses([], with_slots) if with_slots else off
        while kept := [layer for layer in layers if layer.is_kept]:
            on = self.losses([layer.layer for layer in kept], with_slots)
            if on < least:
                return Transfer(layers, with_slots, off, on)
            kept.sort(key=lambda layer: layer.missing * ((layer.own or 0) - (layer.foreign or 0)))
            for layer in kept[: (len(kept) + 1) // 2]:
                layer.is_kept = False
        return Transfer(layers, with_slots, off, least) if with_slots else Transfer(layers)

    @torch.no_grad()
    def losses(self, memory_layers: list[int], slot_layers: list[int]) -> float:
        """Nats per token of the held-out windows from the second segment on, with what some layers have learned."""
        trained = self.trained(memory_layers, slot_layers)
        hidden_states = embedding(self.ids[self.held_out], self.read("model.embed_tokens.weight"))
        own = {"memory_layers": memory_layers, "slot_layers": slot_layers or None}
        config = _config(self.config, **own, num_memory_slots=self.config.num_memory_slots if slot_layers else 0)
        for index in range(self.config.num_hidden_layers):
            layer, call = self.layer(config, index, trained), self.call(config, index in memory_layers)
            for states in hidden_states.unsqueeze(1):
                states[0] = layer(states, **call)[0]
        norm = LlamaRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight.data = self.read("model.norm.weight")
        head = self.read("model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight")
        after = self.config.segment_length
        states, targets = (
            norm(hidden_states[:, after:-1]).flatten(0, 1),
            self.ids[self.held_out, after + 1 :].flatten(),
        )
        total = sum(
            cross_entropy(linear(part, head).float(), target, reduction="sum").item()
            for part, target in zip(states.split(LOGITS_AT_A_TIME), targets.split(LOGITS_AT_A_TIME))
        )
        return total / len(targets)


@contextmanager
def _inputs_of(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the module is called with inside the block."""
    inputs: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0][0]))
    try:
        yield inputs
    finally:
        handle.remove()


def _example(
    student: InfiniAttention, hidden_states: torch.Tensor, target: torch.Tensor, call: dict[str, Any]
) -> Example:
    """The example of one window, of which a layer's attention gets `hidden_states`, `(T, hidden_size)`."""
    shape = (len(hidden_states), -1, student.head_dim)
    with _inputs_of(student.o_proj) as local:
        student(hidden_states.unsqueeze(0), **call)
    queries, keys, values = (
        projection(hidden_states).view(shape) for projection in (student.q_proj, student.k_proj, student.v_proj)
    )
    if student.config.qk_norm:
        queries, keys = student.q_norm(queries), student.k_norm(keys)
    return Example(hidden_states, queries, keys, values, local[0].view(shape), target.view(shape))


class _LayerTask:
    """A layer's memory and what it is to learn: the output of full attention beyond the first segment."""

    def __init__(self, attention: InfiniAttention, layout):
        self.attention = attention
        self.layout = layout
        attention.memory.float()
        self.output_weight = attention.o_proj.weight.float()

    def train(self, examples: list[Example], steps: int, seed: int) -> None:
        """One window a step, in random order."""
        gates, token_gate = self.attention.head_gates, self.attention.memory.token_gate
        others = [of for name, of in self.attention.memory.named_parameters() if "token_gate" not in name]
        groups: list[dict[str, Any]] = [
            {"params": [*gates.parameters(), *others], "lr": LEARNING_RATE},
            {"params": list(token_gate.parameters()), "lr": TOKEN_GATE_LEARNING_RATE},
        ]
        trained = [parameter for group in groups for parameter in group["params"]]
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for _ in range(steps):
            order = order or torch.randperm(len(examples), generator=generator).tolist()
            example = examples[order.pop()]
            first = int(torch.randint(QUERY_STRIDE, (), generator=generator))
            queries = slice(first % self.segment_length, None, QUERY_STRIDE)
            error, before = self.error(example, self.memory(example), queries)
            optimizer.zero_grad()
            (error / before).backward()
            optimizer.step()
            cosine.step()
            warm_up.step()
        for parameter in trained:
            parameter.requires_grad_(False)

    @property
    def segment_length(self) -> int:
        return self.attention.config.segment_length

    def memory(self, example: Example) -> MemoryState:
        """The memory before each segment but the first, `(S - 1, kv_heads, ...)`."""
        states = (of.float().unsqueeze(0) for of in (example.hidden_states, example.keys, example.values))
        written = self.attention.memory.token_states(*states)
        before = LayerPast(True).scan(written, self.layout).before(self.layout)
        return MemoryState(*(of[1:] for of in before))

    def error(self, example: Example, memory: MemoryState, queries: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Square error after `o_proj` of some queries of each segment but the first, with the memory and without."""
        hidden_states, asked, local, target = (
            of.unflatten(0, (-1, self.segment_length))[1:, queries].float()
            for of in (example.hidden_states, example.queries, example.local, example.target)
        )
        share = self.attention.head_gates(self.attention.memory.token_gate(hidden_states))
        mixed = self.attention.memory(local, asked, memory, share)
        missed = ((mixed - target).flatten(2), (local - target).flatten(2))
        error, before = (linear(of, self.output_weight).square().sum() for of in missed)
        return error, before.clamp(min=torch.finfo(before.dtype).tiny)

    @torch.no_grad()
    def explained(self, examples: list[Example], others: list[int]) -> tuple[float, float]:
        """
        The share of local attention's error that the text's own memory explains, and that of another text: for each
        example, that of the one whose number `others` has.
        """
        memories = [self.memory(example) for example in examples]
        own = foreign = before = 0.0
        for example, memory, other in zip(examples, memories, (memories[number] for number in others)):
            error, without = self.error(example, memory, slice(None))
            own, before = own + error.item(), before + without.item()
            foreign += self.error(example, other, slice(None))[0].item()
        return 1 - own / before, 1 - foreign / before
