"""The models under transformers' interface (extra `hf`). `import tokenformer.hf` registers them; nothing else does.

    >>> import tokenformer.hf
    >>> model = AutoModelForCausalLM.from_pretrained(DIR)  # a folder that `tokenformer export` wrote
    >>> AutoTokenizer.from_pretrained(DIR), AutoModelForImageClassification.from_pretrained(DIR)

Registration is a line of its own because transformers takes seconds to import, and `import tokenformer` should not.

One file: transformers wants config, weights, cache and both models by the same rules.

B batch, T sequence, V vocabulary, C classes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from tokenformer.cache import KVCache
from tokenformer.config import LMConfig, ViTConfig
from tokenformer.interop import consolidated_state, present_config
from tokenformer.language import TokenFormerLM
from tokenformer.pattention import Pattention
from tokenformer.timm_models import INPUT, folder_config
from tokenformer.vision import TokenFormerViT, _sincos

try:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        TimmWrapperImageProcessor,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast, ImageClassifierOutput
except ImportError as error:
    raise ImportError(f"tokenformer.hf needs transformers 5: pip install 'tokenformer[hf]' ({error})") from error


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
    attribute_map = _NativeConfig.attribute_map | {"max_position_embeddings": "max_seq_len"}


class TokenFormerViTConfig(_NativeConfig):
    """ViTConfig, with as many labels as classes."""

    model_type = "tokenformer_vit"
    native_class = ViTConfig
    attribute_map = _NativeConfig.attribute_map | {"num_channels": "in_channels"}

    def __post_init__(self, **kwargs: Any) -> None:
        given = kwargs.get("num_classes", ViTConfig.num_classes)
        kwargs["num_classes"] = len(self.id2label) if self.id2label else kwargs.get("num_labels", given)
        super().__post_init__(**kwargs | {"num_labels": kwargs["num_classes"]})

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
    _supports_sdpa = True

    def __init__(self, config: _NativeConfig) -> None:
        super().__init__(config)
        native = self.native_class(config.native())
        self.__dict__["native"] = native
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = native.__dict__[table]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the native model has initialised itself, and a file that lacks tensors is refused."""

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        """Let each layer have the parameter tokens that the file has, then load as transformers does.

        Raises:
            ValueError: for files other than safetensors; for tensors missing, left over or, but for an image
                model's classifier, of another shape.
        """
        shapes = _shapes(checkpoint_files) if state_dict is None else {k: v.shape for k, v in state_dict.items()}
        for name, layer in model.named_modules():
            if isinstance(layer, Pattention):
                layer.match(shapes, f"{name}.")
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
        state_dict = consolidated_state(self.native) if state_dict is None else state_dict
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


class _Cache(KVCache):
    """The native cache, with what beam search asks of one."""

    def reorder_cache(self, rows: Tensor) -> None:
        """Let row i be what row `rows[i]` is, (B,)."""
        self.keep(rows.tolist())


class TokenFormerForCausalLM(_NativeModel, GenerationMixin):
    """TokenFormerLM, with labels and `generate`, which keeps keys and values in the native cache."""

    config_class = TokenFormerConfig
    native_class = TokenFormerLM

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> Any:
        """Ids (B, T) -> logits (B, T, V), and the loss where there are labels.

        Args:
            input_ids: ids.
            attention_mask: (B, T), 0 for padding, which may be on the left or on the right of a row.
            labels: (B, T), the ids again; -100 is ignored. The model shifts them by one, as is the custom here.
            past_key_values: what an earlier call with `use_cache` has returned; the ids go on from there.
            use_cache: return a cache. Padding then is on the left only, where the text does not go on.
            logits_to_keep: give the logits of so many last positions only, 0 for all.
            return_dict: false for a tuple.

        Raises:
            ValueError: for padding where it can't be, labels with `logits_to_keep`, another library's cache.
        """
        if labels is not None and logits_to_keep:
            raise ValueError(f"logits_to_keep={logits_to_keep}: the loss needs all logits, leave it out")
        if past_key_values is not None and not isinstance(past_key_values, KVCache):
            kind = type(past_key_values).__name__
            raise ValueError(f"past_key_values is a {kind}: TokenFormer has a cache of its own, leave it out")
        cache: Any = past_key_values
        if cache is None and use_cache:
            cache = _Cache(len(input_ids), self.native.config.max_seq_len)
        hidden = self._hidden(input_ids, attention_mask, cache)
        logits = F.linear(hidden[:, -logits_to_keep:], self.native.output_weight)  # -0: all
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _hidden(self, input_ids: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """Final hidden states (B, T, D); padding on the right needs no mask, a causal model does not see it."""
        if mask is None or (cache is not None and max(cache.lengths)):
            return self.native.hidden(input_ids, cache)
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)}: must be {tuple(input_ids.shape)} as the ids"
            )
        if cache is not None and not bool(mask[:, -1].all()):
            raise ValueError("attention_mask has padding on the right, where the text is to go on: pad on the left")
        to_the_right, back = _turns(mask)
        if bool((to_the_right[:, 0] == 0).all()):
            return self.native.hidden(input_ids, cache)  # the same bits as without a mask
        hidden = self.native.hidden(input_ids.gather(1, to_the_right), cache)
        if cache is not None:
            cache.lengths = mask.ne(0).sum(1).tolist()  # the padding, now on the right, is written over
        return hidden.gather(1, back.unsqueeze(-1).expand_as(hidden))

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> dict[str, Any]:
        """All ids for the first step or without a cache, then the last ones."""
        return {
            "input_ids": input_ids if past_key_values is None else input_ids[:, -1:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:  # noqa: D102
        return self.native.embedding

    def get_output_embeddings(self) -> nn.Module | None:  # noqa: D102
        return self.native.lm_head

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError("the vocabulary of a TokenFormer is set by vocab_size when it is built; it can't be resized")


def _turns(mask: Tensor) -> tuple[Tensor, Tensor]:
    """From where each place of a row takes its token so that padding comes right, and the way back; both (B, T).

    Attention and rotary positions then are those of the row without padding.
    """
    length = mask.shape[1]
    places = torch.arange(length, device=mask.device)
    tokens = (mask != 0).int()
    first = tokens.argmax(1, keepdim=True)  # (B, 1)
    to_the_right = (places + first) % length
    edges = tokens.gather(1, to_the_right).diff(dim=1).abs().sum(1)  # between tokens and padding, in each row
    if bool((edges > 1).any()):
        raise ValueError("attention_mask has padding between tokens: it may be left or right of them, not between")
    return to_the_right, (places - first) % length


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

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None) -> Any:
        """Images (B, 3, H, W) -> logits (B, C), and the cross-entropy where there are labels (B)."""
        logits = self.native(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


AutoConfig.register(TokenFormerConfig.model_type, TokenFormerConfig)
AutoConfig.register(TokenFormerViTConfig.model_type, TokenFormerViTConfig)
AutoModelForCausalLM.register(TokenFormerConfig, TokenFormerForCausalLM)
# To the bit what evaluation does; of a folder whose config.json has a `pretrained_cfg`, transformers reads that.
AutoImageProcessor.register(TokenFormerViTConfig, fast_image_processor_class=TimmWrapperImageProcessor)
AutoModelForImageClassification.register(TokenFormerViTConfig, TokenFormerForImageClassification)
