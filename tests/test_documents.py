"""Whole documents from files, and streams of them over steps."""

import copy
import json
import random
from itertools import chain

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from modeling_infini.training import (
    DocumentStreams,
    collate_documents,
    load_documents,
    load_held_out,
    tokenize_documents,
)


TEXTS = ["one two\n\nthree four", "five", "six seven eight"]


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<eos>", *" ".join(TEXTS).split()]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", model_max_length=2)


def write_text(folder):
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.txt").write_text(text)


def write_jsonl(folder):
    (folder / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))


def write_parquet(folder):
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "all.parquet")


@pytest.mark.parametrize("write", [write_text, write_jsonl, write_parquet])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_are_read_as_whole_documents(tmp_path, tokenizer, write, streaming):
    write(tmp_path)
    documents = load_documents(tmp_path, streaming=streaming)
    assert [row["text"] for row in documents] == TEXTS
    ids = [row["input_ids"] for row in tokenize_documents(documents, tokenizer)]
    assert [tokenizer.decode(document) for document in ids] == [" ".join([*text.split(), "<eos>"]) for text in TEXTS]
    windows = [row["input_ids"] for row in tokenize_documents(documents, tokenizer, window_length=2)]
    assert [len(window) for window in windows] == [2, 2, 1, 2, 2, 2]
    assert list(chain(*windows)) == list(chain(*ids))


def test_a_list_of_files_keeps_its_order(tmp_path):
    write_text(tmp_path)
    files = [tmp_path / "2.txt", tmp_path / "0.txt"]
    assert [row["text"] for row in load_documents(files)] == [TEXTS[2], TEXTS[0]]


