"""What somebody gets wrong who has not read the docs: each message says what to do."""

import copy
import errno
import json

import pytest
import torch
from base_models import base_model
from safetensors import SafetensorError
from test_memory_weights import OPTIONS
from tiny import random_ids, tiny_model
from tokenizers_of_bases import save_base
from transformers import AutoTokenizer, BatchEncoding
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.utils import logging

from infini_transformers.conversion import apply_memory, convert_to_infini, load_memory, save_memory
from modeling_infini import InfiniCache, InfiniForCausalLM
from modeling_infini.generation_infini import logger


N = 8


@pytest.fixture(autouse=True)
def say_it_each_time(monkeypatch):
    monkeypatch.setattr(logger, "warning_once", logger.warning)


IDS = random_ids(1, 9)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("a text", TypeError, r"got a str\. The tokenizer makes them of a text"),
        (IDS.tolist(), TypeError, r"got a list\. The tokenizer makes them"),
        (BatchEncoding({"input_ids": IDS}), TypeError, r"got a BatchEncoding\. Unpack.*model.generate\(\*\*inputs\)"),
        (IDS[0], ValueError, r"got \(9,\)\. A single text is a batch of one: ids.unsqueeze\(0\)"),
        (IDS.float(), TypeError, r"torch.long, got torch.float32: ids.long\(\)"),
        (
            IDS + 31,
            IndexError,
            r"ids from \d+ to \d+, and the model a vocabulary of 31 tokens: the tokenizer",
        ),
        (IDS - 40, IndexError, r"ids from -\d+ to -\d+, and the model a vocabulary"),
        (IDS[:, :0], ValueError, r"there is nothing to read\. An empty prompt can be the BOS token"),
    ],
)
def test_what_is_no_ids(given, error, message):
    model = tiny_model()
    for read in (model, model.generate, model.model):
        with pytest.raises(error, match=message):
            read(given)


def test_ids_in_int32_are_ids():
    assert torch.equal(tiny_model()(IDS.int()).logits, tiny_model()(IDS).logits)


def test_a_cache_is_made_of_a_configuration(tmp_path):
    model = tiny_model()
    for make in (lambda: InfiniCache(model), lambda: InfiniCache(base_model().config), lambda: InfiniCache("path")):
        with pytest.raises(TypeError, match=r"model.config, got a"):
            make()
    cache = model(IDS, use_cache=True).past_key_values
    cache.save_pretrained(tmp_path / "memory")
    with pytest.raises(TypeError, match="takes the model itself as well, but no path"):
        InfiniCache.from_pretrained(tmp_path / "memory", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"Name a folder that past_key_values\.save_pretrained"):
        InfiniCache.from_pretrained(tmp_path, model)
    for load in (
        lambda: InfiniForCausalLM.from_pretrained(tmp_path / "memory"),
        lambda: convert_to_infini(tmp_path / "memory", tmp_path / "out", segment_length=N),
        lambda: load_memory(model, tmp_path / "memory"),
    ):
        with pytest.raises(FileNotFoundError, match=r"what a model has read.*InfiniCache.from_pretrained"):
            load()


def test_generation_without_a_cache_is_slow_and_says_so(caplog):
    logging.enable_propagation()
    model = tiny_model()
    model.generate(IDS, max_new_tokens=2)
    assert "use_cache" not in caplog.text
    model.generate(IDS, max_new_tokens=2, use_cache=False)
    assert "use_cache=False reads the whole text again for every token" in caplog.text


