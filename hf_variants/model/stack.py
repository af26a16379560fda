"""How large a stack is, which kinds of layers it has, and what is dropped in training."""

from .axis import LIST_OF_LAYERS, PER_LAYER, TRAINING, Axis, Check, Idle, VariantConfigError, axis, setting


LAYER_TYPE_LETTERS = {"F": "full_attention", "S": "sliding_attention"}


@axis
class SizeAxis(Axis):
    """
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads (`int`): as everywhere in transformers.
    intermediate_size (`int`): width of the feed-forward network; derived as 4 d, or 8/3 d when gated, rounded up
        to a multiple of 64.
    num_key_value_heads (`int`): key/value heads: all (MHA), some (GQA, https://arxiv.org/abs/2305.13245), or one
        (MQA, https://arxiv.org/abs/1911.02150).
    head_dim (`int`): width of one head; need not be `hidden_size / num_attention_heads`.
    max_position_embeddings (`int`): trained context length; the size of a learned or sinusoidal table.
    """

    title = "size"

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int | None = setting(None, PER_LAYER)
    num_hidden_layers: int = 12
    num_attention_heads: int = setting(12, PER_LAYER)
    num_key_value_heads: int | None = setting(None, PER_LAYER)
    head_dim: int | None = setting(None, PER_LAYER)
    max_position_embeddings: int = 2048

    def derive(self) -> None:
        # Left unset where the division leaves a remainder, which validation reports.
        if self.head_dim is None and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            width = 8 * self.hidden_size / 3 if self.ffn_type == "glu" else 4 * self.hidden_size
            self.intermediate_size = -(-int(width) // 64) * 64

    def checks(self) -> list[Check]:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        sizes = {name: getattr(self, name) for name in (*SizeAxis.__dataclass_fields__, "embedding_size")}
        return [
            *(
                Check(value is not None and value < 1, f"`{name}` is {value}.", f"Set `{name}` to at least 1.")
                for name, value in sizes.items()
            ),
            Check(
                self.head_dim is None and heads > 0,
                f"`hidden_size` {self.hidden_size} is not a multiple of `num_attention_heads` {heads}.",
                "Set `head_dim` explicitly, or change one of the two.",
            ),
            Check(
                bool(kv_heads) and kv_heads > 0 and heads % kv_heads != 0,
                f"`num_attention_heads` {heads} is not a multiple of `num_key_value_heads` {kv_heads}.",
                "Choose a number of key/value heads that divides the heads.",
            ),
        ]


@axis
class LayersAxis(Axis):
    """
    layer_types (`list[str]` or `str`): `"full_attention"` / `"sliding_attention"` for every layer, or a pattern of
        the letters F and S that is repeated over the depth, such as `"SSSF"`.
    sliding_window (`int`): keys a sliding layer sees, the current one included; in an encoder, keys up to
        `sliding_window` positions away on either side.
    per_layer_config (`dict`): transformers' own per-layer overrides, of the fields in `per_layer_fields()`, such as
        `{1: {"num_key_value_heads": 1}, 3: {"skip": ["mlp"]}}`.
    """

    title = "layers"

    layer_types: list[str] | str | None = setting(None, LIST_OF_LAYERS)
    sliding_window: int | None = None

    def derive(self) -> None:
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        elif isinstance(self.layer_types, str):
            self.layer_types = self._expand_layer_pattern(self.layer_types)

    def _expand_layer_pattern(self, pattern: str) -> list[str]:
        """`"SSSF"` -> three sliding layers and a full one, repeated over the depth."""
        if not pattern or set(pattern.upper()) - set(LAYER_TYPE_LETTERS):
            raise VariantConfigError(
                f"`layer_types` is the pattern {pattern!r}, which is not made of the letters F (full) and S "
                '(sliding). Write for example "SSSF", or a list with one layer type per layer.'
            )
        letters = pattern.upper()
        return [LAYER_TYPE_LETTERS[letters[i % len(letters)]] for i in range(self.num_hidden_layers)]

    def checks(self) -> list[Check]:
        skip, parallel = getattr(self, "skip", ()), self.parallel_block != "none"
        return [
            Check(
                "sliding_attention" in self.layer_types and not self.sliding_window,
                "`layer_types` has sliding layers, but `sliding_window` is not set.",
                "Set `sliding_window`, or make every layer full_attention.",
            ),
            Check(
                self.sliding_window is not None and self.sliding_window < 1,
                f"`sliding_window` is {self.sliding_window}.",
                "Set it to at least 1, or to None.",
            ),
            Check(
                self.is_causal and self.sliding_window == 1,
                "`sliding_window` is 1, which transformers' caches cannot hold: they keep one key less than that.",
                "Set it to at least 2.",
            ),
            Check(
                bool(set(self.layer_types) - set(LAYER_TYPE_LETTERS.values())),
                f"`layer_types` has {sorted(set(self.layer_types) - set(LAYER_TYPE_LETTERS.values()))}.",
                "A dense stack has full_attention and sliding_attention layers only.",
            ),
            Check(
                len(self.layer_types) != self.num_hidden_layers,
                f"`layer_types` has {len(self.layer_types)} entries for {self.num_hidden_layers} layers.",
                "Give one per layer, or a pattern such as 'SSSF'.",
            ),
            Check(
                bool(skip) and (parallel or self.add_cross_attention),
                "`per_layer_config` skips a sublayer of a layer with `parallel_block` or `add_cross_attention`.",
                "Skip sublayers only where self-attention and the FFN follow each other and nothing else is there.",
            ),
        ]

    def idle(self) -> list[Idle]:
        return [Idle("sliding_attention" not in self.layer_types, ["sliding_window"], "no layer is sliding_attention")]


@axis
class RegularisationAxis(Axis):
    """
    attention_dropout, residual_dropout, embedding_dropout, activation_dropout, layerdrop, classifier_dropout
        (`float`): probabilities.
    attention_residual_dropout, ffn_residual_dropout (`bool`): `residual_dropout` applies to the attention's branch
        (DistilBERT: no; `float`: with a probability of its own, Falcon); to the FFN's (XLM-RoBERTa-XL: no).
    dropout_after_sum (`bool`): in a parallel block, to the sum of the branches (Falcon) instead of each.
    final_dropout (`float`): after the final norm (T5).
    token_classifier_dropout, qa_dropout, choice_dropout (`float`): before the heads on every token, and before the one
        that chooses among sequences; default: `classifier_dropout`.
    """

    title = "regularisation"

    attention_dropout: int | float = setting(0.0, PER_LAYER, TRAINING)
    residual_dropout: int | float = setting(0.0, PER_LAYER, TRAINING)
    attention_residual_dropout: bool | float = setting(True, PER_LAYER, TRAINING)
    ffn_residual_dropout: bool = setting(True, PER_LAYER, TRAINING)
    dropout_after_sum: bool = setting(False, PER_LAYER, TRAINING)
    embedding_dropout: int | float = setting(0.0, TRAINING)
    activation_dropout: int | float = setting(0.0, PER_LAYER, TRAINING)
    final_dropout: int | float = setting(0.0, TRAINING)
    layerdrop: int | float = setting(0.0, TRAINING)
    classifier_dropout: int | float = setting(0.0, TRAINING)
    token_classifier_dropout: int | float | None = setting(None, TRAINING)
    qa_dropout: int | float | None = setting(None, TRAINING)
    choice_dropout: int | float | None = setting(None, TRAINING)

    def derive(self) -> None:
        for name in ("token_classifier_dropout", "qa_dropout", "choice_dropout"):
            if getattr(self, name) is None:
                setattr(self, name, self.classifier_dropout)

    def checks(self) -> list[Check]:
        values = {
            name: getattr(self, name)
            for name, entry in RegularisationAxis.__dataclass_fields__.items()
            if entry.type is not bool
        }
        return [
            Check(
                value is not True and not 0.0 <= value < 1.0,
                f"`{name}` is {value}, not a probability.",
                f"Set `{name}` to at least 0 and below 1.",
            )
            for name, value in values.items()
        ]

    def idle(self) -> list[Idle]:
        no_dropout, because = not self.residual_dropout, "`residual_dropout` is 0"
        switch = isinstance(self.attention_residual_dropout, bool)
        return [
            Idle(no_dropout and switch, ["attention_residual_dropout"], because),
            Idle(no_dropout, ["ffn_residual_dropout", "dropout_after_sum"], because),
            Idle(self.parallel_block == "none", ["dropout_after_sum"], "`parallel_block` is none"),
        ]
