"""Scores are those of greedy generation; tables, files and callbacks show these scores."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import MODES, tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from words import WORDS, random_text, save_word_tokenizer

from infini_transformers.evaluation.examples import Example, opening_ids
from infini_transformers.evaluation.haystacks import Filler, repeated_sentence
from infini_transformers.evaluation.loading import load_tokenizer
from infini_transformers.evaluation.passkey import passkey_text_example
from infini_transformers.evaluation.retrieval import (
    RetrievalCallback,
    Score,
    Setting,
    draw_example,
    main,
    markdown,
    plot,
    run_trials,
    score,
    score_text,
    weights_digest,
)
from infini_transformers.evaluation.wordings import HELD_OUT_WORDINGS, TRAINING_WORDINGS
from modeling_infini.training import InfiniTrainer, InfiniTrainingArguments


CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "passkey"


def random_example(length: int, answers: int, seed: int = 0) -> Example:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(WORDS), (length,), generator=generator)
    return Example(ids, torch.arange(length - answers, length), {})


def answered_by(model, example: Example) -> Example:
    """The same prompt, with what the model generates for its answer."""
    start = int(example.answer_positions[0])
    generated = model.generate(
        example.input_ids[None, :start], max_new_tokens=len(example.answer_positions), do_sample=False
    )
    return example._replace(input_ids=generated[0])


class TestScore:
    @pytest.mark.parametrize("chunk_length", [1, 4, 7, 100])
    @pytest.mark.parametrize("mode", MODES)
    def test_exact_is_what_greedy_generation_finds(self, mode, chunk_length):
        model = tiny_model(**mode)
        example = answered_by(model, random_example(23, 4))
        assert score(model, example, chunk_length).exact
        for place in range(4):
            wrong = example.input_ids.clone()
            wrong[19 + place] = (wrong[19 + place] + 1) % len(WORDS)
            found = score(model, example._replace(input_ids=wrong), chunk_length)
            assert not found.exact
            assert found.token_accuracy < 1
            assert found.found[place] == example.input_ids[19 + place]

    def test_answers_anywhere_are_those_of_one_forward(self):
        model, example = tiny_model(), random_example(31, 1)
        positions = torch.tensor([1, 5, 6, 17, 30])
        with torch.no_grad():
            expected = model(example.input_ids[None], use_cache=False).logits[0, positions - 1].argmax(-1)
        ids = example.input_ids.clone()
        ids[30] = expected[-1]
        found = score(model, Example(ids, positions, {}), chunk_length=6)
        assert torch.equal(found.found, expected)
        assert found.token_accuracy == (expected == ids[positions]).double().mean().item() > 0

    def test_of_a_model_with_full_attention(self):
        config = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        model.generation_config.eos_token_id = None
        assert score(model, answered_by(model, random_example(20, 3)), chunk_length=8).exact

    def test_progress_is_of_all_tokens_that_are_read(self):
        read = []
        score(tiny_model(), random_example(20, 2), 8, read.append)
        assert read == [8, 8, 3]


class TestScoreOfText:
    """Of what `generate()` writes after the prompt."""

    def written(self, folder, text):
        """A score where the model writes `text`."""
        tokenizer = load_tokenizer(folder)
        answer, written = (tokenizer(words).input_ids for words in ("w1 w2", text))
        example = Example(torch.tensor([5, 6, 7, *answer]), torch.tensor([3, 4]), {"answer": "w1 w2"})
        model, lengths = tiny_model(), []

        def generate(prompt, max_new_tokens, **_):
            lengths.append(max_new_tokens)
            return torch.cat([prompt, torch.tensor([written])], 1)

        model.generate = generate
        scored = score_text(model, tokenizer, example)
        assert lengths == [4]
        return scored

    def test_what_follows_has_to_start_with_the_answer(self, folder):
        assert self.written(folder, "w1 w2").exact
        assert self.written(folder, "w1 w2 w9").exact
        assert not self.written(folder, "w9 w1 w2").exact
        assert not self.written(folder, "w1").exact

    def test_characters_are_counted(self, folder):
        assert self.written(folder, "w1 w3").token_accuracy == 4 / 5
        assert self.written(folder, "w1").token_accuracy == 2 / 5

    @pytest.mark.parametrize("chunk_length", [4, 100])
    def test_it_is_greedy_generation_from_the_prompt(self, folder, chunk_length):
        model, tokenizer = tiny_model(), load_tokenizer(folder)
        example, read = random_example(23, 2), []
        expected = model.generate(example.input_ids[None, :21], max_new_tokens=4, do_sample=False)[0, 21:]
        example.facts["answer"] = tokenizer.decode(expected[:2])
        scored = score_text(model, tokenizer, example, chunk_length, read.append)
        assert torch.equal(scored.found, expected)
        assert scored.exact
        assert read == [22]


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    # What the prompts are made of are unknown words, so that any of the answer is.
    save_word_tokenizer(tmp_path / "model")
    (tmp_path / "book.txt").write_text(random_text(200))
    return tmp_path / "model"


class TestTrials:
    def test_a_trial_is_the_same_whatever_was_drawn_before(self, folder):
        tokenizer, filler = load_tokenizer(folder), Filler("words", torch.arange(len(WORDS)))
        settings = [Setting("passkey", "words", 80, depth, 4) for depth in (0, 3)]
        first, second = (draw_example(tokenizer, filler, setting, 1, seed=5) for setting in settings)
        again = draw_example(tokenizer, filler, settings[1], 1, seed=5)
        assert torch.equal(second.input_ids, again.input_ids)
        assert 0 <= first.facts["depth"] < 0.25
        assert 0.75 <= second.facts["depth"] < 1
        other = draw_example(tokenizer, filler, settings[1], 1, seed=6)
        assert other.facts != second.facts

    def test_rows_hold_what_was_found(self, folder):
        model, tokenizer = tiny_model(), load_tokenizer(folder)
        fillers = {"words": Filler("words", torch.arange(len(WORDS)))}
        setting = Setting("variable_tracking", "words", 130, 0, 1)
        (row,) = run_trials(model, tokenizer, fillers, [(setting, 3)], seed=2)
        example = draw_example(tokenizer, fillers["words"], setting, 3, 2)
        expected = score(model, example)
        assert row["token_accuracy"] == expected.token_accuracy
        assert row["exact"] == expected.exact
        assert row["found"] == tokenizer.decode(expected.found)
        assert (row["length"], row["trial"], row["seed"]) == (130, 3, 2)
        assert row["answer"] == example.facts["answer"]


def row(task="passkey", filler="words", length=64, depth=0, exact=True, share=1.0):
    return {
        **Setting(task, filler, length, depth, 2)._asdict(),
        "exact": exact,
        "token_accuracy": share,
    }


class TestReport:
    ROWS = [
        row(depth=0),
        row(depth=0),
        row(depth=1),
        row(depth=1, exact=False, share=0.6),
        row(length=128, exact=False, share=0.2),
        row("mqar", exact=False, share=0.5),
    ]

    def test_table(self):
        lines = markdown(self.ROWS).splitlines()
        assert lines[2:] == [
            "| mqar | words | 64 | 1 | 0 (0%) | 50.0% |  |",
            "| passkey | words | 64 | 4 | 3 (75%) | 90.0% | 50% to 100%: 1 of 2 |",
            "| passkey | words | 128 | 1 | 0 (0%) | 20.0% | 0% to 50%: 0 of 1 |",
        ]

    def test_heatmap(self, tmp_path, monkeypatch):
        figure_module = pytest.importorskip("matplotlib.figure")
        drawn = []
        monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
        plot(self.ROWS, tmp_path / "map.png")
        images = {
            axes.get_title(): axes.images[0].get_array().filled(-1) for axes in drawn[0].axes if axes.get_title()
        }
        shares = images["passkey: exact answers, filler: words"]
        assert np.array_equal(shares, [[1.0, 0.0], [0.5, -1.0]])


class TestCallback:
    @pytest.mark.parametrize("kind", [(Trainer, TrainingArguments), (InfiniTrainer, InfiniTrainingArguments)])
    def test_metrics_of_an_evaluation(self, kind, tmp_path):
        trainer_class, arguments_class = kind
        model = tiny_model()
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(20).view(2, 10)]
        arguments = arguments_class(str(tmp_path), report_to="none", use_cpu=True)
        trainer = trainer_class(model, arguments, eval_dataset=rows)
        examples = [answered_by(model.eval(), random_example(23, 4)), random_example(23, 4, seed=1)]
        expected = [score(model, example) for example in examples]
        trainer.add_callback(RetrievalCallback(trainer, "recall", examples, chunk_length=6))
        model.train()
        metrics = trainer.evaluate()
        assert metrics["eval_recall_exact"] == 0.5 == np.mean([found.exact for found in expected])
        assert metrics["eval_recall_token_accuracy"] == np.mean([found.token_accuracy for found in expected])
        logged = trainer.state.log_history[-1]
        assert logged["eval_recall_exact"] == 0.5


class TestCommandLine:
    def run(self, folder, *options):
        book = folder.parent / "book.txt"
        main([str(option) for option in (folder, "--fillers", book, "--depths", 2, "--trials", 1, *options)])

    def test_goes_on_where_it_stopped(self, folder, capsys):
        pytest.importorskip("matplotlib")
        output = folder.parent / "found" / "passkey"
        self.run(folder, "--lengths", 80, "--output", output)
        lines = output.with_suffix(".jsonl").read_text().splitlines()
        assert json.loads(lines[0]).items() >= {"weights": weights_digest(tiny_model()), "memory": "on"}.items()
        assert len(lines) == 3
        first_table = capsys.readouterr().out
        assert "| passkey | book | 80 | 2 |" in first_table
        assert output.with_suffix(".png").stat().st_size > 1000

        self.run(folder, "--lengths", 80, 90, "--output", output)
        more = output.with_suffix(".jsonl").read_text().splitlines()
        assert more[:3] == lines
        assert [json.loads(line)["length"] for line in more[3:]] == [90, 90]
        assert "| passkey | book | 90 | 2 |" in capsys.readouterr().out

    def test_trials_of_another_model_are_not_mixed_in(self, folder):
        pytest.importorskip("matplotlib")
        output = folder.parent / "passkey"
        self.run(folder, "--lengths", 80, "--output", output)
        before = output.with_suffix(".jsonl").read_text()
        with pytest.raises(ValueError, match="name another --output"):
            self.run(folder, "--lengths", 80, "--output", output, "--memory-off")
        tiny_model(seed=1).save_pretrained(folder)
        with pytest.raises(ValueError, match="name another --output"):
            self.run(folder, "--lengths", 80, "--output", output)
        # The same weights with another window.
        tiny_model(segment_length=7).save_pretrained(folder)
        with pytest.raises(ValueError, match="name another --output"):
            self.run(folder, "--lengths", 80, "--output", output)
        assert output.with_suffix(".jsonl").read_text() == before

    def test_trials_of_another_text_of_the_same_name_are_not_mixed_in(self, folder, capsys):
        pytest.importorskip("matplotlib")
        output, book = folder.parent / "passkey", folder.parent / "book.txt"
        self.run(folder, "--lengths", 80, "--output", output)
        book.write_text(book.read_text() + " one more")
        with pytest.raises(ValueError, match="trials of another text book"):
            self.run(folder, "--lengths", 90, "--output", output)
        (folder.parent / "other").mkdir()
        shutil.copy(book, folder.parent / "other" / "book.txt")
        with pytest.raises(SystemExit):
            main([str(folder), "--fillers", str(book), str(folder.parent / "other" / "book.txt")])
        assert "must differ" in capsys.readouterr().err

    def test_a_file_of_an_earlier_version_is_continued(self, folder):
        pytest.importorskip("matplotlib")
        output = folder.parent / "passkey"
        self.run(folder, "--lengths", 80, "--output", output)
        first, *rows = map(json.loads, output.with_suffix(".jsonl").read_text().splitlines())
        del first["config"]
        for row in rows:
            del row["filler_digest"]
        output.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in (first, *rows)))
        self.run(folder, "--lengths", 80, 90, "--output", output)
        assert len(output.with_suffix(".jsonl").read_text().splitlines()) == 5

    def test_a_line_that_was_cut_is_one_more_trial(self, folder):
        pytest.importorskip("matplotlib")
        output = folder.parent / "passkey"
        self.run(folder, "--lengths", 80, "--output", output)
        whole = output.with_suffix(".jsonl").read_text()
        for cut in (whole[:-30], whole[:20], ""):
            output.with_suffix(".jsonl").write_text(cut)
            self.run(folder, "--lengths", 80, "--output", output)
            assert output.with_suffix(".jsonl").read_text() == whole

    def test_what_cannot_be_tried_is_refused_before_the_rest(self, folder, capsys):
        pytest.importorskip("matplotlib")
        with pytest.raises(ValueError, match="are too few"):
            self.run(folder, "--lengths", 80, 3, "--output", folder.parent / "passkey")
        assert not (folder.parent / "passkey.jsonl").exists()
        with pytest.raises(SystemExit):
            self.run(folder, "--lengths", 80, "--memory-off", "slots")
        assert "has no slots" in capsys.readouterr().err

    @pytest.mark.parametrize("task", ["needle", "needles", "numbers", "passkey_decoys", "variable_tracking"])
    def test_other_tasks(self, task, folder, capsys):
        self.run(folder, "--task", task, "--lengths", 250)
        assert f"| {task} | book | 250 | 2 |" in capsys.readouterr().out

    def test_a_part_of_the_memory_off(self, folder, monkeypatch):
        pytest.importorskip("matplotlib")
        model = tiny_model(local_attention="sliding", num_memory_slots=4)
        model.save_pretrained(folder)
        output, seen = folder.parent / "passkey", []
        monkeypatch.setattr(
            "infini_transformers.evaluation.retrieval.score",
            lambda model, *_: (
                seen.append((bool(model.local_shares().eq(1).all()), model.config.num_memory_slots == 0))
                or Score(1.0, True, torch.tensor([0]))
            ),
        )
        for part, state in ((), "on"), (("matrix",), "matrix off"), (("slots",), "slots off"), (("all",), "off"):
            off = ("--memory-off", *part) if part else ()
            self.run(folder, "--lengths", 80, "--output", f"{output}{state}", *off)
            first = json.loads(Path(f"{output}{state}.jsonl").read_text().splitlines()[0])
            assert first.items() >= {"weights": weights_digest(model), "memory": state}.items()
        assert seen[::2] == [(False, False), (True, False), (False, True), (True, True)]

    def test_an_unknown_filler_is_refused(self, folder):
        with pytest.raises(FileNotFoundError, match='neither "sentence" nor "bible" nor a text file'):
            main([str(folder), "--fillers", "nothing.txt"])


def test_what_a_tokenizer_puts_after_a_text_is_not_put_before_it(tmp_path):
    save_word_tokenizer(tmp_path, bos_token="w1", eos_token="w2")
    tokenizer = load_tokenizer(tmp_path)
    assert opening_ids(tokenizer).tolist() == []
    for template, opening in (("w1 $A w2", [1]), ("$A w2", []), ("w1 $A", [1])):
        tokenizer._tokenizer.post_processor = TemplateProcessing(template, special_tokens=[("w1", 1), ("w2", 2)])
        assert opening_ids(tokenizer).tolist() == opening
    tokenizer._tokenizer.post_processor = TemplateProcessing("w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)])
    filler = Filler("words", torch.arange(3, 20))
    example = passkey_text_example(tokenizer, filler, 80, 0.5, np.random.default_rng(0))
    prompt = example.input_ids[: example.answer_positions[0]].tolist()
    assert prompt[0] == 1
    assert 2 not in prompt


@pytest.mark.parametrize("task", ["passkey_text", "passkey_text_grammar", "passkey_text_unseen"])
def test_texts_are_written_after_and_not_filled_in(task, folder, monkeypatch):
    tokenizer = load_tokenizer(CHECKPOINT)
    fillers = {"sentence": repeated_sentence(tokenizer)}
    prompts = []

    def generate(prompt, **_):
        prompts.append(tokenizer.decode(prompt[0]))
        return torch.cat([prompt, torch.tensor([tokenizer(" 12345").input_ids])], 1)

    model = tiny_model()
    model.generate = generate
    wanted = [(Setting(task, "sentence", 400, 0, 1), trial) for trial in range(3)]
    rows = list(run_trials(model, tokenizer, fillers, wanted))
    assert len(prompts) == len(rows) == 3
    for row, prompt in zip(rows, prompts):
        assert row["answer"] in prompt
        assert not prompt.rstrip().endswith(row["answer"])
        assert row["found"] == " 12345"
        assert not row["exact"]


@pytest.mark.parametrize(
    ("task", "wordings"),
    [("passkey_trained_wordings", TRAINING_WORDINGS), ("passkey_unseen_wordings", HELD_OUT_WORDINGS)],
)
def test_reworded_passkeys_are_asked_for_in_all_of_their_wordings(task, wordings):
    tokenizer = load_tokenizer(CHECKPOINT)
    filler = repeated_sentence(tokenizer)
    setting = Setting(task, filler.name, 400, 0, 1)
    texts = [
        str(tokenizer.decode(draw_example(tokenizer, filler, setting, trial, 0).input_ids)) for trial in range(40)
    ]
    asked = {next(wording for wording in wordings if wording.question in text) for text in texts}
    assert asked == set(wordings)
