"""Pipelines, streamers and generation settings: what they give is what `generate()` gives."""

import asyncio
import copy
import json
import sys
from threading import Thread

import pytest
import torch
from test_publishing import run
from tiny import MODES, tiny_model
from transformers import (
    AsyncTextIteratorStreamer,
    AutoTokenizer,
    GenerationConfig,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from words import random_text, save_word_tokenizer

from infini_transformers.conversion import convert_to_infini
from infini_transformers.evaluation.resources import smollm2_file
from modeling_infini import InfiniCache, InfiniForCausalLM


# Several segments of 5 tokens, less than one, and two and a half.
TEXTS = [random_text(23, seed=1), random_text(4, seed=2), random_text(13, seed=3)]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ {'user': 'w27 ', 'assistant': 'w28 '}[message.role] }}{{ message.content }} w29 "
    "{% endfor %}{% if add_generation_prompt %}w28{% endif %}"
)
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module", params=MODES, ids=["segment", "sliding", "sinks"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_word_tokenizer(folder, eos_token="w30", pad_token="w0")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny_model(eos_token_id=30, pad_token_id=0, **request.param).save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return InfiniForCausalLM.from_pretrained(folder)


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def new_ids(model, ids) -> list[int]:
    return model.generate(ids, **GREEDY)[0, ids.shape[1] :].tolist()


def new_text(model, tokenizer, text: str) -> str:
    ids = tokenizer(text, return_tensors="pt").input_ids
    return tokenizer.decode(new_ids(model, ids), skip_special_tokens=True)


@pytest.mark.parametrize(("batch_size", "side"), [(1, "left"), (3, "left"), (3, "right")])
def test_a_pipeline_gives_what_each_text_gives_alone(folder, model, tokenizer, batch_size, side):
    generator = pipeline("text-generation", model=str(folder), trust_remote_code=True, batch_size=batch_size)
    generator.tokenizer.padding_side = side
    found = generator(TEXTS, return_full_text=False, **GREEDY)
    expected = [new_text(model, tokenizer, text) for text in TEXTS]
    assert len(set(expected)) == 3
    assert [row[0]["generated_text"] for row in found] == expected


def test_without_a_padding_token_a_pipeline_goes_row_by_row(model, tokenizer):
    tokenizer.pad_token = None
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = generator(TEXTS, return_full_text=False, **GREEDY)
    assert [row[0]["generated_text"] for row in found] == [new_text(model, tokenizer, text) for text in TEXTS]
    with pytest.raises(ValueError, match="without pad_token"):
        generator(TEXTS, batch_size=3, **GREEDY)


def test_a_pipeline_speaks_by_the_chat_template(model, tokenizer):
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": TEXTS[0]}]
    for question in (None, TEXTS[2]):
        if question is not None:
            chat = [*chat, {"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt").input_ids
        expected = tokenizer.decode(new_ids(model, ids), skip_special_tokens=True)
        assert ids[0, -1] == 28
        chat = generator(chat, **GREEDY)[0]["generated_text"]
        assert chat[-1] == {"role": "assistant", "content": expected}


def test_a_pipeline_goes_on_from_a_memory(model, tokenizer):
    read = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    memory = InfiniCache(model.config)
    with torch.no_grad():
        model(read, past_key_values=memory)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (said,) = pipe(TEXTS[1], past_key_values=copy.deepcopy(memory), return_full_text=False, **GREEDY)
    assert said["generated_text"] == new_text(model, tokenizer, f"{TEXTS[0]} {TEXTS[1]}")
    (after,) = pipe([{"role": "user", "content": TEXTS[1]}], past_key_values=memory, **GREEDY)
    assert after["generated_text"][-1]["role"] == "assistant"
    assert memory.get_seq_length() > read.shape[1]


def test_the_settings_of_a_checkpoint_are_those_of_a_pipeline(model, tokenizer):
    model.generation_config.update(max_new_tokens=7, do_sample=False, repetition_penalty=4.0)
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    expected = model.generate(ids)[0].tolist()
    assert expected != model.generate(ids, repetition_penalty=1.0)[0].tolist()
    found = pipeline("text-generation", model=model, tokenizer=tokenizer)(TEXTS[0], return_tensors=True)
    assert found[0]["generated_token_ids"] == expected


def test_a_streamer_prints_what_is_generated(model, tokenizer, capsys):
    expected = new_text(model, tokenizer, TEXTS[0])
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    capsys.readouterr()
    generator(TEXTS[0], streamer=streamer, **GREEDY)
    assert capsys.readouterr().out.split() == expected.split()


def started(model, tokenizer, streamer) -> Thread:
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    thread = Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    return thread


def test_an_iterator_streams_piece_by_piece(model, tokenizer):
    expected = new_text(model, tokenizer, TEXTS[0])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = started(model, tokenizer, streamer)
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).split() == expected.split()
    assert len([piece for piece in pieces if piece]) >= len(expected.split()) - 1 > 2


def test_an_asynchronous_iterator_streams_piece_by_piece(model, tokenizer):
    async def pieces():
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
        thread = started(model, tokenizer, streamer)
        found = [piece async for piece in streamer]
        thread.join()
        return found

    expected, found = new_text(model, tokenizer, TEXTS[0]), asyncio.run(pieces())
    assert "".join(found).split() == expected.split()
    assert len([piece for piece in found if piece]) > 2


SETTINGS = {"do_sample": True, "temperature": 0.6, "top_k": 9, "top_p": 0.8, "max_new_tokens": 11}

ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, GenerationConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "modeling_infini" not in sys.modules
torch.manual_seed(3)
found = model.generate(torch.tensor(json.loads(sys.argv[2])))
model.save_pretrained("again")
print(json.dumps([GenerationConfig.from_pretrained("again").to_dict(), found.tolist()]))
"""


def test_sampling_settings_survive_without_this_package(tmp_path):
    model, ids = tiny_model(), torch.arange(2 * 13).view(2, 13)
    model.generation_config = GenerationConfig(**SETTINGS)
    model.save_pretrained(tmp_path / "saved")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "saved"), json.dumps(ids.tolist())]
    settings, found = json.loads(run(tmp_path / "elsewhere", command))
    assert settings.items() >= SETTINGS.items()
    torch.manual_seed(3)
    assert found == model.generate(ids).tolist()
    torch.manual_seed(3)
    assert found != model.generate(ids, temperature=3.0, top_k=0, top_p=1.0).tolist()


@pytest.mark.slow
def test_a_converted_chat_model_answers_in_a_pipeline(tmp_path):
    convert_to_infini(smollm2_file(), tmp_path / "converted", segment_length=64)
    generator = pipeline("text-generation", model=str(tmp_path / "converted"), trust_remote_code=True)
    # Four segments of filler, so that the answer is generated with a memory.
    filler = "The grass is green and the sky is blue. " * 25
    chat = [{"role": "user", "content": f"{filler}What is the capital of France?"}]
    tokenizer, model = generator.tokenizer, generator.model
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt").input_ids
    assert ids.shape[1] > 4 * model.config.segment_length
    expected = tokenizer.decode(new_ids(model, ids), skip_special_tokens=True)
    answer = generator(chat, **GREEDY)[0]["generated_text"][-1]
    assert answer == {"role": "assistant", "content": expected}
    assert "Paris" in answer["content"]
