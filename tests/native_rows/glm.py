"""GLM and GLM-4."""

import random

from tests.native_rows.llama import rope, sizes
from tests.parity import Row


def glm(rng: random.Random):
    config = sizes(rng)
    # Absent, the class fills in one half.
    parameters = rope(rng, config["head_dim"], partial=rng.choice((0.5, 0.75, 1.0))) if rng.random() < 0.8 else None
    return config | {
        "rope_parameters": parameters,
        "attention_bias": rng.random() < 0.5,
        "rms_norm_eps": rng.choice((1.5625e-07, 1e-3)),
        "hidden_act": rng.choice(("silu", "gelu")),
    }


ROWS = (Row("glm", glm, seeds=8), Row("glm4", glm, seeds=8))
