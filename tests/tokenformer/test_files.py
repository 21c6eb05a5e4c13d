"""What lies at a path, and which command reads it."""

import os

import pytest

from tokenformer.files import wrong_kind

KINDS = {
    "exported": "an exported model, for `tokenformer generate`",
    "exported/model.safetensors": "a part of the exported model .*/exported: give that folder",
    "released": "`tokenformer import .*/released --out DIR`",
    "shards": "`tokenformer import .*/shards --out DIR`",
    "pytorch_model.bin": "`tokenformer import .*/pytorch_model.bin --out DIR`",
    "run/checkpoints/a.ckpt": "`tokenformer export .*/a.ckpt --out DIR`",
    "run": "a folder with checkpoints .* the newest is .*/run/checkpoints/b.ckpt",
    "run/checkpoints": "a folder with checkpoints .* the newest is .*/run/checkpoints/b.ckpt",
    "run/checkpoints/b.ckpt": "a checkpoint of a training: `tokenformer export",
    "run/checkpoints/b.ckpt/__0_0.distcp": "a part of the sharded checkpoint .*/b.ckpt: give that folder",
    "zero": r"python zero_to_fp32\.py \. pytorch_model\.bin`, and `tokenformer import` that",
    "config.yaml": "a config: `tokenformer fit --config",
    "text.txt": "neither a checkpoint nor an exported model",
    "empty": "neither a checkpoint nor an exported model",
}
FILES = (
    "exported/model.safetensors exported/config.json released/pytorch_model.bin released/config.json "
    "shards/model.safetensors.index.json pytorch_model.bin run/config.yaml run/checkpoints/a.ckpt "
    "run/checkpoints/b.ckpt/meta.pt run/checkpoints/b.ckpt/__0_0.distcp zero/global_step10/zero_pp_rank_0_states.pt "
    "config.yaml text.txt"
)


def test_what_a_path_is_and_which_command_reads_it(tmp_path):
    (tmp_path / "empty").mkdir()
    for file in FILES.split():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    os.utime(tmp_path / "run/checkpoints/a.ckpt", (0, 0))
    for path, said in KINDS.items():
        with pytest.raises(ValueError, match=f"/{path} is .*{said}.*; wanted is another"):
            raise wrong_kind(tmp_path / path, "wanted is another")
    assert str(wrong_kind("nowhere/x", "wanted is another")) == "nowhere/x: no such file or folder"
