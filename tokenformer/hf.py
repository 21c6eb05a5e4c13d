"""The models under transformers' interface (extra `hf`). `import tokenformer.hf` registers them; nothing else does.

    >>> import tokenformer.hf
    >>> model = AutoModelForCausalLM.from_pretrained(DIR)  # a folder that `tokenformer export` wrote
    >>> AutoTokenizer.from_pretrained(DIR), AutoModelForImageClassification.from_pretrained(DIR)

Registration is a line of its own because transformers takes seconds to import, and `import tokenformer` should not.

One file: transformers wants config, weights, cache and both models by the same rules.

B batch, T sequence, S tokens of a cache, D channels, V vocabulary, C classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tokenformer.backbone import rotary_tables, rotary_tables_at
from tokenformer.config import LMConfig, ViTConfig
from tokenformer.decoding import each
from tokenformer.interop import consolidated_state, present_config
from tokenformer.language import TokenFormerLM
from tokenformer.parts import match_shapes
from tokenformer.timm_models import INPUT, folder_config
from tokenformer.vision import TokenFormerViT, _sincos

try:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        Cache,
        DynamicCache,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        TimmWrapperImageProcessor,
    )
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_outputs import CausalLMOutputWithPast, ImageClassifierOutput
    from transformers.utils.generic import can_return_tuple
except ImportError as error:
    raise ImportError(f"tokenformer.hf needs transformers 5.6: pip install 'tokenformer[hf]' ({error})") from error


class _NativeConfig(PreTrainedConfig):
    """The fields of a native config by their names, and transformers' own beside them."""

    native_class: ClassVar[Any]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
    }

    def __post_init__(self, **kwargs: Any) -> None:
        for field in fields(self.native_class):
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        super().__post_init__(**kwargs)
        self.native()  # says what is wrong with the sizes

    def native(self) -> Any:
        """The LMConfig or ViTConfig.

        Raises:
            ValueError: for sizes that can't work.
        """
        return self.native_class(**{field.name: getattr(self, field.name) for field in fields(self.native_class)})

    def follow(self, native: Any) -> None:
        """Take the fields of an LMConfig or ViTConfig."""
        self.update(asdict(native))


class TokenFormerConfig(_NativeConfig):
    """LMConfig."""

    model_type = "tokenformer"
    native_class = LMConfig
    attribute_map = _NativeConfig.attribute_map | {
        "max_position_embeddings": "max_seq_len",
        "tie_word_embeddings": "tie_embeddings",
    }


class TokenFormerViTConfig(_NativeConfig):
    """ViTConfig, with as many labels as classes."""

    model_type = "tokenformer_vit"
    native_class = ViTConfig
    attribute_map = _NativeConfig.attribute_map | {"num_channels": "in_channels"}

    def __post_init__(self, **kwargs: Any) -> None:
        given = kwargs.get("num_classes", ViTConfig.num_classes)
        kwargs["num_classes"] = len(self.id2label) if self.id2label else kwargs.get("num_labels", given)
        super().__post_init__(**kwargs | {"num_labels": kwargs["num_classes"]})

    def native(self) -> Any:  # noqa: D102
        self.num_classes = self.num_labels  # it may have been set since
        return super().native()

    def follow(self, native: Any) -> None:
        """Take the fields of a ViTConfig; labels keep their names where their number stays. Tell timm of both."""
        super().follow(native)
        self.num_labels = native.num_classes
        names = list((self.id2label or {}).values())
        own = {} if names[:1] == ["LABEL_0"] else {"label_names": names}  # else transformers has made them up
        cfg = getattr(self, "pretrained_cfg", {})
        self.update(folder_config(native, {name: cfg[name] for name in INPUT if name in cfg} | own))


