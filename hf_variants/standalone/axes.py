"""What the templates ask of one stack: every axis of its config resolved to words, flags and expressions."""

import itertools
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig

from ..model.axis import quote
from ..model.builder import NORM_SLOTS, build_cache_limit, position_limit
from ..model.configuration_variant import FIELDS
from ..model.feed_forward import LEARNED_ACTIVATIONS
from ..model.normalization import NORM_KINDS


class NotStandalone(ValueError):
    """A variant that cannot be written as one file; the message names the fields and the way out."""

    def __init__(self, what: str):
        super().__init__(f"{what}. Use `hf-variants bundle`, which writes any variant with the package's own files.")


class Reader:
    """A config that remembers which of its fields were read."""

    def __init__(self, config: PreTrainedConfig):
        self._config = config
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._config, name)


class Stack:
    """
    One stack as the templates see it.

    Args:
        config: of the variant, or of one of its stacks.
        prefix: of its classes, such as `"Foo"` or `"FooDecoder"`.
        name: prefix of what all stacks share.
        norms: classes of norms that the file has so far, by name; grows.
        in_seq2seq: one of two stacks.
        head: end of the name of the class with a head.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        prefix: str,
        name: str,
        norms: dict[str, dict],
        in_seq2seq: bool = False,
        head: str = "",
    ):
        # The stack's own config, and the one that is read: where layers differ, the first layer's.
        self.whole, self.config = config, config.per_layer_config[0] if config.is_heterogeneous else config
        self.skipped = list(getattr(self.config, "skip", ()))
        self.prefix = prefix
        self.config_class = f"{prefix}Config"
        self.name = name
        self.norms = norms
        self.seq2seq = in_seq2seq
        self.head = head
        # One class of self-attention, or of biases by distance, serves both stacks, and is told whether it is causal.
        self.joint = self.joint_bias = False
        c = self.reader = Reader(self.config)
        self.is_causal = c.is_causal
        self._norm_axes()
        self._attention_axes()
        self._position_axes()
        self._block_axes()
        self._embedding_axes()
        self._head_axes()
        self._classifier_axes()
        # What `write_layers` fills in: class names, which classes read a layer's own sizes, and their source.
        self.names: dict[str, str] = {}
        self.sized: set[str] = set()
        self.definitions: dict[str, str] = {}
        self._views(prefix, name, norms, in_seq2seq, head)

    # Layers that differ

    def _views(self, *arguments: Any) -> None:
        """One stack for every kind of layer, as if all layers were of it; `view_of` has a layer's."""
        self.views, self.view_of, self.differing = [self], [0] * self.whole.num_hidden_layers, []
        self.head_sizes = False
        if not self.whole.is_heterogeneous:
            return
        layers = list(self.whole.per_layer_config)
        fields = ["skip", *(name for name in FIELDS if name in self.whole.per_layer_fields())]
        kinds = [[str(getattr(layer, name, [])) for name in fields] for layer in layers]
        of_stack = [str(vars(self.whole).get(name, [])) for name in fields]
        self.differing = [name for name, *values in zip(fields, of_stack, *kinds) if len(set(values)) > 1]
        # Whether heads of different sizes are turned.
        self.head_sizes = "head_dim" in self.differing and self.rotary
        if self.head_sizes and (len(self.tables) > 1 or self.rope_table_in_checkpoint):
            raise NotStandalone("`per_layer_config` changes `head_dim` under several tables of rotary positions")
        first = [kinds.index(kind) for kind in kinds]
        distinct = list(dict.fromkeys(first))
        self.views += [Stack(layers[i], *arguments) for i in distinct[1:]]
        self.view_of = [distinct.index(i) for i in first]
        if any(view.grouped for view in self.views):
            # A layer with as many key and value heads as heads has groups of one.
            for view in self.views:
                view.kv_equal, view.grouped = False, not view.multi_query

    def value_of(self, field: str) -> Any:
        """A field of this kind of layer; `skip` has the sublayers that it is without."""
        return self.skipped if field == "skip" else getattr(self.config, field)

    def written(self, component: str) -> list[str]:
        """The names of what is written of a component, one for every kind."""
        return list(dict.fromkeys(view.names[component] for view in self.views if component in view.names))

    def recorded(self, component: str) -> str:
        """The classes of a component as an expression."""
        names = self.written(component)
        return names[0] if len(names) == 1 else f"[{', '.join(names)}]"

    @property
    def blocks_by_layer(self) -> str:
        """The class of every layer as an expression: what is repeated over the depth, or runs of one class."""
        blocks = [self.views[i].names["block"] for i in self.view_of]
        for period in range(1, len(blocks) // 2 + 1):
            if len(blocks) % period == 0 and blocks == blocks[:period] * (len(blocks) // period):
                return f"[{', '.join(blocks[:period])}] * {len(blocks) // period}"
        pieces: list[list[str] | str] = []
        for name, run in itertools.groupby(blocks):
            length = len(list(run))
            if length > 1:
                pieces.append(f"[{name}] * {length}")
            elif pieces and isinstance(pieces[-1], list):
                pieces[-1].append(name)
            else:
                pieces.append([name])
        return " + ".join(piece if isinstance(piece, str) else f"[{', '.join(piece)}]" for piece in pieces)

    @property
    def has_unfused_linear(self) -> bool:
        return any(view.unfused_bias and view.any_bias for view in self.views)

    @property
    def attention_words(self) -> str:
        """What the attention's class says of itself."""
        heads = "multi-head" if self.kv_equal else "grouped-query"
        norm = {
            "none": "",
            "head": ", a norm on every head",
            "per_head": ", a norm per head",
            "full": ", a norm on all heads",
        }
        return f"{heads.capitalize()} self-attention{norm[self.qk_norm]}."

    # Norms

    def _norm_axes(self) -> None:
        c = self.reader
        arguments = c.norm_arguments()
        self.norm = self._norm_kind(arguments, per_head=False, ones=c.initializer_norm_ones)
        if self.norm["base"] != "torch_layernorm":
            # First, so that the plain name is its own.
            name = self._norm_class(self.norm)
        # The class of norms that see the tokens of a batch.
        self.batch_norm = name if NORM_KINDS[c.norm_type].over_tokens else None
        # Inputs behind an encoder are often made of labels, without a mask.
        self.padding_in_ids = self.batch_norm and c.add_cross_attention and c.pad_token_id is not None
        for field in (
            "norm_type",
            "norm_momentum",
            "norm_affine",
            "norm_bias",
            "norm_unit_offset",
            "norm_casting_mode",
        ):
            getattr(c, field)

    def _norm_kind(self, arguments: dict, per_head: bool, ones: bool = False) -> dict:
        kind, cast, affine = arguments["norm_type"], arguments["casting_mode"], arguments["affine"]
        offset = arguments["unit_offset"]
        if kind == "dynamic_tanh":
            base = "dynamic_tanh"
        elif kind == "rmsnorm":
            base = "rmsnorm"
        elif kind == "batchnorm":
            base = "batchnorm"
        elif cast == "gemma":
            base = "float32_layernorm" if affine else "weightless_float32_layernorm"
        elif per_head and affine:
            base = "per_head_layernorm"
        else:
            base = "layernorm" if offset else "torch_layernorm"
        words = {"llama": " with statistics in float32", "gemma": " in float32, weight included"}.get(cast, "")
        return {
            "base": base,
            "cast": cast,
            "affine": affine,
            "bias": arguments["bias"],
            "offset": offset and affine,
            "momentum": bool(arguments["momentum"]),
            "start": "zeros" if offset and not ones else "ones",
            "words": words + ("; the stored weight w is applied as 1 + w" if offset and affine else ""),
        }

    def _norm_class(self, kind: dict, own: str = "") -> str:
        stem = {
            "rmsnorm": "RMSNorm",
            "layernorm": "LayerNorm",
            "float32_layernorm": "LayerNorm",
            "weightless_float32_layernorm": "LayerNorm",
            "per_head_layernorm": "PerHeadLayerNorm",
            "dynamic_tanh": "DynamicTanh",
            "batchnorm": "BatchNorm",
        }[kind["base"]]
        relevant = dict(kind)
        if kind["base"] not in ("dynamic_tanh", "batchnorm"):
            relevant.pop("bias")
        if kind["base"] != "batchnorm":
            relevant.pop("momentum")
        shared = self.name
        for name in (f"{shared}{stem}", f"{shared}{own}{stem}", f"{self.prefix}{stem}", f"{self.prefix}{own}{stem}"):
            if self.norms.setdefault(name, relevant) == relevant:
                return name
        raise NotStandalone(f"`per_layer_config` asks for more kinds of {stem} than one file has names for")

    def _norm_call(self, kind: dict, dim: str, eps: str, own: str = "") -> str:
        if kind["base"] == "torch_layernorm":
            affine = "" if kind["affine"] else ", elementwise_affine=False"
            bias = "" if kind["bias"] or not kind["affine"] else ", bias=False"
            return f"nn.LayerNorm({dim}, eps=config.{eps}{affine}{bias})"
        name = self._norm_class(kind, own)
        if kind["base"] == "dynamic_tanh":
            return f"{name}({dim}, config.norm_alpha_init)"
        if kind["base"] == "batchnorm":
            return f"{name}({dim}, eps=config.{eps}{', momentum=config.norm_momentum' if kind['momentum'] else ''})"
        if kind["base"] == "rmsnorm" and not kind["affine"]:
            return f"{name}(config.{eps})"
        bias = ", bias=False" if kind["base"] == "layernorm" and not kind["bias"] else ""
        return f"{name}({dim}, eps=config.{eps}{bias})"

    def norm_of(self, dim: str) -> str:
        """The expression that makes a norm over `dim` channels."""
        return self._norm_call(self.norm, dim, "norm_eps")

    def qk_norm_of(self, heads: str) -> str:
        """The expression that makes the norm on `heads` heads of queries or keys."""
        shape = {
            "head": "config.head_dim",
            "per_head": f"({heads}, config.head_dim)",
            "full": f"{heads} * config.head_dim",
        }[self.qk_norm]
        if self.qk_norm == "per_head" and not self.qk_kind["affine"]:
            shape = "config.head_dim"
        eps = "norm_eps" if self.config.qk_norm_eps == self.config.norm_eps else "qk_norm_eps"
        return self._norm_call(self.qk_kind, shape, eps, "QK")

    # Attention

    def _attention_axes(self) -> None:
        c = self.reader
        self.qk_norm = c.qk_norm
        self.qk_kind = self._norm_kind(c.qk_norm_arguments(), per_head=c.qk_norm == "per_head")
        for field in ("qk_norm_type", "qk_norm_affine", "qk_norm_bias", "qk_norm_eps"):
            getattr(c, field)
        self.norm_after_rope = c.qk_norm_after_rope
        self.heads_first = c.heads_first_from == "norm"
        self.positions_first = c.heads_first_from == "scores"
        self.qkv_bias, self.o_bias = c.attention_bias, c.attention_output_bias
        self.kv_equal = c.num_key_value_heads == c.num_attention_heads
        self.multi_query = c.broadcast_key_value
        self.grouped = not self.kv_equal and not self.multi_query
        self.attention_scaling = c.attention_scaling
        self.scaled_by_layer = c.scale_attn_by_inverse_layer_idx
        self.softcap = c.attn_logit_softcapping is not None
        self.sinks = c.attention_sinks
        self.new_sinks = c.initializer_sinks if self.sinks else None
        self.gate = c.attention_gate
        self.attention_sub_norm = c.attention_sub_norm
        self.clip = c.clip_qkv is not None
        self.cross = self.cross_always = c.add_cross_attention
        self.cross_width = self.cross and c.cross_attention_hidden_size not in (None, c.hidden_size)
        self.scale_query = c.scale_query
        self.score_form = c.attention_score_form
        self.scores_in_float32 = c.attention_scores_in_float32
        self.softmax_in_float32 = c.attention_softmax_in_float32
        if self.cross and self.score_form == "biased":
            raise NotStandalone("`attention_score_form` biased is set in a stack with cross-attention")
        self.attention_dropout = c.attention_dropout
        self.layer_kinds = sorted(set(c.layer_types))

    # Positions

    def _position_axes(self) -> None:
        c = self.reader
        kind = c.position_embedding_type
        self.learned, self.sinusoidal = kind == "learned", kind == "sinusoidal"
        self.alibi, self.relative = kind == "alibi", kind == "relative_bias"
        self.has_bias = self.bias_in_scores = self.alibi or self.relative
        self.position_offset = c.position_offset
        self.plus_offset = f" + {c.position_offset}" if c.position_offset else ""
        self.starts_as_sinusoids = self.learned and c.initializer_positions == "sinusoidal"
        self.counts_padding = c.generation_counts_padding and c.is_causal and not self.seq2seq
        self.position_source = c.position_ids_source
        self.mask_from_ids = c.padding_mask_source == "input_ids"
        limit = position_limit(self.config)
        self.position_limit = "self.config.max_position_embeddings" if limit else ""
        if limit and self.position_source == "input_ids":
            self.position_limit += " - self.padding_idx - 1"
        self.sinusoidal_layout, self.sinusoidal_stored = c.sinusoidal_layout, c.sinusoidal_table_stored
        self.sinusoidal_grows, self.sinusoidal_padding = c.sinusoidal_table_grows, c.sinusoidal_padding_zero
        self.alibi_form, self.alibi_slope_order = c.alibi_form, c.alibi_slope_order
        self.alibi_divisor = c.alibi_divisor
        self.alibi_slopes_in_bfloat16 = c.alibi_slopes_in_bfloat16
        self.alibi_slopes_in_float64 = c.alibi_slopes_in_float64
        self.bias_in_float32 = self.alibi and c.alibi_in_float32
        self.relative_per_layer = self.relative and c.relative_attention_per_layer and c.num_hidden_layers > 1
        self.needs_padding_mask = self.position_source == "attention_mask" or self.alibi
        self.rope_interleaved, self.rope_reversed = c.rope_interleaved, c.rope_reversed
        self.rope_table_in_float32 = c.rope_table_in_float32
        self.rope_upcast = c.rope_in_float32 and not c.rope_table_in_float32
        self.rope_result_in_float32 = c.rope_result_in_float32
        self.rope_table_stored = c.rope_table_stored
        self.rope_table_in_checkpoint, self.turns_values = c.rope_table_in_checkpoint, c.rope_turns_values
        self.rope_frequencies_in_float32 = c.rope_frequencies_in_float32
        c.rope_parameters, c.no_rope_layers, c.layer_rope_theta  # noqa: B018
        self._rope_tables()
        self.cache_limit = build_cache_limit(self.config) if c.longrope_recomputes_cache else None

    def _rope_tables(self) -> None:
        config = self.config
        per_layer = [config.rope_parameters_of(i) for i in range(config.num_hidden_layers)]
        self.tables: list[dict] = []
        for parameters in per_layer:
            if parameters is not None and parameters not in self.tables:
                self.tables.append(parameters)
        self.rotary = bool(self.tables)
        self.no_rope_layers = [int(parameters is not None) for parameters in per_layer]
        self.rotates_rule = None
        by_kind = {
            kind: {str(p) for p, t in zip(per_layer, config.layer_types) if t == kind and p is not None}
            for kind in self.layer_kinds
        }
        # Whether layers of one type have different bases.
        self.bases = len(self.tables) > 1 and any(len(values) > 1 for values in by_kind.values())
        if self.bases and len({str({**table, "rope_theta": 0}) for table in self.tables}) > 1:
            raise NotStandalone(
                "`layer_rope_theta` is set, and layer types have different `rope_parameters` beside it"
            )
        self.layer_bases = [parameters["rope_theta"] if parameters else 0 for parameters in per_layer]
        if self.bases and 0 in self.no_rope_layers:
            self.rotates_rule = "bool(config.layer_rope_theta[layer_idx])"
        elif self.rotary and 0 in self.no_rope_layers:
            rotating = {kind for kind, p in zip(config.layer_types, per_layer) if p is not None}
            still = {kind for kind, p in zip(config.layer_types, per_layer) if p is None}
            if rotating & still or len(rotating) > 1:
                self.rotates_rule = "bool(config.no_rope_layers[layer_idx])"
            else:
                self.rotates_rule = f'config.layer_types[layer_idx] == "{rotating.pop()}"'
        if self.rope_table_in_checkpoint and len(self.tables) > 1:
            raise NotStandalone("`rope_table_in_checkpoint` is set, and layers have different `rope_parameters`")
        self.rope_value: dict | None = None
        if len(self.tables) == 1 or self.bases:
            self.rope_value = self.tables[0]
        elif self.rotary:
            self.rope_value = {
                kind: next(p for p, t in zip(per_layer, config.layer_types) if t == kind and p is not None)
                for kind in self.layer_kinds
                if by_kind[kind]
            }
        partial = {
            p.get("partial_rotary_factor") is not None and p["rope_type"] != "proportional" for p in self.tables
        }
        self.rope_partial = True in partial
        types = sorted({p["rope_type"] for p in self.tables})
        alphas = {bool(p["rope_type"] == "dynamic" and p.get("alpha")) for p in self.tables}
        scales = {"llama_4_scaling_beta" in p for p in self.tables}
        if len(alphas) > 1 or len(scales) > 1:
            raise NotStandalone("`rope_parameters` has `alpha` or `llama_4_scaling_beta` for some layers only")
        self.rope_alpha, self.rope_query_scale = alphas == {True}, scales == {True}
        self.rope_types = types
        self.rope_own_type = "default"
        self.rope_scaled = not self.rope_alpha and types != ["default"]
        self.rope_own = "default" in types
        self.rope_foreign = self.rope_scaled
        self.rope_dynamic = not self.rope_alpha and bool({"dynamic", "longrope"} & set(types))
        self.rotary_dim = "self.config.head_dim"
        if any(p.get("partial_rotary_factor") is not None for p in self.tables):
            self.rotary_dim = 'int(self.config.head_dim * (parameters.get("partial_rotary_factor") or 1.0))'
        if self.rope_alpha:
            self.rotary_dim = "self.config.head_dim"

    # Block

    def _block_axes(self) -> None:
        c = self.reader
        slots = NORM_SLOTS[c.norm_placement]
        self.pre, self.branch, self.post = (f"{slot}_norm" in slots for slot in ("pre", "branch", "post"))
        self.deepnorm = c.norm_placement == "deepnorm" and c.deepnorm_alpha != 1.0
        self.parallel = c.parallel_block != "none"
        self.shared_norm = c.parallel_block == "shared_norm"
        self.residual_first = c.parallel_sum_order == "residual_first"
        self.final_norm = c.final_norm
        self.first_pre_norm = c.first_layer_pre_norm
        self.residual_from_norm = c.residual_from_norm
        self.branch_multiplied = c.residual_multiplier != 1.0 and c.learned_scale_type == "none"
        self.learned_scale = None if c.learned_scale_type == "none" else c.learned_scale_type
        self.clamp = c.clamp_in_float16
        sublayers = ["self_attn", "cross_attn", "mlp"] if self.cross else ["self_attn", "mlp"]
        self.sublayers = [name for name in sublayers if name not in self.skipped]
        own = c.attention_residual_dropout
        self.own_attention_dropout = not isinstance(own, bool)
        inside = not (self.parallel and c.dropout_after_sum)
        attention = bool(own * c.residual_dropout if isinstance(own, bool) else own) and inside
        ffn = bool(c.ffn_residual_dropout * c.residual_dropout) and inside
        of_attention = "config.attention_residual_dropout" if self.own_attention_dropout else "config.residual_dropout"
        of_attention, of_ffn = of_attention if attention else "", "config.residual_dropout" if ffn else ""
        # The probability as an expression; nothing where there is no dropout.
        self.sublayer_dropout = {"self_attn": of_attention, "cross_attn": of_attention, "mlp": of_ffn}
        self.scale_dropout = list(dict.fromkeys(self.sublayer_dropout[name] for name in self.sublayers))
        self.chunked = c.ffn_chunk_size > 0 and "mlp" in self.sublayers
        self.sum_dropout = bool(self.parallel and c.dropout_after_sum and c.residual_dropout)
        if self.parallel and self.cross:
            raise NotStandalone("`parallel_block` is set in a stack with cross-attention")
        self.gated = c.ffn_type == "glu"
        self.hidden_act = c.hidden_act
        # xIELU's parameters are in bfloat16, unless it is told.
        told = c.hidden_act == "xielu"
        self.activation = 'ACT2CLS["xielu"](dtype=torch.get_default_dtype())' if told else f'ACT2FN["{c.hidden_act}"]'
        self.fresh_activation = self.activation if c.hidden_act in LEARNED_ACTIVATIONS else None
        self.mlp_bias, self.down_bias = c.mlp_bias, c.mlp_output_bias
        self.any_bias = self.qkv_bias or self.o_bias or self.mlp_bias or self.down_bias
        self.ffn_sub_norm, self.unfused_bias, self.fused_gate_up = c.ffn_sub_norm, c.unfused_bias, c.fused_gate_up
        self.ffn_output_in_float32 = c.ffn_output_in_float32
        self.activation_dropout = c.activation_dropout
        self.layerdrop, self.final_dropout = c.layerdrop, c.final_dropout
        placement = {
            "pre": "norms before the sublayers",
            "post": "norms after the additions",
            "branch": "norms on the sublayers' outputs",
            "sandwich": "norms before the sublayers and on their outputs",
            "deepnorm": "DeepNorm: norms after additions to a scaled residual",
        }[c.norm_placement]
        order = "side by side with" if self.parallel else "then"
        self.block_words = f"Self-attention, {order} the feed-forward network; {placement}."
        if self.skipped:
            alone = "Self-attention" if self.skipped == ["mlp"] else "The feed-forward network"
            self.block_words = f"{alone} alone; {placement}."
        self._initialisation()

    def _initialisation(self) -> None:
        c, self.attention_stds, self.mlp_stds = self.reader, [], []
        self.fan_in = c.initializer_scheme == "fan_in"
        self.cutoff = c.initializer_cutoff_factor is not None
        if self.cutoff and self.seq2seq:
            raise NotStandalone("`initializer_cutoff_factor` is set in one of two stacks")
        std = "init_std = config.initializer_range * "
        at_the_end = f"{std}(2 * config.num_hidden_layers) ** -0.5"
        if c.initializer_scheme.startswith("depth_scaled"):
            self.attention_stds.append(f"self.o_proj.{at_the_end}")
        if c.initializer_scheme in ("depth_scaled", "depth_scaled_and_heads"):
            self.mlp_stds.append(f"self.down_proj.{at_the_end}")
        gate = ["g_proj"] if self.gate != "none" else []
        inner = ["gate_proj", "up_proj"] if self.gated else ["up_proj"]
        if self.fan_in:
            self.attention_stds += [
                f"self.q_proj.{std}(config.hidden_size * config.head_dim) ** -0.5",
                *(f"self.{name}.{std}config.hidden_size**-0.5" for name in ["k_proj", "v_proj", *gate]),
                f"self.o_proj.{std}(config.num_attention_heads * config.head_dim) ** -0.5",
            ]
            self.mlp_stds += [f"self.{name}.{std}config.hidden_size**-0.5" for name in inner]
            self.mlp_stds.append(f"self.down_proj.{std}config.intermediate_size**-0.5")
        elif c.norm_placement == "deepnorm":
            given = {*(line.split(".")[1] for line in self.attention_stds + self.mlp_stds)}
            for name in ["q_proj", "k_proj", "v_proj", "o_proj", *gate]:
                gain = "1.0" if name in ("q_proj", "k_proj", "g_proj") else "config.deepnorm_beta"
                self.attention_stds += [] if name in given else [f"self.{name}.xavier_gain = {gain}"]
            for name in [*inner, "down_proj"]:
                self.mlp_stds += [] if name in given else [f"self.{name}.xavier_gain = config.deepnorm_beta"]
        # An initialiser's range, and DeepNorm's beta, are read by what follows.
        c.initializer_range  # noqa: B018

    # Embedding

    def _embedding_axes(self) -> None:
        c = self.reader
        factorised = c.embedding_size != c.hidden_size
        self.embed_width = "config.embedding_size" if factorised else "config.hidden_size"
        self.embed_width_word = self.embed_width.removeprefix("config.")
        self.projection = c.embedding_projection_position if factorised else None
        self.projection_bias = c.embedding_projection_bias
        self.sum_width = "config.hidden_size" if self.projection == "before_positions" else self.embed_width
        self.has_pad = c.pad_token_id is not None
        self.pad_frozen = c.padding_embedding_frozen and self.has_pad
        self.position_padding = self.learned and self.position_source == "input_ids" and self.pad_frozen
        multiplied = c.embedding_multiplier != 1.0
        in_stack = c.embedding_multiplier_position == "stack"
        rounded = c.embedding_multiplier_in_weight_dtype
        self.scaled_embedding, self.rounded_scale = multiplied and not in_stack, rounded
        self.embedding_norm = c.embedding_norm_position if c.embedding_norm else None
        self.token_types, self.task_types = c.type_vocab_size, c.task_type_vocab_size
        self.types_among_tokens = c.token_type_table == "tokens" and not c.type_vocab_size
        self.embedding_dropout = c.embedding_dropout
        steps = ["inputs_embeds"]
        if multiplied and in_stack and rounded:
            steps = ["inputs_embeds * torch.tensor(self.config.embedding_multiplier, dtype=inputs_embeds.dtype)"]
        elif multiplied and in_stack:
            steps = ["inputs_embeds * self.config.embedding_multiplier"]
        self.scaled_in_stack = multiplied and in_stack
        change = "hidden_states = "
        if self.projection == "before_positions":
            steps.append(f"{change}self.token_projection(hidden_states)")
        if self.embedding_norm == "before_positions":
            steps.append(f"{change}self.token_norm(hidden_states)")
        for name, there in (("token_type", self.token_types), ("position", False), ("task_type", self.task_types)):
            if there:
                steps += [
                    f"if {name}_ids is None:",
                    f"    {name}_ids = torch.zeros("
                    "hidden_states.shape[:-1], dtype=torch.long, device=hidden_states.device)",
                    f"{change}hidden_states + self.{name}s({name}_ids)",
                ]
            elif name == "position" and self.learned:
                steps.append(f"{change}hidden_states + self.embed_positions(position_ids{self.plus_offset})")
            elif name == "position" and self.sinusoidal:
                positions = f"self.embed_positions(position_ids{self.plus_offset})"
                steps.append(f"{change}hidden_states + {positions}.to(hidden_states)")
        if self.types_among_tokens:
            steps += [
                "if token_type_ids is not None:",
                f"    {change}hidden_states + self.embed_tokens(token_type_ids)",
            ]
        if self.embedding_norm == "after_positions":
            steps.append(f"{change}self.embedding_norm(hidden_states)")
        if self.embedding_dropout:
            steps.append(f"{change}self.embedding_dropout(hidden_states)")
        if self.projection == "after_norm":
            steps.append(f"{change}self.embedding_projection(hidden_states)")
        self.embedding_steps = steps

    # Heads

    def _head_axes(self) -> None:
        c = self.reader
        self.dec = "config.decoder" if self.seq2seq else "config"
        self.output_projection = c.output_projection
        self.head_transform = c.lm_head_transform
        self.head_transform_bias, self.head_transform_act = c.lm_head_transform_bias, c.lm_head_transform_act
        self.head_width = "embedding_size" if c.lm_head_transform or c.output_projection else "hidden_size"
        if c.embedding_size == c.hidden_size:
            self.head_width = "hidden_size"
        self.head_bias, self.normalized_head = c.lm_head_bias, c.lm_head_normalized
        self.unread_bias = c.lm_head_unread_bias
        self.head_input_scale = not c.lm_head_transform and c.lm_head_input_scale != 1.0
        self.logit_scaled, self.logit_division = c.logit_scale != 1.0, c.logit_scale_by_division
        self.logit_cap = c.final_logit_softcapping is not None
        self.z_loss, self.smoothing = bool(c.z_loss_coefficient), bool(c.label_smoothing)
        self.loss_in_dtype = not c.loss_in_float32
        shifted = self.is_causal and not self.seq2seq and c.shift_labels
        self.loss = "causal_lm_loss" if shifted else "token_loss"
        # Where transformers' own, which shifts a decoder's labels, is another one.
        self.unshifted_loss = self.is_causal and not shifted
        self.own_loss = self.z_loss or self.smoothing or self.loss_in_dtype or self.unshifted_loss
        self.pooler = c.pooler
        self.pooler_varies = c.pooler and c.pooler_scope != "every_head"
        self.pooler_default = c.has_pooler("base")
        self.output_class = (
            "BaseModelOutputWithPooling"
            if self.pooler
            else "BaseModelOutputWithPastAndCrossAttentions"
            if self.cross
            else "BaseModelOutputWithPast"
            if self.is_causal
            else "BaseModelOutput"
        )
        self.eager_by_default = c.eager_by_default
        self.sdpa = not self.whole.unsupported_attention_features("sdpa")
        self.flash = not self.whole.unsupported_attention_features("flash_attention")

    def head_std(self, inputs: str, outputs: str, of_classes: bool = False) -> str:
        """The standard deviation of a new matrix of a head, as an expression; nothing where it is transformers' own."""
        range_ = f"{self.dec}.initializer_range"
        if self.fan_in:
            return f"{range_} * {inputs}**-0.5"
        if self.config.initializer_scheme == "fan_out_heads":
            return range_ if outputs == "1" else f"{range_} * {outputs}**-0.5"
        if self.config.initializer_scheme == "depth_scaled_and_heads":
            return f"{inputs}**-0.5" if of_classes else f"{range_} * (2 * {self.dec}.num_hidden_layers) ** -0.5"
        return ""

    def _classifier_axes(self) -> None:
        c = self.config
        tokens = self.head in ("ForTokenClassification", "ForQuestionAnswering")
        choices = self.head == "ForMultipleChoice"
        self.classifies = tokens or choices or self.head == "ForSequenceClassification"
        self.output_width = f"{self.dec}.embedding_size" if self.output_projection else f"{self.dec}.hidden_size"
        transforms = c.classifier_transform and (not tokens or c.classifier_transform_on_tokens)
        if choices:
            transforms = c.choice_transform
        self.classifier_transform = self.classifies and transforms
        self.classifier_transform_bias = c.classifier_transform_bias
        self.classifier_transform_act = c.choice_transform_act if choices else c.classifier_transform_act
        self.classifier_transform_norm = c.classifier_transform_norm
        before = "choice_dropout" if choices else "classifier_dropout"
        drops = c.choice_transform_dropout if choices else c.classifier_transform_dropout
        # The field with the rate in front of the dense layer.
        self.classifier_transform_drops = before if drops and getattr(c, before) else ""
        field = {"ForTokenClassification": "token_classifier_dropout", "ForQuestionAnswering": "qa_dropout"}
        dropout = field.get(self.head, before)
        self.classifier_drops = dropout if getattr(c, dropout) else ""
        self.classifier_bias = c.classifier_bias or tokens
        pooling = c.choice_pooling if choices else c.classifier_pooling
        self.classifier_pooling = "pooler" if c.has_pooler("choices" if choices else "classifier") else pooling
        self.pooling_words = {
            "pooler": "the pooled first token",
            "first": "the first token",
            "first_real": "the first real token",
            "last": "the last real token",
            "last_position": "the last token",
            "mean_of_logits": "every token, averaged",
            "end_of_sequence": "the token that ends the sequence",
        }.get(self.classifier_pooling, "the mean of the tokens")
        labels = {"ForQuestionAnswering": "2", "ForMultipleChoice": "1"}.get(self.head, "config.num_labels")
        self.classifier_std = self.head_std(self.output_width, labels, of_classes=True)
        if self.fan_in and self.head == "ForTokenClassification":
            self.classifier_std = f"{self.dec}.initializer_range"
        self.token_loss_in_dtype = not self.reader.token_classifier_loss_in_float32
        if self.classifies:
            # Of the language model's loss.
            self.reader.read |= {"loss_in_float32", "shift_labels"}
        self.writes_transform = self.classifier_transform if self.classifies else self.head_transform
        self.transform_normed = self.classifier_transform_norm if self.classifies else True

    @cached_property
    def unread(self) -> list[str]:
        """The fields that are set, have an effect, and nothing here has looked at."""
        seen = self.reader.read | UNUSED_FIELDS | self.config.idle_fields().keys()
        defaults = {name: field.default for name, field in FIELDS.items() if name not in seen}
        return [name for name, default in defaults.items() if getattr(self.config, name) != default]

    def refuse_unread(self, written: set[str]) -> None:
        """Raise if a field is set that neither the templates nor what they wrote reads."""
        unread = dict.fromkeys(name for view in self.views for name in view.unread)
        if fields := [name for name in unread if name not in written]:
            raise NotStandalone(f"{quote(fields)}: not covered by a standalone file yet")


# Of heads that are not written, of tokens, of signatures, and of where the model came from.
UNUSED_FIELDS = {
    "native_leftovers", "argument_order", "bos_token_id", "eos_token_id", "use_cache", "tie_word_embeddings", "vocab_size",
    "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim", "max_position_embeddings",
    "sliding_window", "classifier_pooling", "classifier_bias", "classifier_transform", "classifier_transform_bias",
    "classifier_transform_act", "classifier_transform_norm", "classifier_transform_on_tokens",
    "classifier_transform_dropout", "classifier_dropout", "token_classifier_dropout", "qa_dropout", "choice_pooling",
    "choice_transform", "choice_transform_act", "choice_transform_dropout", "choice_dropout",
    "relative_attention_num_buckets", "relative_attention_max_distance", "alibi_bias_max", "norm_eps",
    "norm_alpha_init", "layer_scale_init", "deepnorm_beta",
}  # fmt: skip
