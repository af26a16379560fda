"""The configuration of an encoder-decoder: two stacks, each free to differ from the other."""

# First, so that a transformers too old for what follows is refused in words.
from .versions import MINIMUM  # noqa: F401


# isort: split
import copy
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .axis import Check, VariantConfigError, quote, refuse
from .config_overrides import FRAMEWORK_KEYS, ConstructorRules
from .configuration_variant import FIELDS, VariantConfig


logger = logging.get_logger(__name__)


# Read from the decoder, so that tools which look at the top of a config find what they expect.
DECODER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@strict
class VariantSeq2SeqConfig(ConstructorRules, PreTrainedConfig):
    r"""
    Configuration of an encoder-decoder Transformer.

    Args:
        encoder (`VariantConfig` or `dict`): the encoder's stack; `is_causal` is set to `False`.
        decoder (`VariantConfig` or `dict`): the decoder's stack; `add_cross_attention` is set to `True` and
            `cross_attention_hidden_size` to the encoder's width. Its head fields (`logit_scale`, `lm_head_bias`,
            `z_loss_coefficient`, ...) describe the language-modelling head.
        share_embeddings (`bool`): encoder and decoder use one token embedding.
        tie_word_embeddings (`bool`): the LM head uses the decoder's token embedding.
        one_vocabulary (`bool`): the stacks have tables of their own for the same tokens, which
            `resize_token_embeddings` resizes together (T5Gemma); otherwise they are two vocabularies (Marian).
        unread_shared_embedding (`bool`): a third embedding that is stored beside the stacks' own and enters nothing
            (BART without ties).
        final_logits_bias (`bool`): a bias on the logits that is stored but not trained (BART, Marian).
        label_shift (`str`): how labels become decoder inputs: behind `decoder_start_token_id` (`"start_token"`), or
            behind their own last token (`"last_token"`, mBART's language codes).
        decoder_inputs_from_source (`bool`): where there are neither decoder inputs nor labels, they are the source's
            tokens, shifted in that way (BART).
        labels_disable_cache (`bool`): a pass with labels makes no cache, whatever `use_cache` says (BART). A cache
            lays keys and values out anew, so that the loss of a pass with one may round differently.
        decoder_start_token_id, forced_bos_token_id, forced_eos_token_id (`int`): also in the generation config.
        argument_order (`dict`): class -> the names of the arguments that its forward takes by place, with commas between
            them, where a stock class has another order; `None`: that of the signature.

    DeepNorm's alpha and beta depend on both depths; where a stack uses it and leaves them unset, they are derived as
    in table 1 of https://arxiv.org/abs/2203.00555.
    """

    model_type = "hf_variant_seq2seq"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # Refused, where they differ from the decoder's.
    other_arguments = DECODER_FIELDS
    sub_configs = {"encoder": VariantConfig, "decoder": VariantConfig}

    encoder: VariantConfig | dict | None = None
    decoder: VariantConfig | dict | None = None
    share_embeddings: bool = True
    tie_word_embeddings: bool = True
    one_vocabulary: bool = False
    unread_shared_embedding: bool = False
    final_logits_bias: bool = False
    label_shift: Literal["start_token", "last_token"] = "start_token"
    decoder_inputs_from_source: bool = False
    labels_disable_cache: bool = False
    decoder_start_token_id: int | None = None
    is_encoder_decoder: bool = True
    use_cache: bool = True
    initializer_range: int | float = 0.02
    argument_order: dict[str, str] | None = None
    native_leftovers: dict | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        encoder, decoder = self._as_dict(self.encoder), self._as_dict(self.decoder)
        for stack in (encoder, decoder):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                stack.setdefault(name, getattr(self, name))
        self._derive_deepnorm(encoder, decoder)
        self.encoder = VariantConfig(**{**encoder, "is_causal": False})
        self.decoder = VariantConfig(
            **{**decoder, "add_cross_attention": True, "cross_attention_hidden_size": self.encoder.hidden_size}
        )
        self._refuse_other_values(kwargs)
        self.refuse_near_misses(kwargs)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @classmethod
    def refuse_near_misses(cls, unknown: dict) -> None:
        """Refuse a field of a stack beside the stacks, or what looks like one: it would be stored and never read."""
        unknown = {name: value for name, value in unknown.items() if not hasattr(cls, name)}
        if of_stacks := {name for name in unknown if cls.is_of_stacks(name)}:
            raise VariantConfigError(
                f"{quote(sorted(of_stacks))}: no field of an encoder-decoder, but of its stacks. "
                "Set it in `encoder` or `decoder`."
            )
        VariantConfig.refuse_near_misses(unknown, beside=cls.__dataclass_fields__)

    @classmethod
    def without_derived(cls, saved: dict) -> dict:
        """Without what the whole derives: sizes read from the decoder, and DeepNorm's constants."""
        stacks = {name: dict(saved[name]) for name in cls.sub_configs if name in saved}
        bare = {name: {**fields, "deepnorm_alpha": None, "deepnorm_beta": None} for name, fields in stacks.items()}
        if len(bare) == len(cls.sub_configs):
            derived = copy.deepcopy(bare)
            cls._derive_deepnorm(**derived)
            stacks = {name: bare[name] if derived[name] == stacks[name] else stacks[name] for name in stacks}
        return {name: value for name, value in saved.items() if name not in DECODER_FIELDS} | stacks

    @classmethod
    def complete_overrides(cls, saved: dict, overrides: dict) -> dict:
        """A dictionary for a stack overrides fields of it."""
        return {
            name: VariantConfig.overridden(saved[name], value)
            if name in cls.sub_configs and isinstance(value, dict) and saved.get(name)
            else value
            for name, value in overrides.items()
        }

    def _refuse_other_values(self, kwargs: dict) -> None:
        """A saved config repeats what it reads from the decoder; a repeated value that differs would never be read."""
        sentences = [
            f"`{name}` is {kwargs[name]} but the decoder's is {getattr(self.decoder, name)}. Set it in `decoder`."
            for name in DECODER_FIELDS
            if kwargs.get(name) is not None and kwargs[name] != getattr(self.decoder, name)
        ]
        if sentences:
            raise VariantConfigError(" ".join(sentences))
        for name in DECODER_FIELDS:
            kwargs.pop(name, None)

    def to_dict(self) -> dict:
        """
        As in transformers, with the decoder's sizes at the top, where PEFT and other tools look for them, and without
        fields of a stack that were assigned beside the stacks.
        """
        alike = {name for name in DECODER_FIELDS if not self.decoder.is_heterogeneous_in(name)}
        saved = {name: value for name, value in super().to_dict().items() if not self.is_of_stacks(name)}
        return saved | {name: getattr(self.decoder, name) for name in DECODER_FIELDS if name in alike}

    def __setattr__(self, name: str, value: Any) -> None:
        """As in transformers; what is read from the decoder is written to it, and a shared table's size to both stacks."""
        if name in DECODER_FIELDS and isinstance(vars(self).get("decoder"), PreTrainedConfig):
            setattr(self.decoder, name, value)
            if name in ("vocab_size", "hidden_size") and self.share_embeddings:
                setattr(self.encoder, name, value)
                self.decoder.cross_attention_hidden_size = self.encoder.hidden_size
            return
        if self.is_of_stacks(name):
            logger.warning_once(
                f"`{name}`: no field of an encoder-decoder, but of its stacks; neither read nor saved. "
                "Set it on `encoder` or `decoder`."
            )
        super().__setattr__(name, value)

    @classmethod
    def is_of_stacks(cls, name: str) -> bool:
        """Whether this is a field of a stack that the whole has no meaning for."""
        return name in FIELDS and name not in FRAMEWORK_KEYS and not hasattr(cls, name)

    @staticmethod
    def _as_dict(stack: VariantConfig | dict | None) -> dict:
        fields = stack.to_dict() if isinstance(stack, PreTrainedConfig) else dict(stack or {})
        fields.pop("model_type", None)
        return fields

    @staticmethod
    def _derive_deepnorm(encoder: dict, decoder: dict) -> None:
        defaults = VariantConfig.__dataclass_fields__
        n = encoder.get("num_hidden_layers", defaults["num_hidden_layers"].default)
        m = decoder.get("num_hidden_layers", defaults["num_hidden_layers"].default)
        for stack, alpha, beta in (
            (encoder, 0.81 * (n**4 * m) ** (1 / 16), 0.87 * (n**4 * m) ** (-1 / 16)),
            (decoder, (3 * m) ** 0.25, (12 * m) ** -0.25),
        ):
            if stack.get("norm_placement") == "deepnorm":
                stack["deepnorm_alpha"] = alpha if stack.get("deepnorm_alpha") is None else stack["deepnorm_alpha"]
                stack["deepnorm_beta"] = beta if stack.get("deepnorm_beta") is None else stack["deepnorm_beta"]

    def __getattr__(self, name: str):
        # Only reached for what is not set here. Before construction is over there is no decoder to ask.
        if name in DECODER_FIELDS and isinstance(self.__dict__.get("decoder"), PreTrainedConfig):
            return getattr(self.__dict__["decoder"], name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    @property
    def eager_by_default(self) -> bool:
        """Whether either stack runs eager attention where no implementation is asked for."""
        return self.encoder.eager_by_default or self.decoder.eager_by_default

    def unsupported_attention_features(self, implementation: str) -> list[str]:
        """The fields of either stack that an attention implementation would ignore or refuse."""
        return [
            f"{name}.{field}"
            for name, stack in (("encoder", self.encoder), ("decoder", self.decoder))
            for field in stack.unsupported_attention_features(implementation)
        ]

    def validate_architecture(self):
        """Report every inconsistency between the stacks at once; each stack has reported its own."""
        same_table = (self.encoder.vocab_size, self.encoder.embedding_size) == (
            self.decoder.vocab_size,
            self.decoder.embedding_size,
        )
        rows = [
            Check(
                self.share_embeddings and not same_table,
                "`share_embeddings` is set, but the stacks differ in `vocab_size` or `embedding_size`.",
                "Set `share_embeddings=False`, or make both equal.",
            ),
            Check(
                self.share_embeddings and self.unread_shared_embedding,
                "`unread_shared_embedding` is set, but with `share_embeddings` the shared embedding is read.",
                "Use one of the two.",
            ),
            Check(
                self.tie_word_embeddings
                and self.decoder.embedding_size != self.decoder.hidden_size
                and not self.decoder.output_projection
                and not self.decoder.lm_head_transform,
                "`tie_word_embeddings` is set, but the decoder's `embedding_size` differs from its `hidden_size`.",
                "Set `tie_word_embeddings=False`, or `output_projection=True` on the decoder.",
            ),
            Check(
                self.encoder.add_cross_attention,
                "The encoder has `add_cross_attention`.",
                "Only the decoder attends to the other stack; leave it unset.",
            ),
            Check(
                not self.decoder.is_causal,
                "The decoder has `is_causal=False`.",
                "A decoder that generates must be causal; leave it unset.",
            ),
            Check(
                self.encoder.output_projection,
                "The encoder has `output_projection`.",
                "It stands before an LM head; set it on the decoder.",
            ),
        ]
        refuse(rows)


__all__ = ["VariantSeq2SeqConfig"]