def test_sources_that_cannot_be_read_are_named(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*missing\.txt"):
        load_documents(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError, match="No documents"):
        load_documents(tmp_path)
    write_text(tmp_path)
    write_jsonl(tmp_path)
    with pytest.raises(ValueError, match=r"The files are json, text\. Give files of one kind"):
        load_documents(tmp_path)
    with pytest.raises(ValueError, match="rows without a text"):
        tokenize_documents(datasets.Dataset.from_dict({"text": ["one", None]}), tokenizer)
    with pytest.raises(KeyError, match='no column "body" in the documents; there are text'):
        tokenize_documents(load_documents(tmp_path / "0.txt"), tokenizer, text_column="body")


def test_batches_of_documents_keep_the_last_token_as_a_target():
    batch = collate_documents([{"input_ids": [5, 6, 0]}, {"input_ids": [7]}])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 0], [7, -100, -100]]
    batch = collate_documents([{"input_ids": [5, 6, 0], "labels": [-100, 6, 0]}, {"input_ids": [7], "labels": [7]}])
    assert batch["labels"].tolist() == [[-100, 6, 0], [7, -100, -100]]
    padded = {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "position_ids": [0, 0, 1]}
    batch = collate_documents([padded, {**padded, "input_ids": [7, 8, 9]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 0, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100], [-100, -100, -100]]
    rows = list(DocumentStreams([[5, 6, 0]], 2, 2))
    batch = collate_documents(rows[:2])
    assert batch["shift_labels"].tolist() == [[6, 0], [-100, -100]]


documents_of_lengths = st.lists(st.integers(0, 17), min_size=1, max_size=7).filter(any)


def numbered(lengths: list[int]) -> list[dict]:
    """Documents whose tokens say which document and place they are from."""
    return [{"input_ids": [100 * index + place for place in range(length)]} for index, length in enumerate(lengths)]


def read_back(rows: list[dict], num_streams: int) -> list[list[int]]:
    """The documents in `rows`, put together again by stream from ids, masks and positions alone."""
    found: list[list[int]] = []
    for stream in range(num_streams):
        for row in rows[stream::num_streams]:
            for token, is_token, position in zip(*(row[n] for n in ("input_ids", "attention_mask", "position_ids"))):
                if not is_token:
                    continue
                if position == 0:
                    found.append([])
                assert position == len(found[-1])
                found[-1].append(int(token))
    return found


@given(documents_of_lengths, st.integers(1, 3), st.integers(1, 8), st.sampled_from([None, 0]), st.booleans())
def test_streams_hold_each_document_once_and_whole(lengths, num_streams, step_length, seed, is_iterable):
    documents = numbered(lengths)
    source = (document for document in documents) if is_iterable else documents
    streams = DocumentStreams(source, num_streams, step_length, None if is_iterable else seed)
    rows = list(streams)
    if not is_iterable:
        assert len(streams) == len(rows)
    expected = [document["input_ids"] for document in documents if document["input_ids"]]
    assert sorted(read_back(rows, num_streams)) == sorted(expected)


@given(documents_of_lengths, st.integers(1, 3), st.integers(1, 8))
def test_each_token_but_a_documents_first_is_a_target_once(lengths, num_streams, step_length):
    rows = list(DocumentStreams(numbered(lengths), num_streams, step_length))
    targets = []
    for row in rows:
        for token, target in zip(row["input_ids"], row["shift_labels"]):
            if target != -100:
                assert target == token + 1
                targets.append(int(target))
    assert sorted(targets) == sorted(t for document in numbered(lengths) for t in document["input_ids"][1:])
    # Who does not know shift_labels gets the same targets, but for those across steps.
    shifted = [torch.cat([row["labels"][1:], torch.tensor([-100])]) for row in rows]
    for row, labels in zip(rows, shifted):
        assert torch.equal(labels[:-1], row["shift_labels"][:-1])


@given(documents_of_lengths, st.integers(1, 3), st.integers(1, 8), st.integers(0, 9))
def test_labels_of_documents_are_those_of_their_rows(lengths, num_streams, step_length, seed):
    documents = numbered(lengths)
    draw = random.Random(seed)
    for document in documents:
        document["labels"] = [draw.choice([token + 1000, -100]) for token in document["input_ids"]]
    rows = list(DocumentStreams(documents, num_streams, step_length))
    plain = list(DocumentStreams(numbered(lengths), num_streams, step_length))
    labels = {
        token: label for document in documents for token, label in zip(document["input_ids"], document["labels"])
    }
    for row, expected in zip(rows, plain):
        for name in ("labels", "shift_labels"):
            assert row[name].tolist() == [labels.get(token, -100) for token in expected[name].tolist()]
        assert torch.equal(row["input_ids"], expected["input_ids"])


def test_masked_prompts_stay_masked_in_streams():
    row = next(iter(DocumentStreams([{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}], 1, 4)))
    assert row["labels"].tolist() == [-100, -100, 3, 4]
    assert row["shift_labels"].tolist() == [-100, 3, 4, -100]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"completion_mask": [0, 0, 1]}, "Nothing reads these columns of the documents: completion_mask"),
        ({"weight": 0.5}, "columns of the documents: weight"),
        ({"assistant_masks": torch.tensor([0, 1, 1])}, "columns of the documents: assistant_masks"),
        ({"token_type_ids": [0, 1, 1]}, "columns of the documents: token_type_ids"),
        ({"input_ids": [[1, 2, 3]]}, r"list of whole numbers; got torch\.int64 of shape \(1, 3\)"),
        ({"labels": [0.5, 1.5, 2.5]}, "labels of a document must be a list of whole numbers"),
    ],
)
def test_columns_that_nothing_reads_are_refused_by_name(column, message):
    document = {"input_ids": [1, 2, 3], **column}
    for read in (lambda: DocumentStreams([document], 1, 4), lambda: list(DocumentStreams(iter([document]), 1, 4))):
        with pytest.raises(ValueError, match=message):
            read()
    with pytest.raises(ValueError, match=message):
        collate_documents([{"input_ids": [4, 5]}, document])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"attention_mask": [1, 1, 0]}, "attention_mask of its own"),
        ({"position_ids": [0, 0, 1]}, "position_ids of its own"),
        ({"shift_labels": [2, 3, -100]}, "columns of the documents: shift_labels"),
        ({"labels": [1, 2]}, "3 tokens has 2 labels"),
    ],
)
def test_streams_refuse_what_they_cannot_lay_out(column, message):
    with pytest.raises(ValueError, match=message):
        DocumentStreams([{"input_ids": [1, 2, 3], **column}], 1, 4)


def test_columns_that_say_nothing_new_and_texts_are_no_matter(tokenizer):
    neutral = {
        "attention_mask": [1] * 3,
        "token_type_ids": [0] * 3,
        "position_ids": [0, 1, 2],
        "text": "a",
        "meta": {},
    }
    plain = {"input_ids": [1, 2, 3]}
    streams = [list(DocumentStreams([{**plain, **extra, "labels": None}], 1, 4)) for extra in ({}, neutral)]
    assert streams[0][0]["labels"].tolist() == streams[1][0]["labels"].tolist() == [-100, 2, 3, -100]
    (row,) = DocumentStreams([tokenizer("one two three four")], 1, 4)
    assert row["input_ids"].tolist() == tokenizer("one two three four")["input_ids"]
    batch = collate_documents([{**plain, **neutral}, tokenizer("one two")])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "position_ids"]


