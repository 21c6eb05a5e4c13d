"""Updates of low rank beside the projections of a Transformer baseline: they change nothing until they are trained."""

import pytest
import torch

from tests.tokenformer.tiny_lm import IDS, LM
from tokenformer import LMConfig, TokenFormerLM, ViTConfig, from_pretrained, save_pretrained
from tokenformer.baseline import Linear, add_lora
from tokenformer.elastic import elastic_layers
from tokenformer.net2net import widen
from tokenformer.vision import TokenFormerViT

PROJECTIONS = 2 * (4 * (32 + 32) + 2 * (32 + 128))  # rows and columns of both blocks' matrices


def tiny(**changes):
    torch.manual_seed(0)
    return TokenFormerLM(LMConfig(vocab_size=257, depth=2, dim=32, num_heads=4, baseline="width", **changes)).eval()


def trained(model):
    """As if the second matrices had been trained."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            parameter.data.normal_(std=0.5, generator=generator)
    return model


def test_the_function_stays_until_they_are_trained():
    model = tiny()
    before, params, flops = model(IDS), model.num_params(), model.flops_per_token(16)
    add_lora(model, 3)
    assert torch.equal(model(IDS), before)
    assert model.num_params() == params + 3 * PROJECTIONS
    assert model.flops_per_token(16) == flops + 2 * 3 * PROJECTIONS
    once = trained(model)(IDS)
    assert not torch.allclose(once, before, atol=0.1)
    add_lora(model, 2)
    assert torch.equal(model(IDS), once)
    downs = [p for name, p in model.named_parameters() if name.endswith(".down")]
    assert all(0.9 * p.shape[1] ** -0.5 < p.abs().max() <= p.shape[1] ** -0.5 for p in downs if p.shape[1] > 32)
    assert len({float(p.sum()) for p in downs}) == len(downs) == 2 * 12


def test_what_is_added_is_b_a_x():
    layer = Linear(5, 7)
    update = layer.append_lora(2)
    update.up.data.normal_()
    update.down.data.normal_()
    x = torch.randn(3, 5)
    expected = x @ (layer.weight + update.up @ update.down).T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(x @ layer.merged().T, expected)
    add_lora(torch.nn.ModuleDict({"same": (one := Linear(5, 7))}), 2, seed=4)
    add_lora(torch.nn.ModuleDict({"same": (two := Linear(5, 7))}), 2, seed=4)
    add_lora(torch.nn.ModuleDict({"same": (other := Linear(5, 7))}), 2, seed=5)
    assert torch.equal(one.lora[0].down, two.lora[0].down)
    assert not torch.equal(one.lora[0].down, other.lora[0].down)


def test_a_state_dict_brings_its_own():
    model = tiny()
    states = [model.state_dict()]
    for rank in (3, 2):
        add_lora(model, rank)
        states.append({name: tensor.clone() for name, tensor in trained(model).state_dict().items()})
    outputs = []
    for state in (*states[::-1], states[1]):  # fewer, then more
        model.load_state_dict(state)
        loaded = model.state_dict()
        assert {name: tensor.shape for name, tensor in loaded.items()} == {n: t.shape for n, t in state.items()}
        outputs.append(model(IDS))
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


def test_a_folder_has_them_merged_or_beside(tmp_path):
    model = tiny()
    add_lora(model, 3)
    add_lora(trained(model), 2)
    expected = trained(model)(IDS)
    save_pretrained(model, tmp_path / "merged")
    save_pretrained(model, tmp_path / "beside", join=False)
    merged, beside = from_pretrained(tmp_path / "merged"), from_pretrained(tmp_path / "beside")
    assert merged.state_dict().keys() == tiny().state_dict().keys()
    torch.testing.assert_close(merged(IDS), expected)
    assert torch.equal(beside(IDS), expected)


def test_a_wider_model_has_them_in_its_weights():
    model = tiny()
    add_lora(model, 3)
    wide = widen(trained(model), 2)
    torch.testing.assert_close(wide(IDS), model(IDS), atol=1e-4, rtol=1e-4)
    assert not any(".lora." in name for name, _ in wide.named_parameters())


def test_an_image_model_has_them_too():
    sizes = {"image_size": 8, "patch_size": 4, "depth": 1, "dim": 16, "num_heads": 2, "num_classes": 3}
    model = TokenFormerViT(ViTConfig(**sizes, baseline="width")).eval()
    images = torch.randn(2, 3, 8, 8)
    before = model(images)
    add_lora(model, 2)
    assert torch.equal(model(images), before)
    model.head.weight.data.normal_()
    loss = model(images).square().sum()
    loss.backward()
    ups = [p for name, p in model.named_parameters() if name.endswith(".up")]
    assert len(ups) == 6
    assert all(p.grad.any() for p in ups)


def test_what_has_no_such_projections_is_refused():
    with pytest.raises(ValueError, match="lora: the model is no Transformer baseline"):
        add_lora(TokenFormerLM(LM), 2)
    with pytest.raises(ValueError, match="lora=0: the rank must be at least 1"):
        add_lora(tiny(), 0)
    model = tiny()
    add_lora(model, 1)
    with pytest.raises(ValueError, match="has updates of low rank .LoRA. beside its MLPs: `tokenformer export`"):
        elastic_layers(model)
