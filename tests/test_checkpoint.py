"""The published checkpoint: a folder as on the Hub, whose model finds a passkey, by its memory alone."""

from pathlib import Path

import numpy as np
import pytest

import modeling_infini
from evaluation.haystacks import repeated_sentence
from evaluation.loading import load_model, load_tokenizer
from evaluation.losses import memory_off
from evaluation.passkey import passkey_example
from evaluation.retrieval import score


FOLDER = Path(__file__).parent.parent / "checkpoints" / "passkey"


def test_code_beside_the_weights_is_that_of_the_package():
    package = Path(modeling_infini.__file__).parent
    files = list(FOLDER.glob("*.py"))
    assert files
    outdated = [file.name for file in files if file.read_bytes() != (package / file.name).read_bytes()]
    assert not outdated, "run `make checkpoint-code`"


def test_folder_is_small_and_has_a_card():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 20e6
    assert "1,048,576" in (FOLDER / "README.md").read_text(encoding="utf-8")


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
