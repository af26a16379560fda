"""Layers that differ: what `per_layer_config` may change in some of them, and what it may not."""

from typing import Any

from .axis import PER_LAYER, Check, VariantConfigError, quote


# Sublayers that `per_layer_config` may leave out with `skip`.
SKIPPABLE = ("self_attn", "mlp")
# As transformers' documentation calls them -> here.
SKIP_NAMES = {"attention": "self_attn"}


class PerLayerRules:
    """Mixed into the config of a stack, before `PreTrainedConfig`, which resolves the layers."""

    @classmethod
    def per_layer_fields(cls) -> frozenset[str]:
        """
        What `per_layer_config` may change. All others are read for the stack as a whole (masks, caches, embeddings,
        final norm), where a layer's value would be ignored or mixed up.
        """
        return frozenset(name for name, entry in cls.__dataclass_fields__.items() if PER_LAYER in entry.metadata)

    @classmethod
    def _refuse_shared_fields(cls, per_layer_config: dict[int | str, dict[str, Any]] | None) -> None:
        """Refuse per-layer values of fields that are read for the whole stack: transformers would fail on the read."""
        fields = {field for overrides in (per_layer_config or {}).values() for field in overrides}
        if shared := sorted(fields - cls.per_layer_fields() - {"skip"}):
            raise VariantConfigError(
                f"`per_layer_config` changes {quote(shared)}, which all layers share. "
                f"Set it for the whole stack; layers may differ in {quote(sorted(cls.per_layer_fields()))}."
            )

    def per_layer_checks(self) -> list[Check]:
        """What can be wrong with what `per_layer_config` changes."""
        spec = self.__dict__["_heterogeneity_spec"]
        skips = {i: set(overrides.get("skip", ())) for i, overrides in spec.per_layer_overrides.items()}
        unknown = sorted(set().union(*skips.values()) - set(SKIPPABLE))
        empty = [i for i, skip in skips.items() if skip.issuperset(SKIPPABLE)]
        first_layers = {self.layer_types.index(kind) for kind in self.layer_types}
        lengthless = sorted(i for i in first_layers if "self_attn" in skips.get(i, ()))
        return [
            Check(
                self.has_sequence_bias and self.is_heterogeneous_in("num_attention_heads"),
                f"`per_layer_config` changes `num_attention_heads`, but `position_embedding_type` "
                f"{self.position_embedding_type} has one bias per head, shared by the layers.",
                "Keep the heads equal, or use another `position_embedding_type`.",
            ),
            Check(
                bool(unknown),
                f"`per_layer_config` skips {quote(unknown)}.",
                f"A layer can skip {' or '.join(f'`{name}`' for name in SKIPPABLE)}.",
            ),
            Check(
                bool(empty),
                f"`per_layer_config` skips everything in layer {', '.join(map(str, empty))}.",
                "Keep one of the two, or lower `num_hidden_layers`.",
            ),
            Check(
                bool(lengthless),
                f"`per_layer_config` skips `self_attn` in layer {', '.join(map(str, lengthless))}, the first of its "
                "layer type, whose cache tells how long the past is.",
                "Skip it in a later layer of that type.",
            ),
        ]

    def is_heterogeneous_in(self, field: str) -> bool:
        """Whether `per_layer_config` gives some layer another value of `field`."""
        spec = self.__dict__.get("_heterogeneity_spec")
        return spec is not None and field in spec.per_layer_attributes
