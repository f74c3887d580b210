"""
Whole documents as training data: from text files, JSON lines, Parquet or a dataset of the Hub, and as streams that
go on from step to step. Needs the package `datasets`.
"""

import os
import random
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset, get_worker_info


if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


# The builder of `datasets` that reads files of each ending.
BUILDERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}


def load_documents(
    source: str | os.PathLike | Sequence[str | os.PathLike], *, split: str = "train", streaming: bool = False
) -> "datasets.Dataset | datasets.IterableDataset":
    """
    One document per row, in its column "text" unless the source names it otherwise.

    Args:
        source: files, or a folder of files, of one kind: `.txt` (a document each), `.json` and `.jsonl`,
            `.parquet`; or the id of a dataset of the Hub.
        split: of a dataset of the Hub; files are one split, "train".
        streaming: read as training goes, without a copy on disk.

    Raises:
        FileNotFoundError: if `source` is neither files, nor a folder with some, nor looks like an id of the Hub.
        ValueError: if the files are of several kinds, or of one that is not read.
    """
    import datasets

    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    files: list[Path] = []
    for path in map(Path, sources):
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix in BUILDERS)
        elif path.is_file():
            files.append(path)
        elif len(sources) > 1 or path.suffix in BUILDERS or path.is_absolute():
            raise FileNotFoundError(f"There is no file or folder {path}.")
    if not files:
        if len(sources) > 1 or Path(sources[0]).is_dir():
            raise FileNotFoundError(f"No documents ({', '.join(BUILDERS)}) in {', '.join(map(str, sources))}.")
        return datasets.load_dataset(str(sources[0]), split=split, streaming=streaming)

    kinds = {BUILDERS.get(file.suffix, file.suffix) for file in files}
    if len(kinds) > 1 or not kinds <= set(BUILDERS.values()):
        raise ValueError(
            f"The files are {', '.join(sorted(kinds))}. Give files of one kind, of {', '.join(BUILDERS)}."
        )
    (builder,) = kinds
    options = {"sample_by": "document"} if builder == "text" else {}
    names = [str(file) for file in files]
    return datasets.load_dataset(builder, data_files=names, split="train", streaming=streaming, **options)


def tokenize_documents(
    documents: "datasets.Dataset | datasets.IterableDataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text_column: str = "text",
    window_length: int | None = None,
    num_proc: int | None = None,
) -> "datasets.Dataset | datasets.IterableDataset":
    """
    The token ids of each document, whole, ended by the tokenizer's EOS token if it has one.

    Args:
        window_length: chop documents into windows of this many tokens, for comparison with models that need it;
            `None`: keep them whole.
        num_proc: processes to work with, if not streaming.

    Raises:
        KeyError: if there is no column `text_column`; the message names those that there are.
        ValueError: if a row has no text.
    """
    columns = documents.column_names
    if columns is None:
        columns = list(next(iter(documents)))
    if text_column not in columns:
        raise KeyError(f'There is no column "{text_column}" in the documents; there are {", ".join(columns)}.')

    def tokenize(batch: dict) -> dict:
        if None in batch[text_column]:
            raise ValueError(f'The column "{text_column}" has rows without a text. Leave them out by `filter`.')
        # A text longer than the tokenizer's model_max_length is what this model is for.
        ids = tokenizer(batch[text_column], verbose=False)["input_ids"]
        eos = tokenizer.eos_token_id
        ids = [[*document, eos] if eos is not None and document[-1:] != [eos] else document for document in ids]
        if window_length is not None:
            ids = [
                document[start : start + window_length]
                for document in ids
                for start in range(0, len(document), window_length)
            ]
        return {"input_ids": ids}

    options = {} if num_proc is None else {"num_proc": num_proc}
    return documents.map(tokenize, batched=True, batch_size=16, remove_columns=columns, **options)


def collate_documents(features: list[dict]) -> dict[str, torch.Tensor]:
    """
    A batch of whole documents, padded on the right to the longest: `input_ids`, `attention_mask` and `labels`, each
    `(batch, longest)`, and `position_ids` where the documents have them. Labels are those of the documents, or else
    their unmasked ids: an EOS token at a document's end is a target, whatever the tokenizer pads with. Rows of
    [`DocumentStreams`] are stacked as they are.
    """
    if "shift_labels" in features[0]:
        return {name: torch.stack([feature[name] for feature in features]) for name in features[0]}

    def pad(name: str, default: list[torch.Tensor], padding_value: int = 0) -> torch.Tensor:
        rows = [torch.as_tensor(feature.get(name, row)) for feature, row in zip(features, default)]
        return pad_sequence(rows, batch_first=True, padding_value=padding_value)

    documents = [torch.as_tensor(feature["input_ids"]) for feature in features]
    mask = pad("attention_mask", [torch.ones_like(document) for document in documents])
    batch = {"input_ids": pad("input_ids", documents), "attention_mask": mask}
    if "position_ids" in features[0]:
        batch["position_ids"] = pad("position_ids", documents)
    return {**batch, "labels": pad("labels", documents, -100).masked_fill(mask == 0, -100)}


