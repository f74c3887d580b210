"""What older versions of transformers lack. Tests of it are skipped there, with the reason."""

import pytest
import torch
import transformers
from packaging.version import Version


def is_at_least(version: str) -> bool:
    return Version(transformers.__version__) >= Version(version)


def needs_transformers(version: str, reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_at_least(version), reason=f"needs transformers {version}: {reason}")


KNOWS_GGUF_TOKENIZERS = needs_transformers("5.17", "it reads the splits and the types of tokens of GGUF files")
SAVES_FIELDS_WITHOUT_USE = needs_transformers("5.23", "it saves loaded generation fields that have no use")

# 5.16 asks for an adapter on the main branch, whatever the revision; 5.17 and 5.18 were not tried.
FINDS_PINNED_FILES_ALONE = is_at_least("5.19")

RESUMES_ON_CPUS = is_at_least("5.18")
NEEDS_RESUMING_ON_CPUS = needs_transformers("5.18", "it resumes training by several processes on CPUs")

TRAINS_BY_TENSOR_PARALLELISM = is_at_least("5.19")
NEEDS_TRAINING_BY_TENSOR_PARALLELISM = needs_transformers("5.19", "its Trainer shares heads out")

# In tensor parallelism; vocabularies and the width of the MLP must divide before.
SHARES_OUT_UNEVENLY = is_at_least("5.21")


def as_function(exported):
    """What an exporter of transformers gives, which is a program of `torch.export` before 5.21."""
    return exported.module() if isinstance(exported, torch.export.ExportedProgram) else exported
