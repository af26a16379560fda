"""Where a shape differs from what is done, with sources; nothing of this is a rule."""

from typing import Any


# (width of the FFN) / (width), gated networks at equal parameters, and T5-11B's.
USUAL_RATIO = {"mlp": 4.0, "glu": 8 / 3}


def advice(config: Any) -> list[str]:
    """Sentences about one stack; none where it is built as most are."""
    sentences: list[str] = []
    # Layers may differ; where they are alike, each sentence comes once.
    for layer in config.per_layer_config:
        skipped = getattr(layer, "skip", ())
        ratio, usual = layer.intermediate_size / layer.hidden_size, USUAL_RATIO[layer.ffn_type]
        if "mlp" not in skipped and not usual / 2 <= ratio <= usual * 2:
            gated = "gated networks have 8/3" if layer.ffn_type == "glu" else "most have 4"
            sentences.append(
                f"`intermediate_size` is {ratio:.3g} times `hidden_size`, where {gated} (https://arxiv.org/abs/1706.03762, "
                "https://arxiv.org/abs/2002.05202); T5-11B went to 64 (https://arxiv.org/abs/1910.10683)."
            )
        if "self_attn" not in skipped and not 64 <= layer.head_dim <= 256:
            sentences.append(
                f"`head_dim` is {layer.head_dim}, where most have 64 to 128 and some 256; kernels of FlashAttention end "
                "there (https://arxiv.org/abs/2307.08691)."
            )
    sentences = list(dict.fromkeys(sentences))
    aspect = config.hidden_size / config.num_hidden_layers
    if not 16 <= aspect <= 400:
        sentences.append(
            f"`hidden_size / num_hidden_layers` is {aspect:.3g}; the loss hardly changes for shapes near 100, and does far "
            "from it (https://arxiv.org/abs/2001.08361, figure 5)."
        )
    if config.vocab_size % 64:
        padded = -(-config.vocab_size // 64) * 64
        sentences.append(
            f"`vocab_size` {config.vocab_size:,} is no multiple of 64, which matrix products on a GPU are fastest with; "
            f"{padded:,} is (https://arxiv.org/abs/1909.08053 pads to 128 per device)."
        )
    return sentences
