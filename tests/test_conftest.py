"""What a test leaves behind is gone before the next one's fixtures, also those that are made once for a file."""

import os

import pytest
import torch


@pytest.fixture(scope="module")
def made_once():
    return torch.get_num_threads(), os.environ.get("MASTER_PORT")


def test_that_leaves_traces():
    torch.set_num_threads(2)
    os.environ["MASTER_PORT"] = "1"
    assert torch.get_num_threads() == 2


def test_that_shares_a_run_finds_none(made_once):
    assert made_once == (1, None)
