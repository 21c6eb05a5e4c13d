"""TokenFormerViT: an image classifier whose every projection is a Pattention, with the interface of a timm model.

One file: timm asks one class for all of it.

B batch, P patches, T tokens (the patches, and the class token before them), D channels, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from timm.layers import DropPath, PatchEmbed, build_sincos2d_pos_embed, resample_abs_pos_embed
from timm.models import register_notrace_function, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tokenformer.backbone import Backbone, rotary_tables
from tokenformer.config import ViTConfig
from tokenformer.pattention import Pattention
from tokenformer.timm_models import square

register_notrace_module(Pattention)  # torch.fx takes a layer as one node: what it calls depends on its segments


class TokenFormerViT(nn.Module):
    """Patch embedding, positions, backbone, final norm, pooling, classifier.

    Images may be larger or smaller than the config says, by whole patches: position embeddings are resampled, in
    `forward` and when weights of another size are loaded. `config` follows what is changed later, but for growth.

    Initialisation, a table of standard deviations of normal distributions (blocks: see TokenFormerLM; a test reads it):

        what                     init: official                      init: scaled
        patch_embed.proj         1/sqrt(in_channels patch_size^2)    0.1/sqrt(in_channels patch_size^2)
        class_token, position    0.02                                0.1
        head                     0.02                                0.02

    With `scaled` patches do not drown positions: the first blocks see both.

    Example:
        >>> model = TokenFormerViT(ViTConfig(image_size=32, patch_size=4, num_classes=10, depth=2, dim=64, num_heads=4))
        >>> logits = model(torch.zeros(1, 3, 32, 32))  # (1, 10)
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.pretrained_cfg: dict[str, Any] = {}  # timm's: what images it takes, what its classes are called
        self.patch_embed = PatchEmbed(
            config.image_size, config.patch_size, config.in_channels, config.dim, strict_img_size=False
        )
        self.class_token = nn.Parameter(torch.empty(1, 1, config.dim)) if config.pool == "token" else None
        if config.position == "learned":
            self.position = nn.Parameter(torch.empty(1, config.num_tokens(), config.dim))
        else:
            self.register_buffer("position", _sincos(config), persistent=False)
        self.backbone = Backbone(config, causal=False)
        for i, block in enumerate(self.backbone.blocks):
            if rate := config.drop_path * i / max(1, config.depth - 1):
                block.drop_path = DropPath(rate)
        self.head = self._classifier()
        self.global_pool: str = config.pool  # what is classified: token, avg, or each token by itself: ""
        self.in_chans = config.in_channels
        self.num_features = self.head_hidden_size = self.embed_dim = config.dim  # the names that timm reads
        self.feature_info = [
            {"module": f"backbone.blocks.{i}", "num_chs": config.dim, "reduction": config.patch_size}
            for i in range(config.depth)
        ]
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        patch_rms, position_rms = (1.0, 0.02) if self.config.init == "official" else (0.1, 0.1)
        projection = self.patch_embed.proj
        projection.weight.normal_(std=patch_rms / math.sqrt(projection.weight[0].numel()))
        projection.bias.zero_()
        for embedding in (self.class_token, self.position):
            if isinstance(embedding, nn.Parameter):
                embedding.normal_(std=position_rms)

    def _classifier(self) -> nn.Module:
        if not self.config.num_classes:
            return nn.Identity()
        head = nn.Linear(self.config.dim, self.config.num_classes)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> normalised tokens (B, T, D), the class token first."""
        return self.backbone(self._embed(images))

    def _embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, T, D)."""
        x = self.patch_embed(images)  # (B, P, D)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1)  # (B, T, D)
        height, width = images.shape[-2:]
        rows, columns = height // self.config.patch_size, width // self.config.patch_size
        return x + resampled(self.position, rows, columns, self.num_prefix_tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, T, D) -> logits (B, C); with `pre_logits` what the classifier reads, (B, D).

        Both of every token, (B, T, C) and (B, T, D), where `global_pool` is "".
        """
        pooled = x[:, 0] if self.global_pool == "token" else x.mean(dim=1) if self.global_pool == "avg" else x
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C)."""
        return self.forward_head(self.forward_features(images))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take position embeddings of another image size."""
        name, grid = f"{prefix}position", self.config.grid
        if name in state_dict:
            patches = state_dict[name].shape[1] - self.num_prefix_tokens
            if math.isqrt(patches) ** 2 == patches:  # else it has a class token too many or too few, and torch says so
                state_dict[name] = resampled(state_dict[name], grid, grid, self.num_prefix_tokens)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # From here to `prune_intermediate_layers`: what timm's scripts, optimizers and feature extractors ask a model for.

    @property
    def num_classes(self) -> int:
        """Outputs; 0 without classifier."""
        return self.config.num_classes

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before those of the patches: 1 with a class token."""
        return int(self.class_token is not None)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in the place of the old.

        Args:
            num_classes: its outputs; 0 for none.
            global_pool: what the model was built for, "" for no pooling, None for what it has; no part of the config.

        Raises:
            ValueError: for another pooling.
        """
        if global_pool not in (None, "", self.config.pool):
            raise ValueError(
                f"global_pool={global_pool!r}: the model was built for {self.config.pool!r}, which decides on its "
                "class token: build another model; '' gives tokens without pooling"
            )
        if global_pool is not None:
            self.global_pool = global_pool
        self.config = replace(self.config, num_classes=num_classes)
        self.head = self._classifier().to(self.patch_embed.proj.weight).train(self.training)

    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size: Any = None) -> None:
        """Let images of another size be the usual ones, with position embeddings resampled once and for all.

        Args:
            img_size: height and width, one number or two equal ones.
            patch_size: what it is already, or None.

        Raises:
            ValueError: for an image that is not square or no whole number of patches, and for another patch size.
        """
        if patch_size not in (None, self.config.patch_size, (self.config.patch_size,) * 2):
            raise ValueError(f"patch_size={patch_size}: the patch embedding is made for {self.config.patch_size}")
        if img_size is None:
            return
        self.config = replace(self.config, image_size=square(img_size))
        grid, old = self.config.grid, self.position
        if isinstance(old, nn.Parameter):
            new = resampled(old.detach(), grid, grid, self.num_prefix_tokens)
            self.position = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            self.position = _sincos(self.config).to(old)
        self.patch_embed.set_input_size(self.config.image_size)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are embeddings and not weights."""
        return {"class_token", "position"}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of the names of a layer's parameters, first layer first; what matches none is the last layer.

        As in BEiT and MAE: the embeddings, each block, then final norm and classifier. There is no coarser way.
        """
        return {"stem": r"^(?:class_token|position|patch_embed)", "blocks": r"^backbone\.blocks\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass, see Backbone."""
        self.backbone.checkpoint_activations = enable

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The tokens after some of the blocks.

        Args:
            images: (B, 3, H, W).
            indices: which blocks; an int for the last so many, None for all.
            return_prefix_tokens: give pairs of patches and class token (B, 1, D), where the model has one.
            norm: apply the final norm to them too.
            stop_early: leave out the blocks after the last of `indices`.
            output_fmt: patches as (B, D, rows, columns) with NCHW, as (B, P, D) with NLC.
            intermediates_only: return the list alone.

        Returns:
            The normalised last tokens (B, T, D) as in `forward_features`, and the list.

        Raises:
            ValueError: for another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: choose NCHW or NLC")
        backbone = self.backbone
        taken, last = feature_take_indices(len(backbone.blocks), indices)
        x, found = self._embed(images), []
        rotary = rotary_tables(x.shape[1], backbone.rotary_dim, x.device) if backbone.rotary_dim else None
        for i, block in enumerate(backbone.blocks[: last + 1] if stop_early else backbone.blocks):
            if backbone.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
            if i in taken:
                found.append(backbone.norm(x) if norm else x)
        prefix = [y[:, : self.num_prefix_tokens] for y in found]  # (B, 1 or 0, D)
        patches = [y[:, self.num_prefix_tokens :] for y in found]  # (B, P, D)
        if output_fmt == "NCHW":
            grid = [side // self.config.patch_size for side in images.shape[-2:]]
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]  # (B, D, rows, columns)
        pairs = return_prefix_tokens and self.class_token is not None
        intermediates = list(zip(patches, prefix, strict=True)) if pairs else patches
        return intermediates if intermediates_only else (backbone.norm(x), intermediates)

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """:meth:`forward_intermediates` as DINO has it: (B, P, D) each; (B, D, rows, columns) with `reshape`."""
        shape: Literal["NCHW", "NLC"] = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            images, n, return_prefix_tokens, norm, output_fmt=shape, intermediates_only=True
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut off what `forward_intermediates` with these indices does not need; returns them, counted from the first.

        Args:
            indices: as there.
            prune_norm: the final norm too.
            prune_head: the classifier too.
        """
        taken, last = feature_take_indices(len(self.backbone.blocks), indices)
        self.backbone.blocks = self.backbone.blocks[: last + 1]
        self.config = replace(self.config, depth=last + 1)
        if prune_norm:
            self.backbone.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0)
        return list(taken)

    def num_params(self) -> int:
        """Parameters as the model is now, growth included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_image(self, image_size: int | None = None) -> int:
        """Forward FLOPs as the model is now, growth included; counted as in :meth:`ViTConfig.flops_per_image`."""
        config, tokens = self.config, self.config.num_tokens(image_size)
        grown = self.backbone.matrix_params() - config.depth * config.block_matmul_params()
        return config.flops_per_image(image_size) + 2 * tokens * grown


def resampled(position: Tensor, rows: int, columns: int, num_prefix_tokens: int) -> Tensor:
    """Position embeddings of a square grid, for a grid of another size, (1, T, D)."""
    side = math.isqrt(position.shape[1] - num_prefix_tokens)
    if isinstance(rows, torch.SymInt) or isinstance(columns, torch.SymInt):  # in torch.export, which is to hold for all
        grid = position[:, num_prefix_tokens:].unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True).to(position.dtype)
        return torch.cat((position[:, :num_prefix_tokens], grid.flatten(2).transpose(1, 2)), dim=1)
    if (rows, columns) == (side, side):
        return position
    return resample_abs_pos_embed(position, [rows, columns], [side, side], num_prefix_tokens=num_prefix_tokens)


register_notrace_function(resampled)


def _sincos(config: ViTConfig) -> Tensor:
    """Sines and cosines of rows and columns, zeros for the class token, (1, T, D); MAE's in another order."""
    patches = build_sincos2d_pos_embed([config.grid, config.grid], config.dim)  # (P, D)
    if config.pool == "token":
        patches = torch.cat((torch.zeros(1, config.dim), patches))
    return patches.unsqueeze(0)
