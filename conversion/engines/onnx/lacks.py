"""What a traced graph cannot do, by the field that asks for it."""

from collections.abc import Iterator

from ....model.configuration_variant import VariantConfig
from ....model.configuration_variant_seq2seq import VariantSeq2SeqConfig
from ...errors import Refusal
from ..fields import Lack, architectural_fields, in_the_way


def stacks_in_the_way(config: VariantConfig | VariantSeq2SeqConfig) -> dict[str, dict[str, tuple]]:
    """By stack, the fields that a graph does not compute, with their values and the reasons."""
    # The model itself is traced, and computes whatever its config says.
    known = architectural_fields()
    if isinstance(config, VariantConfig):
        found = in_the_way(config, lacks, known)
        if config.add_cross_attention:
            why = Refusal("the graph of a decoder alone is given no source")
            found["add_cross_attention"] = (True, why)
        return {"": found}
    return {name: in_the_way(getattr(config, name), lacks, known) for name in ("encoder", "decoder")}


def lacks(config: VariantConfig, layer: VariantConfig) -> Iterator[Lack]:
    """The rows for one layer of a stack."""
    yield Lack(
        any(_depends_on_length(config, parameters) for parameters in _rotations(config)),
        "rope_parameters",
        "its frequencies depend on how long the text is, and a graph has those of one length; set the rope_type to one "
        "that does not, or `max_position_embeddings` to the original context",
    )


def _rotations(config: VariantConfig) -> list[dict]:
    if config.position_embedding_type != "rope":
        return []
    found = [config.rope_parameters_of(index) for index in range(config.num_hidden_layers)]
    return [parameters for parameters in found if parameters is not None]


def _depends_on_length(config: VariantConfig, parameters: dict) -> bool:
    """As `dynamic_rope_update` of transformers chooses frequencies."""
    kind = parameters["rope_type"]
    if kind == "dynamic":
        # With a fixed `alpha` it is none.
        return not parameters.get("alpha")
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    return kind == "longrope" and original < config.max_position_embeddings
