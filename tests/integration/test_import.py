"""Released checkpoints made into folders, and grown there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokenformer.hf  # noqa: F401
from datamodules.tokenizer import ByteTokenizer
from lit_modules.cli import main
from lit_modules.commands.tokenizers import save_tokenizer, tokenizer_of
from tests.conftest import ASSETS
from tokenformer import from_pretrained

GOLDEN = ASSETS / "golden_lm_small.safetensors"


def golden_weights():
    return {name: t for name, t in load_file(GOLDEN).items() if name.startswith("sequential.")}


@pytest.mark.parametrize("layout", ["bin", "folder", "safetensors folder", "shards"])
def test_a_released_checkpoint_is_imported(layout, golden_lm, tmp_path, capsys):
    source, weights = tmp_path / "released", golden_weights()
    source.mkdir()
    if layout == "safetensors folder":
        save_file(weights, source / "model.safetensors")
    elif layout == "shards":
        names = sorted(weights)
        shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        for file, held in shards.items():
            torch.save({name: weights[name] for name in held}, source / file)
        index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(weights, source / "pytorch_model.bin")
    path = source / "pytorch_model.bin" if layout == "bin" else source
    main(["import", str(path), "--out", str(tmp_path / "ours"), "--num_heads", "4"])
    assert "140,416 parameters" in capsys.readouterr().out
    model = from_pretrained(tmp_path / "ours").double()
    torch.testing.assert_close(model(golden_lm["input_ids"]), golden_lm["logits_f64"], rtol=0, atol=1e-12)
    assert "| parameters | 140,416 |" in (tmp_path / "ours/README.md").read_text()


def test_what_can_not_be_imported_is_refused(tmp_path, shared_data):
    command = ["--out", str(tmp_path / "out"), "--num_heads", "4"]
    zero = tmp_path / "zero"
    (zero / "global_step10").mkdir(parents=True)
    (zero / "global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(ValueError, match=r"python zero_to_fp32\.py"):
        main(["import", str(zero), *command])
    with pytest.raises(ValueError, match=r"wanted is .* pytorch_model\.bin or model\.safetensors in a folder"):
        main(["import", str(tmp_path), *command])
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"not there: pytorch_model-00001-of-00001\.bin"):
        main(["import", str(tmp_path), *command])

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    torch.save({"a": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match="might run code"):
        main(["import", str(tmp_path / "evil.bin"), *command])
    assert not (tmp_path / "was here").exists()
    (tmp_path / "half.bin").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"half\.bin is .*; corrupted, or no file of tensors"):
        main(["import", str(tmp_path / "half.bin"), *command])
    neox = str(shared_data / "tokenizer/gpt-neox-20b/tokenizer.json")
    with pytest.raises(ValueError, match="makes ids up to 50276, the model has 128"):
        main(["import", str(GOLDEN), *command, "--tokenizer", neox])
    assert not (tmp_path / "out").exists()


def test_an_imported_model_grows(tmp_path, golden_lm):
    main(["import", str(GOLDEN), "--out", str(tmp_path / "ours"), "--num_heads", "4"])
    save_tokenizer(ByteTokenizer(), tmp_path / "ours", 32)
    main(["grow", str(tmp_path / "ours"), "--factor", "2", "--out", str(tmp_path / "grown")])
    grown = from_pretrained(tmp_path / "grown")
    torch.testing.assert_close(grown(golden_lm["input_ids"]), golden_lm["logits_f32"], rtol=0, atol=5e-6)
    assert grown.config.ffn_tokens == 320
    assert tokenizer_of(tmp_path / "grown").vocab_size == 257
    assert "140,416 -> " in (tmp_path / "grown/README.md").read_text()
