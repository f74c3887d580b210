"""The published checkpoint: a folder as on the Hub, whose model finds a passkey, by its memory alone."""

import json
from pathlib import Path

import numpy as np
import pytest

import modeling_infini
from evaluation.haystacks import repeated_sentence
from evaluation.loading import load_model, load_tokenizer
from evaluation.losses import memory_off
from evaluation.passkey import passkey_example
from evaluation.retrieval import score, weights_digest


REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "checkpoints" / "passkey"
TRIALS = REPOSITORY / "docs" / "recall" / "fifth_phase"


def test_code_beside_the_weights_is_that_of_the_package():
    package = Path(modeling_infini.__file__).parent
    files = list(FOLDER.glob("*.py"))
    assert files
    outdated = [file.name for file in files if file.read_bytes() != (package / file.name).read_bytes()]
    assert not outdated, "run `make checkpoint-code`"


def test_folder_is_small_and_has_a_card():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 20e6
    assert "1,048,576" in (FOLDER / "README.md").read_text(encoding="utf-8")


def right_of(*files: str, filler: str, length: int) -> str:
    """`49 of 50`: trials of one filler and length that were answered exactly."""
    rows = [json.loads(line) for file in files for line in (TRIALS.parent / file).read_text().splitlines()[1:]]
    exact = [row["exact"] for row in rows if (row["filler"], row["length"]) == (filler, length)]
    return f"{sum(exact)} of {len(exact)}"


def test_reported_trials_are_of_these_weights():
    digest = weights_digest(load_model(FOLDER))
    firsts = {file.stem: json.loads(file.read_text().splitlines()[0]) for file in TRIALS.glob("*.jsonl")}
    assert firsts
    assert {first["weights"] for first in firsts.values()} == {digest}
    assert [name for name, first in firsts.items() if first["memory"] == "off"] == ["seed0-memory-off"]


def test_reported_figures_are_those_of_the_trials():
    readme, card = ((folder / "README.md").read_text(encoding="utf-8") for folder in (REPOSITORY, FOLDER))
    report = (REPOSITORY / "docs" / "recall.md").read_text(encoding="utf-8")
    ours = "fifth_phase/seed0-"
    near = [f"{ours}131k.jsonl", "third_phase/seed1-131k.jsonl", "third_phase/seed2-131k.jsonl"]
    cards = []
    fillers = {"repeated sentence": "the paper's repeated sentence", "moby_dick": "a held-out novel, *Moby Dick*"}
    for filler, of_readme in fillers.items():
        far = [str(file.relative_to(TRIALS.parent)) for file in TRIALS.glob("seed0-1m-*.jsonl")]
        at_a_million = right_of(*far, filler=filler, length=1_048_576)
        all_seeds = right_of(*near, filler=filler, length=131_072)
        checkpoint = right_of(near[0], filler=filler, length=131_072)
        assert f"| {of_readme} | {all_seeds} | {at_a_million} |" in readme
        name = "*Moby Dick*" if filler == "moby_dick" else filler
        assert f"| 0 (the checkpoint) | {name} | {checkpoint} | **{at_a_million}** |" in report
        cards.append((checkpoint, at_a_million))
    (sentence, far_sentence), (novel, far_novel) = cards
    assert f"{sentence} at 131,072 tokens with the repeated sentence" in card
    assert f"{novel} with the held-out novel" in card
    assert f"at 1,048,576 tokens {far_sentence} and {far_novel}" in card


@pytest.mark.parametrize("length", [4096, 16384])
def test_finds_a_passkey_by_its_memory_alone(length):
    model, tokenizer = load_model(FOLDER), load_tokenizer(FOLDER)
    filler = repeated_sentence(tokenizer)
    depths = (0.0, 0.5, 0.9)
    examples = [
        passkey_example(tokenizer, filler, length, depth, np.random.default_rng(seed))
        for seed, depth in enumerate(depths)
    ]
    assert all(score(model, example).exact for example in examples)
    with memory_off(model):
        assert not any(score(model, example).exact for example in examples)
