"""How a model is spread over several devices: what transformers' own plans leave to the model."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention import self_attention_half
from .configuration_variant import VariantConfig


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
            fitting = {f"{prefix}{name}": style for name, style in stack.config.tensor_parallel_plan(ranks).items()}
            # The table of a tied head is sharded as the head is, which transformers 5.17 leaves to the plan.
            fitting[f"{prefix}embed_tokens"] = "embedding_rowwise"
            self._tp_plan = {name: style for name, style in self._tp_plan.items() if name not in general} | fitting

    def refuse_pipeline(self, ranks: int) -> None:
        """Raise if stages after the first would lack what they need: transformers hands on hidden states alone."""
        if not isinstance(self.config, VariantConfig) or not self.config.is_causal or not self.can_generate():
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
