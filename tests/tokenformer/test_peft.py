"""LoRA on parameter tokens by peft: trained, saved, loaded, merged into a model of ours."""

import pytest
import torch

pytest.importorskip("peft", reason="needs peft: pip install 'tokenformer[peft]'")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tokenformer.hf  # noqa: F401 - registers
from tests.tokenformer.tiny_lm import IDS, LM
from tokenformer import TokenFormerLM, from_pretrained, save_pretrained
from tokenformer.growth import grow_layers

LAYER = "backbone.blocks.0.ffn"  # has two segments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    model = TokenFormerLM(LM)
    grow_layers(model, {LAYER: 77}, init="segment_norm")
    save_pretrained(model, path)
    return path


def lora(**settings):
    return LoraConfig(r=4, target_modules=[], target_parameters=["keys", "values"], **settings)


def test_lora_is_trained_saved_and_merged(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    start = base(IDS).logits.detach()
    model = get_peft_model(base, lora(task_type="CAUSAL_LM"))
    assert torch.equal(model(IDS).logits, start)
    assert "num_tokens=127" in str(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 4 * (5 * 2 + 1)  # A and B of keys and values of each segment
    optimizer = torch.optim.SGD(trained.values(), lr=10.0)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(p.grad.any() for p in trained.values())

    with torch.no_grad():
        tuned = model(IDS).logits
        assert (tuned - start).abs().max() > 0.01
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, start)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
        assert torch.equal(again(IDS).logits, tuned)
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(from_pretrained(tmp_path / "merged")(IDS), tuned)


@torch.no_grad()
def test_an_adapter_of_transformers_own(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(lora(init_lora_weights=False))
    tuned = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.load_adapter(str(tmp_path))
    assert torch.equal(again(IDS).logits, tuned)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, tuned)


@pytest.mark.parametrize("modules", [["query", "value"], "all-linear"])
def test_a_projection_is_no_target_module(folder, modules):
    """Its function of its input is not linear: nothing beside it could be merged into it. peft refuses."""
    with pytest.raises(ValueError, match=r"Target module Pattention\([\s\S]* is not supported|No `target_modules`"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=modules))
