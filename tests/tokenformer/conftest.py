"""A tiny language model in a folder, and as transformers reads it; for the tests of what others do with a model."""

import pytest

from tests.tokenformer.tiny_lm import write_tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_lm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForCausalLM

    import tokenformer.hf  # noqa: F401 - registers; transformers takes seconds to import

    return AutoModelForCausalLM.from_pretrained(folder)
