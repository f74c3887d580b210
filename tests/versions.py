"""What older versions of transformers lack: the tests of it are skipped there, with the reason."""

import pytest
import transformers
from packaging.version import Version


def needs_transformers(version: str, reason: str) -> pytest.MarkDecorator:
    lacks = Version(transformers.__version__) < Version(version)
    return pytest.mark.skipif(lacks, reason=f"needs transformers {version}: {reason}")


knows_gguf_tokenizers = needs_transformers("5.17", "GGUF tokenizers by the name of their split and the type of tokens")
