"""A tiny language model in a folder, and as transformers reads it; a group of eight processes in one."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.tokenformer.tiny_lm import write_tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_lm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForCausalLM

    import tokenformer.hf  # noqa: F401 - registers; transformers takes seconds to import

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def eight_processes():
    """A process group of one process that believes in seven others: sizes are right, contents are not."""
    _clear_sharding_prop_cache()  # what DTensor remembers of equal meshes names groups of tests before this one
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()
