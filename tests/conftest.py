"""Shared by all tests: golden numbers, a small corpus, the command line in process."""

import os
import random
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each process that compiles starts a pool

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "tests" / "assets"
SHARED_DATA = ROOT.parent / "shared" / "data"

torch.set_num_threads(1)  # tiny models: more threads wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def forget_other_runs():
    """What runs leave in this process: where those of DDP have met, as many threads as cores, trainer.deterministic."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    torch.set_num_threads(1)  # another number, other bits
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_trace_of_other_tests():
    """Before a test, of the fixtures of its file; after it, since those of the next file come before this one."""
    forget_other_runs()
    yield
    forget_other_runs()


@pytest.fixture(scope="session")
def golden_lm():
    return load_file(ASSETS / "golden_lm_small.safetensors")


@pytest.fixture(scope="session")
def shared_data():
    """Small real data sets, where the machine has them."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real texts, images and tokenizers in {SHARED_DATA}, a folder that is not there")
    return SHARED_DATA


def same_threads() -> dict[str, str]:
    """Environment for a process that is to compute the same bits as this one."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def write_corpus(path: Path, num_documents: int = 120, seed: int = 0) -> list[str]:
    """A .jsonl of short made-up documents that a model can learn something from; returns their texts."""
    import json

    choose = random.Random(seed)
    words = ["token", "grows", "key", "value", "the", "a", "model", "reads", "and", "writes", "rows", "of"]
    texts = [f"document {i}: " + " ".join(choose.choices(words, k=30)) + "." for i in range(num_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def write_images(root: Path, images) -> Path:
    """These images, in turn of three classes, as train/ and as val/."""
    for i, image in enumerate(images):
        path = root / "train" / f"class{i % 3}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (root / "val").symlink_to(root / "train")
    return root


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """(path of a .jsonl, its texts)."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return path, write_corpus(path)
