"""Baichuan 2 against its published computation, written out: transformers has no class for it."""

import math
import random

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_variants.conversion.families.baichuan import BaichuanConfig
from tests.parity import Row


def power_of_two_slopes(heads: int) -> list[float]:
    start = 2.0 ** (-8.0 / heads)
    return [start ** (i + 1) for i in range(heads)]


def slopes(heads: int) -> torch.Tensor:
    """In Python's floats, as published, and rounded to float32 at the end."""
    below = 2 ** int(math.log2(heads))
    return torch.tensor(power_of_two_slopes(below) + power_of_two_slopes(2 * below)[::2][: heads - below])


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(self.weight.dtype)


class Mixer(nn.Module):
    """Self-attention; under that name transformers would take it for a class without a choice of backends."""

    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def rotated(self, x, positions):
        """In float32, with a table in float32."""
        frequencies = 1.0 / (10000.0 ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim))
        angles = torch.cat([positions[..., None].float() * frequencies] * 2, dim=-1)[:, None]
        first, second = x.float().chunk(2, dim=-1)
        return (x.float() * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).to(x.dtype)

    def forward(self, x, mask, positions, cache):
        query, key, value = (
            part.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            for part in self.W_pack(x).split(self.config.hidden_size, dim=-1)
        )
        has_rope = self.config.max_position_embeddings is not None
        if has_rope:
            query, key = self.rotated(query, positions), self.rotated(key, positions)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if has_rope and self.config._attn_implementation == "sdpa":
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            scores = query @ key.transpose(2, 3)
            if has_rope:
                scores = scores * self.head_dim**-0.5 + mask
            else:
                # The published code adds the mask first to the biases, which every finite mask value swallows.
                places = torch.arange(key.shape[2], dtype=torch.float32)
                biases = (slopes(query.shape[1])[:, None, None] * places).to(x.dtype)
                scores = torch.max(
                    scores / math.sqrt(self.head_dim) + (mask + biases), torch.tensor(torch.finfo(x.dtype).min)
                )
            output = scores.softmax(-1) @ value
        return self.o_proj(output.transpose(1, 2).reshape(x.shape))


class GatedMLP(nn.Module):
    def __init__(self, config: BaichuanConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Mixer(config, layer_idx)
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, mask, positions, cache):
        x = x + self.self_attn(self.input_layernorm(x), mask, positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class BaichuanForCausalLM(PreTrainedModel, GenerationMixin):
    """The reference."""

    config_class = BaichuanConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.model.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, labels=None,
        **kwargs,
    ):  # fmt: skip
        # Its name since transformers 5.24.
        past_key_values = kwargs.pop("cache", past_key_values)
        x = self.model.embed_tokens(input_ids)
        if (self.config.use_cache if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = past + x.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, length)[None]
        seen = torch.ones(length, length).tril().bool()[None, None, past:]
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None]
        mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        for layer in self.model.layers:
            x = layer(x, mask, position_ids, past_key_values)
        # Normalised at every call, which gives what the published head gives that keeps the result.
        logits = F.linear(self.model.norm(x), self.normalized_head())
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def normalized_head(self):
        return self.lm_head.weight if self.config.vocab_size == 64000 else F.normalize(self.lm_head.weight)


def baichuan(rng: random.Random):
    heads = rng.choice((2, 3, 5, 12))
    length = rng.choice(({"max_position_embeddings": 64}, {"max_position_embeddings": 64, "model_max_length": 48}))
    return {
        "vocab_size": 71,
        "hidden_size": heads * rng.choice((8, 16)),
        "intermediate_size": rng.choice((40, 56)),
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "hidden_act": rng.choice(("silu", "gelu")),
        "rms_norm_eps": rng.choice((1e-6, 1e-3)),
        "pad_token_id": rng.choice((None, 0, 5)),
        **rng.choice((length, {"model_max_length": 64})),
    }


ROWS = (Row("baichuan", baichuan, seeds=6, backends=("eager",), reference=BaichuanForCausalLM),)