@pytest.mark.parametrize("kind", ["replacing_spaces", "byte_level"])
def test_a_prompt_without_bos_is_named_where_the_tokenizer_adds_one(tmp_path, caplog, kind):
    logging.enable_propagation()
    base = save_base(tmp_path / "base", kind=kind)
    adds_bos = kind == "replacing_spaces"
    model = InfiniForCausalLM.from_pretrained(base, segment_length=N)
    assert model.config.converted_from.get("starts_with") == (1 if adds_bos else None)
    tokenizer = AutoTokenizer.from_pretrained(base, pad_token="</s>", padding_side="left")
    with_bos = tokenizer(["hi", "hi there the house"], return_tensors="pt", padding=True)
    bare = tokenizer("hi there", return_tensors="pt", add_special_tokens=False)
    ids = {name: value % 31 for name, value in with_bos.items()}
    out = model.generate(**ids, max_new_tokens=2, return_dict_in_generate=True)
    history = torch.cat([out.sequences, bare.input_ids.expand(2, -1) % 31], 1)
    model.generate(history, past_key_values=copy.deepcopy(out.past_key_values), max_new_tokens=2)
    # What goes on from a memory does not start a text.
    model.generate(bare.input_ids.expand(2, -1) % 31, past_key_values=out.past_key_values, max_new_tokens=2)
    padded, mask = torch.tensor([[1, 1, 5], [7, 5, 6]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    model.generate(padded, attention_mask=mask, past_key_values=out.past_key_values, max_new_tokens=2)
    assert "BOS" not in caplog.text
    model.generate(bare.input_ids % 31, max_new_tokens=2)
    assert ("does not start with the BOS token 1" in caplog.text) == adds_bos
    memory = model.generate(bare.input_ids % 31, max_new_tokens=30, return_dict_in_generate=True).past_key_values
    again = tokenizer("hi there", return_tensors="pt").input_ids % 31
    model.generate(again, past_key_values=memory, max_new_tokens=2)
    assert ("The new ids start with the BOS token 1, but they go on" in caplog.text) == adds_bos


def test_no_new_ids_get_a_sentence_where_the_base_has_bos(tmp_path):
    model = InfiniForCausalLM.from_pretrained(save_base(tmp_path, kind="replacing_spaces"), segment_length=N)
    memory = model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="no columns"):
        model.generate(IDS[:, :0], past_key_values=memory, max_new_tokens=2)


def test_texts_longer_than_the_base_was_trained_on_draw_no_warning(caplog):
    logging.enable_propagation()
    model = tiny_model(max_position_embeddings=17)
    own = MaxLengthCriteria(25, max_position_embeddings=17)
    model.generate(random_ids(1, 20), max_new_tokens=2)
    found = model.generate(random_ids(1, 20), max_new_tokens=9, stopping_criteria=StoppingCriteriaList([own]))
    assert (found.shape[1], own.max_position_embeddings) == (25, 17)
    assert "exceeded the model's predefined maximum length" not in caplog.text


@pytest.mark.parametrize("window", ["sliding", "segment"])
def test_a_window_beyond_the_positions_names_the_longest(tmp_path, window):
    base_model().save_pretrained(tmp_path)
    longest = 30 if window == "sliding" else 64
    with pytest.raises(ValueError, match=f"Choose a segment_length of at most {longest}"):
        InfiniForCausalLM.from_pretrained(tmp_path, segment_length=longest + 1, local_attention=window)
    InfiniForCausalLM.from_pretrained(tmp_path, segment_length=longest, local_attention=window)
    if window == "sliding":
        with pytest.raises(ValueError, match="Choose fewer slots and sinks"):
            InfiniForCausalLM.from_pretrained(tmp_path, segment_length=40, num_memory_slots=60)


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_leaves_nothing_broken(tmp_path, monkeypatch, error):
    base_model().save_pretrained(tmp_path / "base")
    convert_to_infini(tmp_path / "base", tmp_path / "ours", segment_length=N)
    convert_to_infini(tmp_path / "base", tmp_path / "other", segment_length=N, **OPTIONS)
    save_memory(tmp_path / "other", tmp_path / "memory")
    before = {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir() if file.is_file()}
    calls = []

    def save_file(weights, file, *args, **kwargs):
        calls.append(file)
        file.write_bytes(b"the start of it")
        if len(calls) > 1 or "ours" not in str(file):
            raise error

    for module in ("checkpoints", "in_place", "memory_weights"):
        monkeypatch.setattr(f"infini_transformers.conversion.{module}.save_file", save_file)
    for write in (
        lambda: apply_memory(tmp_path / "ours", tmp_path / "memory"),
        lambda: convert_to_infini(tmp_path / "base", tmp_path / "new", segment_length=N),
        lambda: save_memory(tmp_path / "other", tmp_path / "new"),
    ):
        with pytest.raises(OSError, match=r"The disk is full, and .* is as it was before\. Free"):
            write()
    assert {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir() if file.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "memory", "other", "ours"]
    assert json.loads(before["config.json"])["model_type"] == "infini"
