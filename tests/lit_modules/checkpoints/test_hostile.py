"""Files from strangers: sizes are compared with the file before anything is unpacked or built."""

import json
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lit_modules.checkpoints.reading import _sharded_tensors, read_checkpoint, read_header
from lit_modules.checkpoints.sharded import ShardReader
from lit_modules.checkpoints.validation import find_corruption, latest_valid
from lit_modules.modules.language import LanguageModule
from lit_modules.modules.loading import load_model
from lit_modules.optim.config import OptimConfig
from tokenformer import LMConfig, TokenFormerLM, from_pretrained, save_pretrained
from tokenformer.interop import load_trained
from tokenformer.released import read_released

CONFIG = LMConfig(vocab_size=11, depth=1, dim=8, num_heads=1, qkv_tokens=4, proj_tokens=4, ffn_tokens=8)


@pytest.fixture
def checkpoint():
    return checkpoint_of(CONFIG)


def checkpoint_of(config):
    """What a file of a training holds, as small as it gets."""
    module = LanguageModule(config, OptimConfig())
    module.configure_model()
    return {
        "pytorch-lightning_version": "2.6",
        "hyper_parameters": dict(module.hparams),
        "state_dict": module.state_dict(),
    }


def repacked(path, **changes):
    """The same archive with parts changed or compressed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, changes.get(name.rpartition("/")[2].removesuffix(".pkl"), content))


def test_a_compressed_archive_is_not_unpacked(tmp_path, checkpoint, monkeypatch):
    path = tmp_path / "step-00000001.ckpt"
    torch.save(checkpoint, path)
    repacked(path, data=pickle.dumps(bytes(2**26), protocol=2))
    assert path.stat().st_size < 2**20
    released = tmp_path / "pytorch_model.bin"
    released.write_bytes(path.read_bytes())
    monkeypatch.setattr(torch, "load", None)  # nothing of it is read
    monkeypatch.setattr(zipfile.ZipFile, "testzip", None)
    for act in (read_header, read_checkpoint, load_model, load_trained):
        with pytest.raises(ValueError, match=r"its part .*data.pkl is compressed, which torch never does"):
            act(path)
    with pytest.raises(ValueError, match=r"pytorch_model.bin.*its part .*data.pkl is compressed"):
        read_released(released)
    with pytest.warns(UserWarning, match="passed over: its part"):
        assert latest_valid([path]) is None
    folder = tmp_path / "sharded.ckpt"
    folder.mkdir()
    path.rename(folder / "meta.pt")
    monkeypatch.setattr("lit_modules.checkpoints.validation._corrupted_shard", lambda folder: None)
    assert "is compressed" in find_corruption(folder)


def test_parts_that_overlap_are_not_unpacked(tmp_path, checkpoint):
    path = tmp_path / "a.ckpt"
    torch.save(checkpoint, path)
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
        archive.filelist += [largest] * 20
        archive._didModify = True
    assert "are larger than the file" in find_corruption(path)


@pytest.mark.parametrize("size", [10**12, 10**6])
def test_a_tensor_larger_than_its_numbers_is_refused(tmp_path, size):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"x": torch.zeros(1).expand(size)}}, path)
    assert find_corruption(path) == "its tensors are larger than what it holds of them"
    with pytest.raises(ValueError, match="its tensors are larger than what it holds of them"):
        load_trained(path)
    torch.save({"state_dict": {"x": torch.zeros(4, 3).T, "y": torch.zeros(8)[2:4], "none": torch.zeros(0)}}, path)
    assert find_corruption(path) is None


@pytest.mark.parametrize("huge", [{"depth": 10**6}, {"dim": 10**6}, {"vocab_multiple": 10**9}, {"ffn_tokens": 10**9}])
def test_a_model_larger_than_its_weights_is_not_built(tmp_path, checkpoint, monkeypatch, huge):
    path, folder = tmp_path / "a.ckpt", tmp_path / "exported"
    torch.save(checkpoint, path)
    load_model(path)
    model = TokenFormerLM(CONFIG)
    save_pretrained(model, folder)
    from_pretrained(folder)
    checkpoint["hyper_parameters"]["config"] |= huge
    torch.save(checkpoint, path)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | huge))
    monkeypatch.setattr(TokenFormerLM, "__init__", None)
    for act, source in ((load_model, path), (load_trained, path), (from_pretrained, folder)):
        with pytest.raises(ValueError, match=r"its config is of a model of [\d,]+ parameters, its weights have"):
            act(source)


def test_a_history_of_widening_beyond_the_weights_is_not_built(tmp_path):
    checkpoint = checkpoint_of(replace(CONFIG, baseline="width"))
    torch.save(checkpoint, tmp_path / "a.ckpt")
    load_model(tmp_path / "a.ckpt")
    torch.save(checkpoint | {"growths": [{"width": 10**6, "train": "all"}]}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"its config is of a model of [\d,]+ parameters"):
        load_model(tmp_path / "a.ckpt")


def test_settings_of_a_training_that_are_none_are_named(tmp_path, checkpoint):
    path = tmp_path / "a.ckpt"
    torch.save(checkpoint | {"arch": "tokenformer_vit_tiny_patch16_224"}, path)  # without timm's tensors
    with pytest.raises(ValueError, match="corrupted, its tensors or settings are not those of a model"):
        load_trained(path)


CONFIGS = {
    "nested": ("[" * 10**5, "corrupted: "),
    "no dictionary": ("[]", "corrupted: it is no dictionary"),
    "a size that is no number": ('{"model_type": "tokenformer", "depth": "x"}', "corrupted: "),
}


@pytest.mark.parametrize("content", CONFIGS)
def test_a_config_that_is_none_is_named(tmp_path, content):
    save_pretrained(TokenFormerLM(CONFIG), tmp_path)
    (tmp_path / "config.json").write_text(CONFIGS[content][0])
    with pytest.raises(ValueError, match=f"config.json: {CONFIGS[content][1]}"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("elsewhere", ["../secret.distcp", "/etc/passwd"])
def test_an_index_reads_no_file_outside_its_folder(tmp_path, elsewhere):
    dcp.save({"x": torch.zeros(3)}, checkpoint_id=tmp_path / "a.ckpt", no_dist=True)
    index = tmp_path / "a.ckpt/.metadata"
    metadata = ShardReader(tmp_path / "a.ckpt").read_metadata()
    for part in metadata.storage_data.values():
        part.relative_path = elsewhere
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=f"names the file {elsewhere}, which is not in its folder"):
        ShardReader(tmp_path / "a.ckpt").read_metadata()


def test_an_index_of_more_than_the_files_hold_is_refused(tmp_path):
    dcp.save({"state_dict": {"x": torch.zeros(3)}}, checkpoint_id=tmp_path / "a.ckpt", no_dist=True)
    assert torch.equal(_sharded_tensors(tmp_path / "a.ckpt")["state_dict"]["x"], torch.zeros(3))
    metadata = ShardReader(tmp_path / "a.ckpt").read_metadata()
    metadata.state_dict_metadata["state_dict.x"].size = torch.Size([10**12])
    (tmp_path / "a.ckpt/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"its index is of tensors of 4,000,000,000,000 bytes, its files have"):
        _sharded_tensors(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ".", "", 5, None, ["a"]])
def test_an_index_of_weights_names_files_beside_it(tmp_path, name):
    save_pretrained(TokenFormerLM(CONFIG), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match=r"index.json(: corrupted| names files that are not there: \.\.$)"):
        from_pretrained(tmp_path)
