"""What `documents.yaml` reads. The harness loads this file by its path: it cannot import its neighbours."""

from datasets import DatasetDict, load_dataset


def load(documents: str | list[str], **metadata) -> DatasetDict:
    """
    Documents of a task.

    Args:
        documents: files or URLs of JSON lines, each with a `text`; from `--metadata`.
        metadata: the rest of it, and the arguments of the model.
    """
    return load_dataset("json", data_files={"test": documents})
