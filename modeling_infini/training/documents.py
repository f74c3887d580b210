"""
Whole documents as training data: from text files, JSON lines, Parquet or a dataset of the Hub, and as streams that
go on from step to step. Needs the package `datasets`.
"""

import os
import random
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import logging


if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


logger = logging.get_logger(__name__)

# The builder of `datasets` that reads files of each ending.
BUILDERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}


# What `datasets` writes beside the files of a dataset.
ABOUT_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


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
        FileNotFoundError: if `source` is neither files, nor a folder with some, nor the id of a dataset of the Hub.
        ConnectionError: if it is neither files nor a folder, and the Hub cannot be asked.
        ValueError: if the files are of several kinds, or of one that is not read, or one is named twice; if another
            split of files is asked for than "train".

    Warns:
        UserWarning: if a folder holds files of other kinds, or about a dataset, which are not read; the message names
            them.
    """
    import datasets

    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    files: list[Path] = []
    others: list[Path] = []
    for path in map(Path, sources):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
            read = [file for file in found if file.suffix.lower() in BUILDERS and file.name not in ABOUT_DATASETS]
            files += read
            others += [file for file in found if file not in read]
        elif path.is_file():
            files.append(path)
        elif len(sources) > 1 or path.suffix.lower() in BUILDERS or path.is_absolute():
            raise FileNotFoundError(f"There is no file or folder {path}.")
    if not files:
        if len(sources) > 1 or Path(sources[0]).is_dir():
            raise FileNotFoundError(f"No documents ({', '.join(BUILDERS)}) in {', '.join(map(str, sources))}.")
        try:
            return datasets.load_dataset(str(sources[0]), split=split, streaming=streaming)
        except (FileNotFoundError, ConnectionError) as error:
            kind = ConnectionError if isinstance(error, ConnectionError) else FileNotFoundError
            raise kind(
                f"There is no file or folder {sources[0]} (seen from {os.getcwd()}), and no dataset of that name "
                f"on the Hub that can be read: {error}"
            ) from error

    if others:
        warnings.warn(f"These files are not read: {', '.join(map(str, others))}.", stacklevel=2)
    twice = [file for file, count in Counter(map(os.path.abspath, files)).items() if count > 1]
    if twice:
        raise ValueError(f"These files are named twice: {', '.join(twice)}. Name a folder or its files.")
    if split != "train":
        raise ValueError(f'Files are one split, "train"; there is no "{split}". Name the files that it is made of.')
    kinds = {BUILDERS.get(file.suffix.lower(), file.suffix) for file in files}
    if len(kinds) > 1 or not kinds <= set(BUILDERS.values()):
        raise ValueError(
            f"The files are {', '.join(sorted(kinds))}. Give files of one kind, of {', '.join(BUILDERS)}."
        )
    (builder,) = kinds
    options = {"sample_by": "document", "encoding": "utf-8-sig"} if builder == "text" else {}
    names = [str(file) for file in files]
    return datasets.load_dataset(builder, data_files=names, split="train", streaming=streaming, **options)


def load_held_out(
    source: str | os.PathLike | Sequence[str | os.PathLike],
) -> "datasets.Dataset | datasets.IterableDataset":
    """As [`load_documents`], to evaluate on: of a dataset of the Hub, its split "validation"."""
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    is_local = any(Path(path).exists() for path in sources)
    return load_documents(sources, split="train" if is_local else "validation")


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def tokenize_documents(
    documents: "datasets.Dataset | datasets.IterableDataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text_column: str = "text",
    window_length: int | None = None,
    num_proc: int | None = None,
) -> "datasets.Dataset | datasets.IterableDataset":
    """
    The token ids of each document, whole, ended by the tokenizer's EOS token if it has one. Texts without a token are
    left out.

    Args:
        window_length: chop documents into windows of this many tokens, for comparison with models that need it;
            `None`: keep them whole.
        num_proc: processes to work with, if not streaming.

    Raises:
        KeyError: if there is no column `text_column`; the message names those that there are.
        ValueError: if a row has no text, or several; if `window_length` is less than 1; if `num_proc` is given for a
            stream.

    Warns:
        UserWarning: if documents that are not streamed have no tokens; the message counts them.
    """
    if window_length is not None and window_length < 1:
        raise ValueError(f"window_length={window_length} must be at least 1.")
    if num_proc is not None and not isinstance(documents, Sized):
        raise ValueError(f"num_proc={num_proc} is for documents that are not streamed: leave it out.")
    columns = require_column(documents, text_column)

    def tokenize(batch: dict) -> dict:
        if None in batch[text_column]:
            raise ValueError(f'The column "{text_column}" has rows without a text. Leave them out by `filter`.')
        if not all(isinstance(text, str) for text in batch[text_column]):
            raise ValueError(f'The column "{text_column}" must hold one text in each row; some are lists or others.')
        # A text longer than the tokenizer's model_max_length is what this model is for.
        ids = tokenizer(batch[text_column], verbose=False)["input_ids"]
        eos = tokenizer.eos_token_id
        return {
            "input_ids": [
                [*document, eos] if eos is not None and document[-1:] != [eos] else document
                for document in ids
                if document
            ]
        }

    def chop(batch: dict) -> dict:
        return {
            "input_ids": [
                document[start : start + window_length]
                for document in batch["input_ids"]
                for start in range(0, len(document), window_length)
            ]
        }

    options = {"batched": True, "batch_size": 16} | ({} if num_proc is None else {"num_proc": num_proc})
    tokenized = documents.map(tokenize, remove_columns=columns, **options)
    if isinstance(documents, Sized) and (empty := len(documents) - len(tokenized)):
        warnings.warn(f"{empty} of {len(documents)} documents have no tokens, and are left out.", stacklevel=2)
    return tokenized if window_length is None else tokenized.map(chop, **options)


def require_column(documents: "datasets.Dataset | datasets.IterableDataset", name: str) -> list[str]:
    """
    The columns of `documents`, the one of that `name` among them.

    Raises:
        KeyError: if it is not; the message names those that there are.
    """
    columns = documents.column_names
    if columns is None:
        columns = list(next(iter(documents)))
    if name not in columns:
        raise KeyError(f'There is no column "{name}" in the documents; there are {", ".join(columns)}.')
    return columns


def refuse_unread(document: Mapping[str, Any], read: Collection[str], advice: str = "") -> None:
    """
    Refuses columns beside those that are `read` which would change what is learned: a number for each token, or a name
    that says so. Other numbers, such as ids and years, are named in a warning; texts are for people.
    """
    length = _length(document.get("input_ids"))
    others = {
        name: value
        for name, value in document.items()
        if name not in (*read, *OF_TOKENIZERS) and _holds_numbers(value)
    }
    # The token types of a single text are 0.
    if "token_type_ids" in others and not any(others["token_type_ids"]):
        del others["token_type_ids"]
    unread = [
        name
        for name, value in others.items()
        if LEARNS.search(name) or (length is not None and _length(value) == length)
    ]
    if unread:
        raise ValueError(
            f"Nothing reads these columns of the documents: {', '.join(unread)}. What says where to learn belongs "
            f"into labels, as -100 where nothing is to be learned; remove the others, e.g. by remove_columns.{advice}"
        )
    if others:
        logger.warning_once(f"Nothing reads these columns of the documents: {', '.join(others)}.")


def _length(value: Any) -> int | None:
    """The number of elements of a list or tensor; `None` of anything else."""
    is_list = isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0
    return len(value) if is_list else None


def _holds_numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_numbers, value[:1]))
    return value is not None and not isinstance(value, (str, bytes, Mapping))


# What tokenizers give beside the ids, and what says nothing of what to learn.
OF_TOKENIZERS = ("special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length")

# Names of columns that would change what is learned.
LEARNS = re.compile(r"mask|weight|loss|label|target|token_type")

# The columns of a batch, and what pads each of them on the right.
PADDING = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "labels": -100, "shift_labels": -100}


def collate_documents(features: list[dict], loss_inputs: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """
    A batch of whole documents, padded on the right to the longest: `input_ids`, `attention_mask` and `labels`, each
    `(batch, longest)`, and `position_ids` and `shift_labels` where the documents have them. Labels are those of the
    documents, or else what their `shift_labels` say, or their unmasked ids: an EOS token at a document's end is
    a target, whatever the tokenizer pads with, and the first token of a packed document is none.

    Args:
        loss_inputs: other columns of numbers, one for each token, which a loss reads; they are padded by 0.

    Raises:
        ValueError: if a document has other columns of numbers, or columns of unequal lengths, or if only some of them
            have `shift_labels`, or one of `loss_inputs`.
    """
    paddings = PADDING | dict.fromkeys(loss_inputs, 0)
    rows = []
    for feature in features:
        refuse_unread(feature, paddings)
        row = {name: _column(feature, name) for name in PADDING if feature.get(name) is not None}
        row |= {name: _numbers(feature, name) for name in loss_inputs if feature.get(name) is not None}
        ids = row["input_ids"]
        if any(len(values) != len(ids) for values in row.values()):
            lengths = ", ".join(f"{name} {len(values)}" for name, values in row.items())
            raise ValueError(f"The columns of a document must be of one length; it has {lengths}.")
        mask = row.setdefault("attention_mask", torch.ones_like(ids))
        if "labels" not in row and "shift_labels" in row:
            row["labels"] = F.pad(row["shift_labels"], (1, 0), value=-100)[: len(ids)]
        row.setdefault("labels", ids.masked_fill(_starts_of_documents(row), -100))
        row["labels"] = row["labels"].masked_fill(mask == 0, -100)
        rows.append(row)
    if any("position_ids" in row for row in rows):
        for row in rows:
            row.setdefault("position_ids", torch.arange(len(row["input_ids"])))
    for name in ("shift_labels", *loss_inputs):
        if len({name in row for row in rows}) > 1:
            raise ValueError(f"Of the documents of a batch, some have {name} and some have not.")
    for name in loss_inputs:
        # Whole numbers in one row and others in the next are of one kind.
        dtype = reduce(torch.promote_types, [row[name].dtype for row in rows if name in row], torch.bool)
        rows = [{**row, name: row[name].to(dtype)} if name in row else row for row in rows]
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=padding)
        for name, padding in paddings.items()
        if name in rows[0]
    }


def _starts_of_documents(row: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where a packed document starts: what stands before does not predict its first token."""
    newest = row["attention_mask"].cummax(0).values
    starts = (newest > newest.roll(1)) & (newest > 1)
    return starts | (row["position_ids"] == 0) if "position_ids" in row else starts