def test_batches_refuse_documents_whose_columns_do_not_fit():
    with pytest.raises(ValueError, match="input_ids 3, labels 2"):
        collate_documents([{"input_ids": [1, 2, 3], "labels": [1, 2]}])
    with pytest.raises(ValueError, match="some have shift_labels"):
        collate_documents([{"input_ids": [1], "shift_labels": [2]}, {"input_ids": [1]}])
    batch = collate_documents([{"input_ids": [7, 8]}, {"input_ids": [5, 6], "position_ids": [0, 0]}])
    assert batch["position_ids"].tolist() == [[0, 1], [0, 0]]


def test_documents_that_are_not_rows_of_ids_are_refused(tokenizer):
    with pytest.raises(ValueError, match="not a mapping of input_ids, "):
        DocumentStreams(tokenizer(["one", "two"]), 1, 4)
    with pytest.raises(ValueError, match="must be a list of whole numbers"):
        DocumentStreams(["one", "two"], 1, 4)
    with pytest.raises(ValueError, match=r"need input_ids; there are text\. Make them with tokenize_documents"):
        DocumentStreams([{"text": "one"}], 1, 4)


def test_documents_that_shuffle_themselves_are_told_of_the_epoch():
    documents = datasets.Dataset.from_list(numbered([1] * 40)).to_iterable_dataset().shuffle(seed=3, buffer_size=40)
    streams = DocumentStreams(documents, 1, 4)
    epochs = []
    for epoch in (0, 1, 0):
        streams.set_epoch(epoch)
        epochs.append([row["input_ids"].tolist() for row in streams])
    assert epochs[0] == epochs[2] != epochs[1]


def test_what_is_not_read_of_a_folder_is_named(tmp_path):
    write_text(tmp_path)
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / ".hidden").write_text("no matter")
    with pytest.warns(UserWarning, match=r"These files are not read: \S*notes\.md\.$"):
        assert len(load_documents(tmp_path)) == 3
    with pytest.raises(ValueError, match='there is no "validation"'):
        load_documents(tmp_path / "0.txt", split="validation")


def test_epochs_shuffle_documents_and_keep_their_number_of_steps():
    streams = DocumentStreams(numbered([9, 4, 7, 3, 8]), 2, 4, seed=1)
    epochs = []
    for epoch in (0, 1, 0):
        streams.set_epoch(epoch)
        epochs.append([row["input_ids"].tolist() for row in streams])
    assert epochs[0] == epochs[2] != epochs[1]
    assert len(epochs[0]) == len(epochs[1]) == len(streams)


def test_the_first_token_of_a_packed_document_is_no_target():
    batch = collate_documents(
        [
            {"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]},
            {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 2, 2]},
            {"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1], "labels": [5, 6, 7, 8]},
        ]
    )
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [5, 6, -100, 8], [5, 6, 7, 8]]


def test_streams_without_a_document_are_named():
    with pytest.warns(UserWarning, match="2 of 3 streams have no document"):
        DocumentStreams(numbered([5]), 3, 4)


def test_streams_are_known_by_their_tokens_and_order():
    def fingerprint(documents, num_streams=1, step_length=4, seed=None):
        return DocumentStreams(documents, num_streams, step_length, seed).fingerprint

    same = fingerprint(numbered([3, 5]))
    assert fingerprint([{**document, "labels": document["input_ids"]} for document in numbered([3, 5])]) == same
    others = [
        fingerprint(numbered([5, 3])),
        fingerprint([[0, 1, 2, 100], [101, 102, 103, 104]]),
        fingerprint(numbered([3, 5]), seed=0),
        fingerprint(numbered([3, 5]), step_length=3),
        fingerprint(numbered([3, 5]), num_streams=2),
    ]
    assert len({same, *others}) == 6
    assert fingerprint(iter(numbered([3, 5]))) is None


def test_files_of_a_folder_are_read_once_and_whatever_their_endings_case(tmp_path):
    (tmp_path / "A.TXT").write_bytes("\ufeffone".encode())
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "A-checkpoint.txt").write_text("hidden")
    assert load_documents(tmp_path)["text"] == ["one"]
    with pytest.raises(ValueError, match=r"named twice: \S*A\.TXT\."):
        load_documents([tmp_path, tmp_path / "A.TXT"])


def test_what_datasets_writes_about_files_is_no_document(tmp_path):
    write_jsonl(tmp_path)
    (tmp_path / "dataset_info.json").write_text('{"text": "about"}')
    with pytest.warns(UserWarning, match=r"not read: \S*dataset_info\.json"):
        assert len(load_documents(tmp_path)) == 3


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([["one", "two"]], {}, "one text in each row"),
        (["one"], {"window_length": 0}, "window_length=0 must be at least 1"),
        (["one"], {"num_proc": 2}, "num_proc=2 is for documents that are not streamed"),
    ],
)
def test_what_tokenize_documents_cannot_do_is_refused(tokenizer, texts, options, message):
    documents = datasets.Dataset.from_dict({"text": texts})
    documents = documents.to_iterable_dataset() if "num_proc" in options else documents
    with pytest.raises(ValueError, match=message):
        list(tokenize_documents(documents, tokenizer, **options))


