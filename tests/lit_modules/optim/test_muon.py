"""Muon's updates are torch's, of the right matrices, in every state that a run can be in."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_modules.callbacks.free_space import checkpoint_bytes
from lit_modules.checkpoints.compatibility import check_resume
from lit_modules.modules.language import LanguageModule
from lit_modules.modules.vision import VisionModule
from lit_modules.optim import muon
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.groups import make_optimizer, param_groups, update_param_groups
from lit_modules.optim.skip_step import skip_if_nonfinite
from tokenformer import LMConfig, TokenFormerLM, ViTConfig, grow
from tokenformer.backbone import block_matrices

SMALL = {"vocab_size": 20, "depth": 2, "dim": 16, "num_heads": 2, "qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 24}
MUON = OptimConfig(name="muon", lr=2e-3, lr_adamw=5e-4)


def groups_of(model, **more):
    return param_groups(model, 0.1, muon=block_matrices(model), lr_adamw=0.25, **more)


def built(**config):
    torch.manual_seed(0)
    return TokenFormerLM(LMConfig(**SMALL | {"scale": "learned"} | config))


def give_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize(
    ("config", "dtype", "fused"),
    [({}, torch.float32, True), ({"baseline": "width"}, torch.float32, False), ({}, torch.bfloat16, True)],
)
def test_updates_are_torchs(monkeypatch, config, dtype, fused):
    """To the bit: torch.optim.Muon's of matrices in blocks, wide and tall, one by one or stacked; AdamW's of others."""
    monkeypatch.setattr(muon, "STACK", 300)  # two matrices of 8 x 16 at once, of 24 x 16 one
    ours = built(**config).to(dtype)
    theirs = copy.deepcopy(ours)
    optimizer = make_optimizer(groups_of(ours), MUON, fused=fused)
    matrices = block_matrices(theirs)
    assert all(("keys" in n or "values" in n or ".weight" in n) and ".blocks." in n for n in optimizer_names(optimizer))
    rest = [p for p in theirs.parameters() if all(p is not matrix for matrix in matrices)]
    decays = [{"params": [p for p in rest if p.ndim > 1]}, {"params": [p for p in rest if p.ndim == 1]}]
    decays[1]["weight_decay"] = 0.0
    peers = [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(decays, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused),
    ]
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        for peer in peers:
            peer.step()
    for (name, p), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, expected), name
    assert len(optimizer.state) == len(list(ours.parameters()))


def optimizer_names(optimizer):
    return [name for group in optimizer.param_groups if group["muon"] for name in group["param_names"]]


def test_all_singular_values_come_close_to_one():
    torch.manual_seed(0)
    for shape in ((3, 20, 50), (3, 50, 20)):
        values = torch.linalg.svdvals(muon.newton_schulz(torch.randn(shape)))
        assert 0.6 < values.min() < values.max() < 1.3


def test_every_parameter_is_in_one_group_at_its_rate():
    """Blocks' matrices are Muon's; in a grown model with rates by age, in a ViT with rates by layer, and in timm's."""
    lm = LanguageModule(LMConfig(**SMALL, tie_embeddings=False, norm_affine=True), MUON)
    lm.configure_model()
    before = len(lm.param_groups())
    grow(lm.model, ffn=30)
    lm.old_lr_scale = 0.5
    lm.growths = [
        {"new": [f"backbone.blocks.{i}.ffn.segments.1.{part}" for i in (0, 1) for part in ("keys", "values")]}
    ]
    found = {n: group for group in lm.param_groups() for n, _ in group["params"]}
    assert sorted(found) == sorted(name for name, _ in lm.named_parameters())
    assert {n for n, group in found.items() if group["muon"]} == {n for n in found if n.endswith(("keys", "values"))}
    assert found["model.backbone.blocks.1.ffn.segments.0.keys"]["lr_scale"] == 0.5
    assert found["model.backbone.blocks.1.ffn.segments.1.keys"]["lr_scale"] == 1.0
    assert found["model.lm_head.weight"]["lr_scale"] == 0.25 * 0.5
    assert (before, len(lm.param_groups())) == (3, 6)
    config = ViTConfig(image_size=16, patch_size=8, depth=3, dim=16, num_heads=2, num_classes=4)
    for name in (None, "test_vit"):
        vit = VisionModule(config, OptimConfig(name="muon", layer_decay=0.5), timm_model=name)
        vit.configure_model()
        found = {n: group for group in vit.param_groups() for n, _ in group["params"]}
        assert sorted(found) == sorted(name for name, _ in vit.named_parameters())
        for n, p in vit.named_parameters():
            assert found[n]["muon"] == (p.ndim == 2 and ".blocks." in n), n
        if name is None:
            assert found["model.backbone.blocks.0.ffn.segments.0.keys"]["lr_scale"] == 0.5**3
    convolutions = VisionModule(config, OptimConfig(name="muon"), timm_model="test_resnet")
    convolutions.configure_model()
    with pytest.raises(ValueError, match="optim.name=muon: this model has no Transformer blocks"):
        convolutions.param_groups()


