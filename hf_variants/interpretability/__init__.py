"""
Variants in TransformerLens: hooks, caches, patching and lenses on every shape that a config can have.

Imported only when asked for, because it needs the extra `interpretability`:

    from hf_variants.interpretability import bridge, logit_lens

    lens = bridge(model, tokenizer)
    logits, cache = lens.run_with_cache(tokens)
    guesses = logit_lens(lens, cache["blocks.3.hook_resid_post"])
"""

from .adapter import VariantAdapter, bridge, logit_lens


__all__ = ["VariantAdapter", "bridge", "logit_lens"]
