"""The memories of SmolLM2 in checkpoints/: on their base, they help to read and find what stands in a book."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from infini_transformers.conversion import convert_from_infini, convert_to_infini
from infini_transformers.conversion.base_fingerprint import base_fingerprint
from infini_transformers.conversion.checkpoints import Checkpoint
from infini_transformers.conversion.memory_weights import MemoryWeights
from infini_transformers.evaluation.loading import load_model, load_tokenizer
from infini_transformers.evaluation.losses import foreign_losses, memory_off, token_losses
from infini_transformers.evaluation.resources import king_james_bible, smollm2_file
from modeling_infini import InfiniCache


CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
MEMORY, RECALL = CHECKPOINTS / "smollm2-memory", CHECKPOINTS / "smollm2-recall"
PAGES = (RECALL / "README.md", CHECKPOINTS.parent / "docs" / "recall.md")
# By the rows of the tables.
TRIALS = {
    "needle (a sentence of the trained form), 8,192 tokens": "needle-8k",
    "passkey, the six trained wordings, 8,192 tokens": "trained-8k",
    "the six trained wordings, 32,768 tokens": "trained-32k",
    "the six trained wordings, 131,072 tokens": "trained-131k",
    "passkey, the eight held-out wordings, 8,192 tokens": "unseen-8k",
    "the eight held-out wordings, 32,768 tokens": "unseen-32k",
    "the eight held-out wordings, 131,072 tokens": "unseen-131k",
    "the eight as plain text, by `generate()`, 8,192 tokens": "plain-unseen-8k",
    "the paper's wording as plain text, 8,192 tokens": "plain-8k",
}
FILLERS = ("repeated sentence", "moby_dick")
TOKENS = 1536


@pytest.mark.slow
def test_the_memory_of_smollm2_helps_by_what_was_read(tmp_path):
    convert_to_infini(smollm2_file(), tmp_path / "infini", memory=MEMORY)
    model, tokenizer = load_model(tmp_path / "infini"), load_tokenizer(tmp_path / "infini")
    segment_length = model.config.segment_length
    text = king_james_bible()
    # The first books, and the middle of the whole.
    ids = [tokenizer(part[: 10 * TOKENS], return_tensors="pt").input_ids for part in (text, text[len(text) // 2 :])]
    documents = {name: part[:, :TOKENS] for name, part in zip("ab", ids)}
    own, foreign = foreign_losses(model, documents, {"a": "b", "b": "a"}, segment_length)
    with memory_off(model):
        off = {name: token_losses(model, document, TOKENS) for name, document in documents.items()}

    def mean(losses):
        return torch.cat([of[2 * segment_length :] for of in losses.values()]).mean().item()

    assert mean(own) < mean(off) - 0.005
    assert mean(own) < mean(foreign) - 0.005

    # The base is as it was.
    convert_from_infini(tmp_path / "infini", tmp_path / "base")
    assert base_fingerprint(Checkpoint(tmp_path / "base")) == base_fingerprint(Checkpoint(smollm2_file()))


@pytest.mark.slow
def test_what_is_stated_in_a_book_can_be_asked_for(tmp_path):
    convert_to_infini(smollm2_file(), tmp_path / "infini", memory=MEMORY)
    model, tokenizer = load_model(tmp_path / "infini"), load_tokenizer(tmp_path / "infini")
    text = king_james_bible()[:30_000]
    book = f"{text[:3000]} The ferry to the island has the number 48213. {text[3000:]}"
    question = "\nWhat is the number of the ferry? The ferry to the island has the number"
    ids = tokenizer(book, return_tensors="pt").input_ids[:, :4096]
    ids = torch.cat([ids, tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids], 1)

    def answer():
        return tokenizer.decode(model.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :])

    assert answer().startswith(" 48213")
    with memory_off(model, matrix=False):
        assert "48213" not in answer()


@pytest.mark.parametrize("folder", [MEMORY, RECALL / "memory"])
def test_the_memory_is_small_and_whole(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    config = MemoryWeights.load(folder).config
    assert config.layers_with_memory
    assert config.layers_with_slots


@pytest.mark.slow
def test_with_the_adapter_sentences_are_found(tmp_path):
    convert_to_infini(smollm2_file(), tmp_path / "infini", memory=RECALL / "memory")
    model, tokenizer = load_model(tmp_path / "infini"), load_tokenizer(tmp_path / "infini")
    model = PeftModel.from_pretrained(model, RECALL / "adapter").merge_and_unload()
    facts = {
        "The key to the cellar lies": " under the blue flowerpot",
        "My sister works as": " a dentist in Hamburg",
        "The captain of the ship was called": " Bernard Holt",
    }
    text = king_james_bible()[200_000:216_000]
    parts = [text[:2000], text[2000:3500], text[3500:5000], text[5000:]]
    book = parts[0] + "".join(f" {asked}{told}. {part}" for (asked, told), part in zip(facts.items(), parts[1:]))
    book = tokenizer(book, return_tensors="pt").input_ids

    def answers():
        memory = InfiniCache(model.config)
        with torch.no_grad():
            model(book, past_key_values=memory, logits_to_keep=1)
        for asked in facts:
            ids = tokenizer(f"\n\n{asked}", add_special_tokens=False, return_tensors="pt").input_ids
            written = model.generate(ids, past_key_values=copy.deepcopy(memory), max_new_tokens=8, do_sample=False)
            yield tokenizer.decode(written[0, ids.shape[1] :])

    assert all(answer.startswith(told) for answer, told in zip(answers(), facts.values()))
    with memory_off(model):
        assert not any(answer.startswith(told) for answer, told in zip(answers(), facts.values()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_figures_with_the_adapter_are_those_of_the_trials(page):
    rows = page.read_text(encoding="utf-8").splitlines()
    for label, file in TRIALS.items():
        folder = CHECKPOINTS.parent / "docs" / "recall" / "distilled" / "lora"
        heading, *trials = map(json.loads, (folder / f"{file}.jsonl").read_text().splitlines())
        # The longer ones are of the adapter before it was rounded, as both pages say.
        assert (heading["weights"] == "e7b9e0fe21b60a60") == file.endswith("8k")
        found = {name: [trial["exact"] for trial in trials if trial["filler"] == name] for name in FILLERS}
        expected = ", ".join(f"{sum(exact)} of {len(exact)}" for exact in found.values())
        assert any(row.startswith(f"| {label} | {expected} |") for row in rows), (label, expected)