@pytest.mark.parametrize("window_length", [None, 2])
@pytest.mark.parametrize("eos_token", ["<eos>", None])
def test_texts_without_tokens_are_left_out(tmp_path, tokenizer, eos_token, window_length):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = eos_token
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ["", *TEXTS, " ", ""]))
    with pytest.warns(UserWarning, match="3 of 6 documents have no tokens"):
        found = tokenize_documents(load_documents(tmp_path), tokenizer, window_length=window_length)
    streamed = tokenize_documents(load_documents(tmp_path, streaming=True), tokenizer, window_length=window_length)
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    expected = tokenize_documents(load_documents(tmp_path), tokenizer, window_length=window_length)
    assert list(found) == list(streamed) == list(expected)


def test_what_is_evaluated_on_is_no_split_that_is_trained_on(tmp_path, monkeypatch):
    write_text(tmp_path)
    assert [row["text"] for row in load_held_out([tmp_path / "2.txt"])] == [TEXTS[2]]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: asked.append((name, split)))
    load_documents("some/dataset")
    load_held_out("some/dataset")
    load_held_out(["some/dataset"])
    assert asked == [("some/dataset", "train"), *[("some/dataset", "validation")] * 2]
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_held_out("missing.txt")

    def cannot_reach(name, **options):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", cannot_reach)
    with pytest.raises(ConnectionError, match=r"There is no file or folder books .*Couldn't reach"):
        load_documents("books")


def test_streams_are_balanced():
    rows = list(DocumentStreams(numbered([8, 1, 1, 1, 1, 1, 1, 1, 1]), 2, 4))
    assert all(row["attention_mask"].all() for row in rows)
    assert len(rows) == 4


def test_streams_refuse_what_would_break_them():
    with pytest.raises(ValueError, match="num_streams=0"):
        DocumentStreams(numbered([3]), 0, 4)
    with pytest.raises(ValueError, match="hold no tokens"):
        DocumentStreams(numbered([0]), 1, 4)
    with pytest.raises(TypeError, match="set max_steps"):
        len(DocumentStreams(iter(numbered([3])), 1, 4))
    with pytest.raises(ValueError, match="seed=0 shuffles"):
        DocumentStreams(iter(numbered([3])), 1, 4, seed=0)
    with pytest.raises(ValueError, match="dataloader_num_workers=2"):
        list(DataLoader(DocumentStreams(numbered([3, 3]), 1, 4), num_workers=2))


def test_numbers_that_say_nothing_of_what_to_learn_are_named_in_a_warning(monkeypatch):
    said = []
    monkeypatch.setattr("modeling_infini.training.documents.logger.warning_once", said.append)
    document = {"input_ids": [1, 2, 3], "id": 7, "embedding": [0.1, 0.2], "special_tokens_mask": [1, 0, 0]}
    for read in (lambda: next(iter(DocumentStreams([document], 1, 3))), lambda: collate_documents([document])):
        said.clear()
        assert read()["input_ids"].flatten().tolist() == [1, 2, 3]
        assert set(said) == {"Nothing reads these columns of the documents: id, embedding."}


def test_what_each_token_predicts_is_enough():
    """Labels would be the ids, which `shift_labels` of a masked prompt contradict."""
    batch = collate_documents(
        [{"input_ids": [5, 6, 7], "shift_labels": [-100, 7, 8]}, {"input_ids": [], "shift_labels": []}]
    )
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100] * 3]
    assert batch["shift_labels"].tolist() == [[-100, 7, 8], [-100] * 3]


def test_numbers_for_a_loss_are_padded_with_nothing():
    rows = [{"input_ids": [5, 6, 7], "weights": [0, 1, 0]}, {"input_ids": [5, 6], "weights": [0.5, 0.0]}]
    batch = collate_documents(rows, loss_inputs=("weights", "others"))
    assert batch["weights"].tolist() == [[0.0, 1.0, 0.0], [0.5, 0.0, 0.0]]
    for column, message in (
        ([1], "input_ids 2, weights 1"),
        ([[1], [2]], r"must be a list of numbers; got .*\(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            collate_documents([{"input_ids": [5, 6], "weights": column}], loss_inputs=("weights",))
