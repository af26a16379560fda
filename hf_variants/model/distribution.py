"""How a model is spread over several devices: its plans, and what transformers leaves to the model beside them."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from .attention import self_attention_half
from .feed_forward import LEARNED_ACTIVATIONS


def tensor_parallel_plan(config: PreTrainedConfig, ranks: int = 1) -> dict[str, str]:
    """
    Tensor-parallel styles of exactly the modules that this config builds (transformers' `tp_plan`).

    Args:
        ranks (`int`): number of devices that share a layer; heads that it does not divide are gathered.
    """
    layers = list(config.per_layer_config)
    plan = {}
    attending = [layer for layer in layers if "self_attn" not in getattr(layer, "skip", ())]
    # A norm over all heads, and whatever is indexed by the head outside the projections, needs the whole
    # projections on every rank; and so does a head that would be cut in two.
    gather = config.has_sequence_bias or any(
        layer.qk_norm in ("full", "per_head")
        or layer.attention_sinks
        or layer.attention_sub_norm
        or layer.num_key_value_heads % ranks
        for layer in attending
    )
    prefixes = ["layers.*.self_attn"] if attending else []
    if any(layer.add_cross_attention for layer in layers):
        prefixes.append("layers.*.cross_attn")
    projections = ["q_proj", "k_proj", "v_proj"]
    if any(layer.attention_gate != "none" for layer in attending):
        projections.append("g_proj")
    for prefix in prefixes:
        plan |= {f"{prefix}.{name}": "colwise_gather_output" if gather else "colwise" for name in projections}
        plan[f"{prefix}.o_proj"] = "rowwise_split_input" if gather else "rowwise"
        if not gather and any(layer.qk_norm == "head" and layer.qk_norm_affine for layer in attending):
            # One weight for all heads: every rank has the gradient of its own heads only.
            plan |= {f"{prefix}.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
    with_mlp = [layer for layer in layers if "mlp" not in getattr(layer, "skip", ())]
    gather = any(layer.ffn_sub_norm for layer in with_mlp)
    inner = ["up_proj"] if with_mlp else []
    if any(layer.ffn_type == "glu" for layer in with_mlp):
        inner.append("gate_proj")
    plan |= {f"layers.*.mlp.{name}": "colwise_gather_output" if gather else "colwise" for name in inner}
    if not gather and any(layer.hidden_act in LEARNED_ACTIVATIONS for layer in with_mlp):
        # One weight for all channels: every rank has the gradient of its own channels only.
        plan["layers.*.mlp.act_fn"] = "replicated_with_grad_allreduce"
    if with_mlp:
        plan["layers.*.mlp.down_proj"] = "rowwise_split_input" if gather else "rowwise"
    return plan


def pipeline_plan(config: PreTrainedConfig) -> dict[str, tuple[list[str], list[str]]] | None:
    """
    What the first and the last stage of a pipeline have beside layers, with names of inputs and outputs; engines
    pass over the others' (transformers' `pp_plan`). `None` where more than modules stand before the layers.
    """
    if config.embedding_multiplier != 1.0 and config.embedding_multiplier_position == "stack":
        return None
    if "input_ids" in (config.position_ids_source, config.padding_mask_source):
        return None
    projected = config.embedding_size != config.hidden_size and config.embedding_projection_position
    normed = config.embedding_norm and config.embedding_norm_position
    names = {
        "token_projection": projected == "before_positions",
        "token_norm": normed == "before_positions",
        "token_types": config.type_vocab_size,
        "embed_positions": config.position_embedding_type in ("learned", "sinusoidal"),
        "task_types": config.task_type_vocab_size,
        "embedding_norm": normed == "after_positions",
        "embedding_projection": projected == "after_norm",
        "layers": True,
        "norm": config.final_norm,
        "output_projection": config.output_projection,
    }
    plan = {"embed_tokens": (["input_ids"], ["inputs_embeds"])}
    plan |= {name: (["hidden_states"], ["hidden_states"]) for name, built in names.items() if built}
    plan["layers"] = (["hidden_states", "attention_mask"], ["hidden_states"])
    if config.pooler:
        plan["pooler"] = (["hidden_states"], ["pooler_output"])
    return plan


class PassedLayer(nn.Module):
    """
    Stands where another device has a layer: passes hidden states on, and counts their tokens in the layer's slot of
    the cache, which positions, masks and biases take the length of the past from.
    """

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: torch.Tensor, *args, past_key_values: Cache | None = None, **kwargs
    ) -> torch.Tensor:
        """(batch, length, hidden_size) -> the same."""
        cache = self_attention_half(past_key_values)
        if cache is not None:
            batch, length, _ = hidden_states.shape
            # A width of 0 would count as an empty cache.
            marks = hidden_states.new_zeros(batch, 1, length, 1)
            cache.update(marks, marks, self.layer_idx)
        return hidden_states


def first_argument(hidden_states: torch.Tensor, *args) -> torch.Tensor:
    """What a later stage of a pipeline makes of the hidden states that it is sent: they are embedded already."""
    return hidden_states


class Distribution:
    """Tensor parallelism by a plan that fits the number of devices, and a pipeline that embeds once."""

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh) -> nn.Module:
        """As in transformers; `ValueError` for a pipeline of what its stages would compute wrongly."""
        if mesh is None:
            return super().maybe_distribute_model(model, distributed_config, mesh)
        if distributed_config.tp_size > 1:
            model.fit_tensor_parallel_plan(distributed_config.tp_size)
        if distributed_config.pp_size > 1:
            model.refuse_pipeline(distributed_config.pp_size)
        model = super().maybe_distribute_model(model, distributed_config, mesh)
        if distributed_config.pp_size > 1:
            model.keep_own_stage()
        return model

    def stacks(self) -> Iterator[tuple[str, nn.Module]]:
        """Prefix of the names, and module, of every stack of layers."""
        for name, module in self.named_modules():
            if isinstance(getattr(module, "layers", None), nn.ModuleList):
                yield f"{name}." if name else "", module

    def fit_tensor_parallel_plan(self, ranks: int) -> None:
        """Replace the general plan of every stack by its plan for `ranks` devices."""
        for prefix, stack in self.stacks():
            general = {f"{prefix}{name}" for name in stack.config.base_model_tp_plan}
            fitting = {f"{prefix}{name}": style for name, style in tensor_parallel_plan(stack.config, ranks).items()}
            # The table of a tied head is sharded as the head is, which transformers 5.17 leaves to the plan.
            fitting[f"{prefix}embed_tokens"] = "embedding_rowwise"
            self._tp_plan = {name: style for name, style in self._tp_plan.items() if name not in general} | fitting

    def refuse_pipeline(self, ranks: int) -> None:
        """Raise if stages after the first would lack what they need: transformers hands on hidden states alone."""
        if self.config.is_encoder_decoder or not self.config.is_causal or not self.can_generate():
            raise ValueError(
                f"`pp_size` is {ranks}, but transformers' pipeline carries decoders with a language-modelling head only, "
                f"not {type(self).__name__}. Use `tp_size` or `fsdp_size`."
            )
        if fields := [
            name
            for name in ("position_ids_source", "padding_mask_source")
            if getattr(self.config, name) == "input_ids"
        ]:
            raise ValueError(
                f"`pp_size` is {ranks}, but {' and '.join(f'`{field}`' for field in fields)} input_ids reads token ids, "
                "which only the first stage of a pipeline sees. Use `tp_size` or `fsdp_size`."
            )

    def keep_own_stage(self) -> None:
        """What transformers does not take out of a stage: embedding again, projecting before the end, losing count."""
        stack = self.model
        for layer_idx, layer in enumerate(stack.layers):
            if isinstance(layer, nn.Identity):
                stack.layers[layer_idx] = PassedLayer(layer_idx)
        if not self._pp_stage.pp_is_first_stage:
            stack.embed = first_argument
        if not self._pp_stage.pp_is_last_stage:
            stack.output_projection = nn.Identity()