class NoWaiting(TorchDispatchMode):
    """Fails where the host reads a number from the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_that_is_not_finite_does_nothing_and_nobody_waits():
    model = built()
    optimizer = make_optimizer(groups_of(model), MUON)
    for step, finite in enumerate((True, False, True)):
        give_gradients(model, step)
        before = copy.deepcopy([list(model.parameters()), list(optimizer.state.values())])
        if not finite:
            for p in model.parameters():
                p.grad.fill_(torch.nan)
        with NoWaiting():
            skipped = skip_if_nonfinite(optimizer, model.parameters(), torch.tensor(finite))
            optimizer.step()
        assert skipped == (not finite)
        after = [list(model.parameters()), list(optimizer.state.values())]
        same = [torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)]
        same += [torch.equal(a[k], b[k]) for a, b in zip(before[1], after[1], strict=False) for k in a]
        assert all(same) if not finite else not any(same)
    assert all(p.isfinite().all() for p in model.parameters())


def test_growth_keeps_the_momentum_of_old_tokens():
    model = built()
    optimizer = make_optimizer(groups_of(model), MUON)
    give_gradients(model)
    optimizer.step()
    kept = {p: copy.deepcopy(optimizer.state[p]) for p in model.parameters()}
    grow(model, ffn=30, qkv=12)
    update_param_groups(optimizer, groups_of(model))
    for p, state in kept.items():
        torch.testing.assert_close(optimizer.state[p], state, rtol=0, atol=0)
    give_gradients(model, 1)
    optimizer.step()
    keys = model.backbone.blocks[0].ffn.segments[1].keys
    torch.testing.assert_close(optimizer.state[keys], {"momentum_buffer": 0.05 * keys.grad})


def test_a_state_with_other_groups_finds_its_parameters():
    """`old_lr_scale` set for a resume makes six groups of three: each says for itself whether it is Muon's."""
    model, old = built(), {"is_old": lambda name: "segments.0" in name or "segments" not in name, "old_lr_scale": 0.5}
    grow(model, ffn=30)
    saving, resuming = (make_optimizer(groups_of(model, **more), MUON) for more in ({}, old))
    give_gradients(model)
    saving.step()
    expected = {p: copy.deepcopy(state) for p, state in saving.state.items()}
    kinds = [group["muon"] for group in resuming.param_groups]
    resuming.load_state_dict(saving.state_dict())
    assert [group["muon"] for group in resuming.param_groups] == kinds == [True, False, False] * 2
    for p, state in expected.items():
        torch.testing.assert_close(resuming.state[p], state, rtol=0, atol=0)
    other = make_optimizer(groups_of(built(ffn_tokens=25)), MUON)
    with pytest.raises(ValueError, match=r"ffn\.segments\.0\.keys with the shape \(24, 16\), now it has \(25, 16\)"):
        other.load_state_dict(saving.state_dict())


def test_a_frozen_or_unused_matrix_is_left_alone():
    model = built()
    optimizer = make_optimizer(groups_of(model), MUON)
    give_gradients(model)
    unused = block_matrices(model)[0]
    unused.grad, before = None, unused.clone()
    optimizer.step()
    assert torch.equal(unused, before)
    assert unused not in optimizer.state
    assert isinstance(unused, nn.Parameter)


def test_a_checkpoint_has_one_moment_of_its_matrices():
    """So less of the disk has to be free."""
    module = LanguageModule(LMConfig(**SMALL), MUON)
    module.configure_model()
    optimizer = make_optimizer(module.param_groups(), MUON)
    give_gradients(module)
    optimizer.step()
    moments = [moment for state in optimizer.state.values() for moment in state.values() if moment.ndim]
    saved = sum(tensor.nbytes for tensor in (*module.parameters(), *moments))
    assert checkpoint_bytes(SimpleNamespace(optimizers=[optimizer], callbacks=[]), module) == saved
    adamw = make_optimizer(param_groups(module, 0.1), OptimConfig())
    expected = 3 * sum(p.nbytes for p in module.parameters())
    assert checkpoint_bytes(SimpleNamespace(optimizers=[adamw], callbacks=[]), module) == expected


def test_a_gradscaler_scales_back_and_leaves_out():
    """As in 16-mixed, where the updates are not fused."""
    ours, plain = built(), built()
    optimizers = [make_optimizer(groups_of(model), MUON, fused=False) for model in (ours, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for model, factor in ((ours, 8.0), (plain, 1.0)):
        give_gradients(model)
        for p in model.parameters():
            p.grad *= factor
    for _ in range(2):
        scaler.unscale_(optimizers[0])
        scaler.step(optimizers[0])
        scaler.update()
        next(iter(ours.parameters())).grad[0] = torch.inf  # for the second time
    optimizers[1].step()
    assert scaler.get_scale() == 4.0
    for p, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, expected)


@pytest.mark.parametrize("saved", [{}, {"optim": {"name": "adamw"}}])
def test_a_checkpoint_of_the_other_optimizer_is_refused(saved):
    """Checkpoints from before Muon name none: AdamW."""
    module = LanguageModule(LMConfig(**SMALL), MUON)
    module._trainer = SimpleNamespace(training=True, callbacks=[])
    check_resume({"hyper_parameters": {"optim": {"name": "muon"}}}, module)
    with pytest.raises(ValueError, match=r"trained with optim\.name=adamw, .* set --model\.optim\.name=adamw"):
        check_resume({"hyper_parameters": saved}, module)
    module._trainer.training = False  # to validate it, say
    check_resume({"hyper_parameters": saved}, module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sgd"}, "optim.name='sgd': choose adamw or muon"),
        ({"lr_adamw": 1e-3}, "optim.lr_adamw=0.001: must be above 0, and goes with optim.name=muon"),
        ({"name": "muon", "lr_adamw": 0.0}, "optim.lr_adamw=0.0: must be above 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**change)
