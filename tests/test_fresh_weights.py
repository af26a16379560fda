"""New weights are drawn as the stock class draws them: mean, spread and zeros of every tensor, over all native types."""

import random

import pytest
import torch

from hf_variants.conversion import rules
from hf_variants.conversion.family import family_of
from hf_variants.conversion.skeleton import stored_tensors
from tests.native_rows import all_rows


ROWS = all_rows()
# Of these, tensors that no field describes: a learned table that starts as sinusoids, sinks of zero, truncated normals.
OTHERWISE = ("distilbert", "granite_swa", "modernbert", "modernbert-decoder")
TYPES = [name for name, row in ROWS.items() if not row.reference and name not in OTHERWISE]
MODELS = 3


def fresh(model_type: str):
    """Tensors of a few new models under native names: of the stock class, and of ours."""
    family = family_of(model_type)
    config = family.config_map.native_class(**ROWS[model_type].draw(random.Random(f"{model_type}-0")))
    variant = family.config_map.to_variant(config, head=family.primary)
    torch.manual_seed(0)
    stock, ours = [], []
    for _ in range(MODELS):
        stock.append(stored_tensors(family.native_class(family.primary)(config)))
        shapes = {name: tensor.shape for name, tensor in stock[-1].items()}
        own = stored_tensors(family.variant_class(family.primary)(variant))
        steps = rules.plan(family.rules_for(family.primary), list(own), shapes, to_native=True)
        ours.append(dict(rules.run(steps, own.__getitem__, variant, shapes, to_native=True)))
    return stock, ours


@pytest.mark.parametrize("model_type", TYPES)
def test_new_weights(model_type):
    stock, ours = fresh(model_type)
    for name in stock[0]:
        theirs, made = (torch.cat([model[name].flatten().double() for model in models]) for models in (stock, ours))
        spread, count = max(theirs.std().item(), made.std().item()), theirs.numel()
        # Six standard errors of the mean, and of the standard deviation.
        assert abs(theirs.mean() - made.mean()) <= 6 * spread / count**0.5 + 1e-7, name
        assert abs(theirs.std() - made.std()) <= 6 * spread / (2 * count) ** 0.5 + 1e-7, name
        assert (theirs == 0).sum() == (made == 0).sum(), name
