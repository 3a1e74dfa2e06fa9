"""What the model configurations share: the way from and to a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field

from ldm_cli.config import Config

Size = Annotated[int, Field(ge=1, le=2**20)]
Depth = Annotated[int, Field(ge=1, le=1000)]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]


def list_of(element: object, value: object) -> BeforeValidator:
    """Reads a list that holds nothing but `element` as `value`, which means the same."""
    return BeforeValidator(
        lambda found: value if isinstance(found, list | tuple) and found and all(e == element for e in found) else found
    )


def plain_blocks(first: str, middle: str, last: str) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """A default for one block type per level: `first`, `middle` as often as it takes, `last`; `middle` for one level.

    The field must come after `block_out_channels`, which says how many levels there are.
    """

    def types(found: dict[str, Any]) -> tuple[Any, ...]:
        levels = len(found.get("block_out_channels", ()))
        return (first, *[middle] * (levels - 2), last) if levels > 1 else (middle,) * levels

    return types


# Library versions whose key sets the written files follow; readers only ever use them in messages.
DIFFUSERS_VERSION = "0.42.1"

# Keys that diffusers' EMAModel adds to the config.json of the weights it saves.
_EMA_BOOKKEEPING = frozenset(
    {
        *("collected_params", "decay", "inv_gamma", "min_decay", "optimization_step", "power"),
        *("update_after_step", "use_ema_warmup"),
    }
)
# Keys that transformers' base class writes into every config.json and that change nothing a CLIP computes.
_TRANSFORMERS_BOOKKEEPING = frozenset(
    {
        *("add_cross_attention", "architectures", "attention_dropout", "bad_words_ids", "begin_suppress_tokens"),
        *("bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id"),
        *("diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping", "encoder_no_repeat_ngram_size"),
        *("eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id"),
        *("forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_factor", "initializer_range"),
        *("is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length"),
        *("name_or_path", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels"),
        *("num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id"),
        *("prefix", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict"),
        *("return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature"),
        *("tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p"),
        *("torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache"),
    }
)


class DiffusersConfig(Config):
    """A configuration that is a diffusers config.json: same keys, same defaults, same meaning."""

    hugging_face_class: ClassVar[str]

    @classmethod
    def from_hugging_face(cls, mapping: Mapping[str, Any]) -> Self:
        """Read a diffusers config.json; keys that begin with `_`, and those of its EMAModel, change nothing.

        As in diffusers, null stands for false.

        Raises:
            ValueError: the file is of another class.
            pydantic.ValidationError: unknown keys and values that are not implemented, one entry each.
        """
        found = mapping.get("_class_name", mapping.get("model_type", cls.hugging_face_class))
        if found != cls.hugging_face_class:
            raise ValueError(f"it is of class {found!r}, expected {cls.hugging_face_class!r}")
        switches = {name for name, field in cls.model_fields.items() if isinstance(field.default, bool)}
        return cls.from_mapping(
            {
                name: False if value is None and name in switches else value
                for name, value in mapping.items()
                if not (name.startswith("_") or name in _EMA_BOOKKEEPING)
            }
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The complete config.json that diffusers would write for this model."""
        return {"_class_name": self.hugging_face_class, "_diffusers_version": DIFFUSERS_VERSION, **self.to_mapping()}


class TransformersConfig(Config):
    """A configuration that is a transformers config.json: same keys, same defaults, same meaning."""

    hugging_face_class: ClassVar[str]

    @classmethod
    def from_hugging_face(cls, mapping: Mapping[str, Any]) -> Self:
        """Read a transformers config.json; the keys that every transformers config carries are left out.

        Raises:
            pydantic.ValidationError: unknown keys and values that are not implemented, one entry each.
        """
        return cls.from_mapping(without_bookkeeping(cls, mapping))

    def to_hugging_face(self, dtype: str = "float32") -> dict[str, Any]:
        """The config.json of this model; `dtype` under both names, for transformers 4 and 5."""
        return {"architectures": [self.hugging_face_class], **self.to_mapping(), "torch_dtype": dtype, "dtype": dtype}


def without_bookkeeping(config_class: type[Config], mapping: Mapping[str, Any]) -> dict[str, Any]:
    """`mapping` without transformers' bookkeeping, except what `config_class` declares as a field of its own.

    A tower without projection may say `projection_dim: null`, which is dropped.

    Raises:
        ValueError: the file is of a diffusers model; or a key that is normally without effect has one here
            (`pruned_heads` not empty).
    """
    if "_class_name" in mapping:
        raise ValueError(f"this is the config.json of {mapping['_class_name']!r}, a model of another kind")
    if mapping.get("pruned_heads"):
        raise ValueError(f"pruned_heads={mapping['pruned_heads']!r} is not supported; expected none")
    return {
        name: value
        for name, value in mapping.items()
        if (name, value) != ("projection_dim", None)
        and (
            name in config_class.model_fields
            or not (name.startswith("_") or name in _TRANSFORMERS_BOOKKEEPING or name == "pruned_heads")
        )
    }