class DocumentStreams(IterableDataset):
    """
    Documents laid out as `num_streams` streams, of which every step of training reads the next `step_length` tokens.

    A document that is longer than a step goes on in the next one, in the same row of the batch; when it ends, the row
    goes on with another document, whose `position_ids` restart at 0 and so start with an empty memory. Batches are
    made of consecutive rows, so that for `num_streams` = processes x batch size each process keeps its streams. With
    gradient accumulation, the batches of a step follow each other in time.

    Each row is a dict of tensors `(step_length,)`: `input_ids`, `attention_mask` (0 after a stream's last document),
    `position_ids` in the document, `labels`, and `shift_labels` whose last entry is the first token of the next step.

    Args:
        documents: of each, the token ids, or a dict with them as `input_ids`; a list or `datasets.Dataset`, or an
            iterable that is read as training goes.
        num_streams: rows of a step over all processes.
        step_length: tokens of a stream in a step.
        seed: shuffle the documents anew in each epoch; an iterable is read in its own order.
    """

    def __init__(
        self, documents: Iterable[dict | Sequence[int]], num_streams: int, step_length: int, seed: int | None = None
    ):
        if num_streams < 1 or step_length < 1:
            raise ValueError(f"num_streams={num_streams} and step_length={step_length} must be at least 1.")
        self.documents, self.num_streams, self.step_length, self.seed = documents, num_streams, step_length, seed
        self.epoch = 0
        self._streams: list[list[int]] | None = None
        self._length = 0
        if isinstance(documents, Sized) and hasattr(documents, "__getitem__"):
            self._streams = self._balanced_streams()

    def _balanced_streams(self) -> list[list[int]]:
        """Numbers of each stream's documents: the longest first, each to the stream that is the shortest so far."""
        lengths = [len(_ids(self.documents[index])) for index in range(len(self.documents))]  # type: ignore[index, arg-type]
        if not any(lengths):
            raise ValueError("The documents hold no tokens.")
        streams: list[list[int]] = [[] for _ in range(self.num_streams)]
        totals = [0] * self.num_streams
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            shortest = totals.index(min(totals))
            streams[shortest].append(index)
            totals[shortest] += lengths[index]
        self._length = -(-max(totals) // self.step_length) * self.num_streams
        return streams

    def __len__(self) -> int:
        """Number of rows in an epoch; a TypeError for an iterable, which does not know."""
        if self._streams is None:
            raise TypeError("These documents are read as training goes: set max_steps.")
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of an epoch."""
        self.epoch = epoch

    def _documents_of_streams(self) -> list[Iterator[torch.Tensor]]:
        if self._streams is None:
            shared = (torch.as_tensor(_ids(document)) for document in self.documents)
            return [shared] * self.num_streams

        def read(indices: list[int]) -> Iterator[torch.Tensor]:
            return (torch.as_tensor(_ids(self.documents[index])) for index in indices)  # type: ignore[index]

        if self.seed is None:
            return [read(sorted(stream)) for stream in self._streams]
        shuffler = random.Random(f"{self.seed} {self.epoch}")
        return [read(shuffler.sample(stream, len(stream))) for stream in self._streams]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"DocumentStreams are read by one worker, in order; set dataloader_num_workers={worker.num_workers} "
                "to 0 or 1."
            )
        streams = [_Stream(documents) for documents in self._documents_of_streams()]
        while True:
            rows = [stream.next_row(self.step_length) for stream in streams]
            if not any(row["attention_mask"].any() for row in rows):
                return
            yield from rows


class _Stream:
    """One row of the batches: what is left of its document, and the documents after it."""

    def __init__(self, documents: Iterator[torch.Tensor]):
        self.documents = documents
        self.document = torch.empty(0, dtype=torch.long)
        self.position = 0

    def next_row(self, length: int) -> dict[str, torch.Tensor]:
        row = {
            "input_ids": torch.zeros(length, dtype=torch.long),
            "attention_mask": torch.zeros(length, dtype=torch.long),
            "position_ids": torch.zeros(length, dtype=torch.long),
            "labels": torch.full((length,), -100),
            "shift_labels": torch.full((length,), -100),
        }
        filled = 0
        while filled < length:
            if self.position == len(self.document):
                document = next(self.documents, None)
                if document is None:
                    break
                self.document, self.position = document, 0
            end = min(len(self.document), self.position + length - filled)
            ids, following = self.document[self.position : end], self.document[self.position + 1 : end + 1]
            columns = slice(filled, filled + len(ids))
            row["input_ids"][columns] = row["labels"][columns] = ids
            row["attention_mask"][columns] = 1
            row["position_ids"][columns] = torch.arange(self.position, end)
            row["shift_labels"][filled : filled + len(following)] = following
            if self.position == 0 and len(ids) > 0:
                row["labels"][filled] = -100
            filled, self.position = filled + len(ids), end
        return row


def _ids(document: dict | Sequence[int]) -> Sequence[int]:
    return document["input_ids"] if isinstance(document, dict) else document


__all__ = ["DocumentStreams", "collate_documents", "load_documents", "tokenize_documents"]
