"""lm-evaluation-harness reads a checkpoint as the model itself does: whole documents, long prompts, padded batches."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infini_transformers import evaluation
from infini_transformers.evaluation.losses import token_losses
from modeling_infini import InfiniForCausalLM


lm_eval = pytest.importorskip(
    "lm_eval", reason='lm-evaluation-harness is not installed: pip install "lm-eval[hf,ruler]"'
)

N = 32
POSITIONS = 72
# What RULER's prompts are made of, so that they are some hundred tokens of a small tokenizer.
SENTENCES = [
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the",
    "number afterwards. What is the special magic number for mentioned in the provided text? One of the is",
    "Memorize and track the chain(s) of variable assignment hidden in the following text. VAR = Question: Answer:",
    "Find all variables that are assigned the value in the text above. According to the chain(s), they are:",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["<end>"])
    tokenizer.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    fields = {"vocab_size": len(tokenizer.get_vocab()), "segment_length": N, "max_position_embeddings": POSITIONS}
    local = {"local_attention": "sliding", "num_sink_tokens": 4, "eos_token_id": 0}
    tiny_model(**fields, **local).save_pretrained(folder)
    texts = [" ".join(SENTENCES[index:] * repeats) for index, repeats in enumerate((9, 4, 2))]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def evaluate(folder, monkeypatch):
    import nltk
    from lm_eval.tasks import TaskManager

    # RULER asks the network for what only its tasks with essays need.
    monkeypatch.setattr(nltk, "download", lambda resource: None)

    def evaluate(task, batch_size, max_length=None, **metadata):
        paths = [Path(evaluation.__file__).parent / "lm_eval_tasks", Path(lm_eval.__file__).parent / "tasks" / "ruler"]
        arguments = {"pretrained": str(folder), "trust_remote_code": True, "dtype": "float32"}
        if max_length is not None:
            arguments["max_length"] = max_length
        # As the command line does, where tasks size their prompts by the model's tokenizer.
        metadata = {**arguments, **metadata}
        return lm_eval.simple_evaluate(
            "hf",
            arguments,
            [task],
            batch_size=batch_size,
            device="cpu",
            limit=4,
            bootstrap_iters=0,
            metadata=metadata,
            task_manager=TaskManager(
                include_path=[str(path) for path in paths], include_defaults=False, metadata=metadata
            ),
        )

    return evaluate


@pytest.fixture
def model_and_tokenizer(folder):
    return InfiniForCausalLM.from_pretrained(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rolling_perplexity_is_that_of_the_streamed_document(evaluate, folder, model_and_tokenizer, batch_size):
    model, tokenizer = model_and_tokenizer
    found = evaluate("documents", batch_size, max_length=10_000, documents=str(folder / "documents.jsonl"))
    samples = found["samples"]["documents"]
    total = 0.0
    for sample in samples:
        # The harness puts the end-of-text token before a document, so that its first token is scored too.
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(sample["doc"]["text"])["input_ids"]]])
        loss = token_losses(model, ids, 40).sum().item()
        assert sample["resps"][0][0] == pytest.approx(-loss, rel=1e-5)
        total += loss
    assert max(len(tokenizer(sample["doc"]["text"])["input_ids"]) for sample in samples) > 10 * N
    size = sum(len(sample["doc"]["text"].encode()) for sample in samples)
    perplexity = found["results"]["documents"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(total / size), rel=1e-5)


def test_without_max_length_a_document_is_cut_at_the_positions_of_the_base_model(evaluate, folder):
    def log_likelihoods(max_length):
        found = evaluate("documents", 2, max_length, documents=str(folder / "documents.jsonl"))
        return [sample["resps"][0][0] for sample in found["samples"]["documents"]]

    cut = log_likelihoods(None)
    assert cut == log_likelihoods(POSITIONS)
    assert cut != log_likelihoods(10_000)


@pytest.mark.parametrize(
    ("task", "length", "new_tokens"),
    [pytest.param("niah_single_1", 700, 128, marks=pytest.mark.slow), ("ruler_vt", 900, 30)],
)
def test_generations_are_those_of_generate(evaluate, model_and_tokenizer, task, length, new_tokens):
    model, tokenizer = model_and_tokenizer
    samples = evaluate(task, 4, max_length=2048, max_seq_lengths=[length])["samples"][task]
    lengths, answers = set(), set()
    for sample in samples:
        prompt = tokenizer(sample["arguments"][0][0], return_tensors="pt").input_ids
        lengths.add(prompt.shape[1])
        generated = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False)
        answer = tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == answer
        answers.add(answer)
    # Rows of one batch, padded.
    assert len(lengths) > 1
    assert len(answers) == len(samples)
    assert min(lengths) > 4 * N > POSITIONS
