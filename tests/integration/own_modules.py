"""Modules of a user's own, for tests."""

import torch
from lightning import LightningDataModule, LightningModule
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_modules.modules.language import LanguageModule


class Tokens(LightningDataModule):
    """Sequences that count up."""

    def train_dataloader(self):
        ids = torch.arange(33 * 16).reshape(16, 33) % 50
        return DataLoader(TensorDataset(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Images(LightningDataModule):
    """Noise of three classes."""

    def train_dataloader(self):
        images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.arange(16) % 3), batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Bigram(LightningModule):
    """Predicts a token from the one before it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Embedding(257, width), torch.nn.Linear(width, 257))

    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        self.log("train/loss", loss)
        return loss

    def loss(self, ids, targets):
        return F.cross_entropy(self.net(ids).flatten(0, 1), targets.flatten())

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(*batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Lion(torch.optim.Optimizer):
    """The optimizer of arXiv:2302.06675."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                first, second = group["betas"]
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(momentum.lerp(p.grad, 1 - first).sign_(), alpha=-group["lr"])
                momentum.lerp_(p.grad, 1 - second)
        return loss


class OwnOptimizer(LanguageModule):
    """Trained by another optimizer, as docs/optimizers.md advises."""

    kind = "SGD"

    def configure_optimizers(self):
        if self.kind == "Lion":
            return Lion(self.param_groups(), lr=1e-3)
        if self.kind == "LBFGS":
            return torch.optim.LBFGS(self.parameters())
        if self.kind == "more groups":
            return torch.optim.SGD([{"params": [p]} for p in self.parameters()], lr=1e-2)
        optimizer = getattr(torch.optim, self.kind)(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