class _NativeModel(PreTrainedModel):
    """A native model's tensors, by the native names, under transformers' interface.

    `native` is the TokenFormerLM or TokenFormerViT. It is no submodule, which would put a prefix before all names: the
    two share their tables of submodules, parameters and buffers, so what happens to one happens to the other.
    """

    config: _NativeConfig
    native_class: ClassVar[Any]
    native: Any
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - no more of a ClassVar than transformers' own

    def __init__(self, config: _NativeConfig) -> None:
        super().__init__(config)
        native = self.native_class(config.native())
        self.__dict__["native"] = native
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = native.__dict__[table]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the native model has initialised itself, and a file that lacks tensors is refused."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the blocks compute their activations again; transformers' `gradient_checkpointing_enable` sets it."""
        return self.native.backbone.checkpoint_activations

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.native.backbone.checkpoint_activations = enable

    def _states(
        self, x: Tensor, rotary: Any, chunks: Sequence[Any], all_of_them: bool | None, attentions: bool | None
    ) -> tuple[Tensor, ...]:
        """Tokens (B, T, D) after the embedding, each block and, normalised, the last one; or only the last ones."""
        if self.config.output_attentions if attentions is None else attentions:
            raise ValueError("output_attentions=True: attention is computed without keeping its weights, leave it out")
        keep = self.config.output_hidden_states if all_of_them is None else all_of_them
        backbone, states = self.native.backbone, []
        for block, chunk in zip(backbone.blocks, chunks, strict=True):
            if keep:
                states.append(x)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, chunk, use_reentrant=False)
            else:
                x = block(x, rotary, chunk)
        return (*states, backbone.norm(x))

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        """Let each layer have the parameter tokens that the file has, then load as transformers does.

        Raises:
            ValueError: for files other than safetensors; for tensors missing, left over or, but for an image
                model's classifier, of another shape.
        """
        if model._hf_peft_config_loaded:  # an adapter, whose file has nothing else
            return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        shapes = _shapes(checkpoint_files) if state_dict is None else {k: v.shape for k, v in state_dict.items()}
        match_shapes(model, shapes)
        info, offloaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        misfits = {name for name, *_ in info.mismatched_keys if not name.startswith("head.")}  # a new one is drawn
        wrong = {"missing": info.missing_keys, "unknown": info.unexpected_keys, "mis-shaped": misfits}
        if listed := [f"{what} tensors: {', '.join(sorted(names))}" for what, names in wrong.items() if names]:
            raise ValueError(f"{model.name_or_path} does not fit its config: {'; '.join(listed)}")
        return info, offloaded

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
    ) -> Any:
        """Write the folder that `tokenformer.from_pretrained` reads too: segments under one norm joined."""
        self.config.follow(present_config(self.native))
        if state_dict is None and not self._hf_peft_config_loaded:  # with an adapter that alone is written
            state_dict = consolidated_state(self.native)
        return super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)