def _column(document: Mapping[str, Any], name: str) -> torch.Tensor:
    values = _numbers(document, name, "whole numbers")
    if values.is_floating_point() and len(values) > 0:
        raise ValueError(f"{name} of a document must be a list of whole numbers; got {values.dtype}.")
    return values.long()


def _numbers(document: Mapping[str, Any], name: str, kind: str = "numbers") -> torch.Tensor:
    try:
        values = torch.as_tensor(document[name])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} of a document must be a list of {kind}; {error}.") from error
    if values.dim() != 1:
        raise ValueError(
            f"{name} of a document must be a list of {kind}; got {values.dtype} of shape {tuple(values.shape)}."
        )
    return values


class DocumentStreams(IterableDataset):
    """
    Documents laid out as `num_streams` streams, of which every step of training reads the next `step_length` tokens.

    A document that is longer than a step goes on in the next one, in the same row of the batch; when it ends, the row
    goes on with another document, whose `position_ids` restart at 0 and so start with an empty memory. Batches are
    made of consecutive rows, so that for `num_streams` = processes x batch size each process keeps its streams. With
    gradient accumulation, the batches of a step follow each other in time.

    Each row is a dict of tensors `(step_length,)`: `input_ids`, `attention_mask` (0 after a stream's last document),
    `position_ids` in the document, `labels`, and `shift_labels` whose last entry is the label of the first token of
    the next step.

    Args:
        documents: of each, the token ids, or a dict with them as `input_ids`, and `labels` (by default the ids) of the
            same length; a list or `datasets.Dataset`, or an iterable that is read as training goes.
        num_streams: rows of a step over all processes.
        step_length: tokens of a stream in a step.
        seed: shuffle the documents anew in each epoch; not for an iterable, which is read in its own order.

    Attributes:
        fingerprint: of the tokens and their order, by which a resumed run knows them again; `None` for an iterable.

    Raises:
        ValueError: if a document has other columns of numbers, masked tokens, or position ids that are not its own;
            as soon as it is read, which is at once unless `documents` is an iterable.
    """

    def __init__(
        self, documents: Iterable[dict | Sequence[int]], num_streams: int, step_length: int, seed: int | None = None
    ):
        if num_streams < 1 or step_length < 1:
            raise ValueError(f"num_streams={num_streams} and step_length={step_length} must be at least 1.")
        if isinstance(documents, Mapping):
            raise ValueError(f"Documents are a list of rows, not a mapping of {', '.join(map(str, documents))}.")
        self.documents, self.num_streams, self.step_length, self.seed = documents, num_streams, step_length, seed
        self.epoch = 0
        self.fingerprint: int | None = None
        self._streams: list[list[int]] | None = None
        self._length = 0
        if isinstance(documents, Sized) and hasattr(documents, "__getitem__"):
            self._streams = self._balanced_streams()
        elif seed is not None:
            raise ValueError(
                f"seed={seed} shuffles documents that can be read in any order. These are read as training goes: "
                "leave it out, and shuffle them yourself, e.g. by their method shuffle."
            )

    def _balanced_streams(self) -> list[list[int]]:
        """Numbers of each stream's documents: the longest first, each to the stream that is the shortest so far."""
        lengths = []
        fingerprint = zlib.crc32(repr((self.num_streams, self.step_length, self.seed)).encode())
        for index in range(len(self.documents)):  # type: ignore[arg-type]
            ids = _read(self.documents[index]).ids  # type: ignore[index]
            lengths.append(len(ids))
            fingerprint = zlib.crc32(ids.cpu().numpy().tobytes(), zlib.crc32(b"document", fingerprint))
        self.fingerprint = fingerprint
        if not any(lengths):
            raise ValueError("The documents hold no tokens.")
        streams: list[list[int]] = [[] for _ in range(self.num_streams)]
        totals = [0] * self.num_streams
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            shortest = totals.index(min(totals))
            streams[shortest].append(index)
            totals[shortest] += lengths[index]
        if 0 in totals:
            warnings.warn(
                f"{totals.count(0)} of {self.num_streams} streams have no document, so that as many rows of each step "
                "are padding.",
                stacklevel=3,
            )
        self._length = -(-max(totals) // self.step_length) * self.num_streams
        return streams

    def __len__(self) -> int:
        """Number of rows in an epoch; a TypeError for an iterable, which does not know."""
        if self._streams is None:
            raise TypeError("These documents are read as training goes: set max_steps.")
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of an epoch; documents that shuffle themselves are told of it."""
        self.epoch = epoch
        if hasattr(self.documents, "set_epoch"):
            self.documents.set_epoch(epoch)

    def _documents_of_streams(self) -> list[Iterator["_Document"]]:
        if self._streams is None:
            shared = map(_read, self.documents)
            return [shared] * self.num_streams

        def read(indices: list[int]) -> Iterator[_Document]:
            return (_read(self.documents[index]) for index in indices)  # type: ignore[index]

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


class _Document(NamedTuple):
    ids: torch.Tensor
    labels: torch.Tensor


def _read(document: Mapping[str, Any] | Sequence[int]) -> _Document:
    if not isinstance(document, Mapping):
        document = {"input_ids": document}
    if "input_ids" not in document:
        raise ValueError(
            f"Documents need input_ids; there are {', '.join(document)}. Make them with tokenize_documents."
        )
    refuse_unread(document, ("input_ids", "labels", "attention_mask", "position_ids"))
    ids = _column(document, "input_ids")
    labels = ids if document.get("labels") is None else _column(document, "labels")
    if len(labels) != len(ids):
        raise ValueError(f"A document of {len(ids)} tokens has {len(labels)} labels.")
    for name, expected in (("attention_mask", torch.ones_like(ids)), ("position_ids", torch.arange(len(ids)))):
        if document.get(name) is not None and not torch.equal(_column(document, name), expected):
            raise ValueError(
                f"Streams read documents whole and one by one, but there is a document with {name} of its own. Leave "
                "out the tokens that are masked, and give packed documents apart."
            )
    return _Document(ids, labels)


class _Stream:
    """One row of the batches: what is left of its document, and the documents after it."""

    def __init__(self, documents: Iterator[_Document]):
        self.documents = documents
        self.document = _Document(*torch.empty(2, 0, dtype=torch.long))
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
            if self.position == len(self.document.ids):
                document = next(self.documents, None)
                if document is None:
                    break
                self.document, self.position = document, 0
            end = min(len(self.document.ids), self.position + length - filled)
            ids, labels = self.document.ids[self.position : end], self.document.labels[self.position : end]
            following = self.document.labels[self.position + 1 : end + 1]
            columns = slice(filled, filled + len(ids))
            row["input_ids"][columns], row["labels"][columns] = ids, labels
            row["attention_mask"][columns] = 1
            row["position_ids"][columns] = torch.arange(self.position, end)
            row["shift_labels"][filled : filled + len(following)] = following
            if self.position == 0 and len(ids) > 0:
                row["labels"][filled] = -100
            filled, self.position = filled + len(ids), end
        return row


__all__ = ["DocumentStreams", "collate_documents", "load_documents", "load_held_out", "tokenize_documents"]
