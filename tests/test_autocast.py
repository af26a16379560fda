"""Under autocast, as Trainer runs `bf16` and `fp16`: outputs, losses and gradients are those of the stock class."""

import random

import pytest
import torch

import hf_variants
from hf_variants.conversion.family import family_of

from .native_rows import all_rows
from .parity import hostile_


# Whose classes mix dtypes between projections and scores, beside one of each plainer kind.
TYPES = [
    "bert",
    "codegen",
    "gpt_neo",
    "gptj",
    "hunyuan_v1_dense",
    "llama",
    "ministral3",
    "nanochat",
    "olmo2",
    "phi",
    "t5",
]
# CodeGen's fused projection sums the gradient of its input in another order.
OTHER_GRADIENTS = {"codegen"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", TYPES)
def test_training_step(model_type, dtype):
    family = family_of(model_type)
    options = all_rows()[model_type].draw(random.Random(f"{model_type}-7"))
    # Without dropout.
    stock = hostile_(family.native_class(family.primary)(family.config_map.native_class(**options))).eval()
    ours = hf_variants.from_native(stock).eval()
    ids = torch.randint(3, stock.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    losses, logits = [], []
    for model in (stock, ours):
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(input_ids=ids, labels=ids, **({} if family.is_seq2seq else {"use_cache": False}))
        outputs.loss.backward()
        losses.append(outputs.loss)
        logits.append(outputs.logits)
    assert torch.equal(*logits)
    assert torch.equal(*losses)
    if model_type not in OTHER_GRADIENTS:
        assert torch.equal(*(model.get_input_embeddings().weight.grad for model in (stock, ours)))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "starcoder2"])
def test_gradients_of_shared_key_heads(model_type):
    """Added up in the dtype of the rotated keys, which autocast rounds after they are repeated."""
    family = family_of(model_type)
    options = all_rows()[model_type].draw(random.Random(1))
    config = family.config_map.native_class(**options)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size = 4, 1, 8, 32
    stock = hostile_(family.native_class(family.primary)(config)).eval()
    ours = hf_variants.from_native(stock).eval()
    ids = torch.randint(3, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    for model in (stock, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
    assert torch.equal(*(model.get_input_embeddings().weight.grad for model in (stock, ours)))