def _shapes(files: Iterable[str | Path]) -> Mapping[str, torch.Size]:
    """Names and shapes of the tensors in safetensors files, from their headers."""
    shapes: dict[str, torch.Size] = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"{path}: only model.safetensors is read; `tokenformer import` makes one of .bin files")
        with safe_open(path, "pt") as file:
            shapes |= {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


class _Chunk:
    """What a block asks of the native :class:`~tokenformer.cache.Chunk`, from a cache of transformers."""

    def __init__(self, cache: Cache | None, layer: int, seen: Tensor | None) -> None:
        self.cache, self.layer, self.seen = cache, layer, seen
        self.project = each

    def extend(self, _: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, K) of the new tokens -> of all, (B, H, S, K)."""
        return (key, value) if self.cache is None else self.cache.update(key, value, self.layer)


class TokenFormerForCausalLM(_NativeModel, GenerationMixin):
    """TokenFormerLM, with labels and `generate`."""

    config_class = TokenFormerConfig
    native_class = TokenFormerLM

    def _init_weights(self, module: nn.Module) -> None:
        """New rows for new tokens, as :meth:`resize_token_embeddings` asks for them; see there for the rest."""
        if isinstance(module, nn.Embedding | nn.Linear) and all(module is not known for known in self.modules()):
            nn.init.normal_(module.weight, std=0.02)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Ids (B, T) -> logits (B, T, V), and the loss where there are labels.

        Args:
            input_ids: ids.
            attention_mask: (B, T), 0 for padding; with a cache (B, S), for all tokens that it then has; or whom each
                token sees, (B, 1, T, S).
            position_ids: (B, T); default: places among the tokens that are no padding. Where they begin again in a row
                without mask and cache, another text begins, which does not see those before it.
            past_key_values: what an earlier call with `use_cache` has returned; the ids go on from there.
            inputs_embeds: embeddings (B, T, D) in place of ids.
            labels: (B, T), the ids again; -100 is ignored, and so is a token that follows on padding. The model shifts
                them by one, as is the custom here.
            use_cache: return a cache.
            logits_to_keep: give the logits of so many last positions only, 0 for all; or of these positions.
            output_hidden_states: return the L + 1 hidden states too, the last one normalised.
            output_attentions: refused.
            kwargs: `num_items_in_batch` for the loss, by which Trainer weights accumulated batches; `shift_labels`.

        Raises:
            ValueError: for both or none of ids and embeddings, a mask of another length, labels with
                `logits_to_keep`, `output_attentions`, a cache with gradient checkpointing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise ValueError(f"logits_to_keep={logits_to_keep}: the loss needs all logits, leave it out")
        x = self.native.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        again = self.gradient_checkpointing and torch.is_grad_enabled()  # a block would write to the cache twice
        if again and past_key_values is not None:
            raise ValueError("past_key_values with gradient checkpointing: leave one of them out")
        if use_cache and past_key_values is None and not again:
            past_key_values = DynamicCache(config=self.config)
        rotary, seen = self._places(x, attention_mask, position_ids, past_key_values)
        chunks: list[_Chunk | None] = [None] * len(self.native.backbone.blocks)
        if seen is not None or past_key_values is not None:
            chunks = [_Chunk(past_key_values, layer, seen) for layer in range(len(chunks))]
        states = self._states(x, rotary, chunks, output_hidden_states, output_attentions)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # -0: all
        logits = F.linear(states[-1][:, kept], self.native.output_weight)
        loss = None
        if labels is not None:
            if attention_mask is not None and attention_mask.shape == labels.shape:
                after_padding = F.pad(attention_mask[:, :-1] == 0, (1, 0))  # (B, T)
                labels = labels.masked_fill(after_padding, -100)
            loss = self.loss_function(logits, labels, self.native.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=states if len(states) > 1 else None,
        )

    def _places(self, x: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None) -> Any:
        """Rotary tables (B or 1, 1, T, R) or None, and which tokens each one sees, (B, 1, T, S); None: those before."""
        past, T = 0 if cache is None else cache.get_seq_length(), x.shape[1]
        if mask is not None and mask.ndim == 2 and mask.shape != (len(x), past + T):
            wanted = (len(x), int(past + T))
            raise ValueError(f"attention_mask of shape {tuple(mask.shape)}: must be {wanted}, all tokens so far")
        seen = create_causal_mask(self.config, x, mask, past_key_values=cache, position_ids=position_ids)
        if seen is None and cache is not None and T == 1:  # it sees all, and not the first alone as is_causal would
            seen = torch.ones(1, 1, 1, int(past) + 1, dtype=torch.bool, device=x.device)
        if not self.native.backbone.rotary_dim:
            return None, seen
        if position_ids is None and mask is not None and mask.ndim == 2:
            position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
        elif position_ids is None:
            position_ids = past + torch.arange(T, device=x.device).unsqueeze(0)
        cos, sin = rotary_tables_at(position_ids, self.native.backbone.rotary_dim)
        return (cos.unsqueeze(1), sin.unsqueeze(1)), seen

    def get_input_embeddings(self) -> nn.Module:  # noqa: D102
        return self.native.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:  # noqa: D102
        self.native.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The output matrix where it is one of its own."""
        return self.native.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:  # noqa: D102
        self.native.lm_head = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; rows of padding (`vocab_multiple`) are dropped, so that all new rows are drawn."""
        native = self.native
        if new_num_tokens is not None:
            for matrix, count in ((native.embedding, "num_embeddings"), (native.lm_head, "out_features")):
                if matrix is not None:
                    matrix.weight = nn.Parameter(matrix.weight[: native.config.vocab_size].detach().clone())
                    setattr(matrix, count, len(matrix.weight))
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None:
            native.config = replace(native.config, vocab_size=len(embedding.weight), vocab_multiple=1)
            self.config.follow(native.config)
        return embedding


class TokenFormerForImageClassification(_NativeModel):
    """TokenFormerViT, with labels."""

    config_class = TokenFormerViTConfig
    native_class = TokenFormerViT
    main_input_name = "pixel_values"

    def _init_weights(self, module: nn.Module) -> None:
        """What is not in a file: position embeddings that are computed, a new classifier for other classes."""
        if module is self and self.config.position == "sincos":
            like = self.native.patch_embed.proj.weight
            self.native.position = _sincos(self.config.native()).to(like.device, like.dtype)
        if module is self.native.head and isinstance(module, nn.Linear):  # with `ignore_mismatched_sizes`
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:  # noqa: D102
        return self.native.patch_embed

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Any:
        """Images (B, 3, H, W) -> logits (B, C).

        Args:
            pixel_values: images.
            labels: (B), for the loss; cross-entropy, unless the config's `problem_type` says another.
            output_hidden_states: return the L + 1 hidden states (B, T, D) too, the last one normalised.
            output_attentions: refused.

        Raises:
            ValueError: for `output_attentions`.
        """
        native, x = self.native, self.native._embed(pixel_values)
        rotary = rotary_tables(x.shape[1], native.backbone.rotary_dim, x.device) if native.backbone.rotary_dim else None
        chunks = [None] * len(native.backbone.blocks)
        states = self._states(x, rotary, chunks, output_hidden_states, output_attentions)
        logits = native.forward_head(states[-1])
        loss = None if labels is None else self.loss_function(labels, logits.float(), self.config)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states if len(states) > 1 else None)


AutoConfig.register(TokenFormerConfig.model_type, TokenFormerConfig)
AutoConfig.register(TokenFormerViTConfig.model_type, TokenFormerViTConfig)
AutoModelForCausalLM.register(TokenFormerConfig, TokenFormerForCausalLM)
# To the bit what evaluation does; of a folder whose config.json has a `pretrained_cfg`, transformers reads that.
AutoImageProcessor.register(TokenFormerViTConfig, fast_image_processor_class=TimmWrapperImageProcessor)
AutoModelForImageClassification.register(TokenFormerViTConfig, TokenFormerForImageClassification)
