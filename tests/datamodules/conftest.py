"""A prepared data module on the small corpus."""

import numpy as np
import pytest

from datamodules.text import TextDataModule


def module(corpus, tmp_path, **changes):
    return TextDataModule(
        **{"source": str(corpus[0]), "seq_len": 16, "batch_size": 4, "cache_dir": str(tmp_path)} | changes
    )


@pytest.fixture
def data(corpus, tmp_path):
    data = module(corpus, tmp_path)
    data.prepare_data()
    data.setup("fit")
    return data


def documents_of(ids, tokenizer):
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)
    assert len(pieces[-1]) == 0  # every document ends in the end-of-text token
    return [tokenizer.decode(piece.tolist()) for piece in pieces[:-1]]
