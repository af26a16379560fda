"""Checkpoints of other training code bases: the same logits and tokens as from the code that wrote them."""

import json
import math
import pickle
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import hf_variants
from hf_variants.conversion import convert, verify
from hf_variants.conversion.errors import ConversionError
from hf_variants.conversion.foreign import litgpt as litgpt_room
from hf_variants_cli import main


def randomise_(model):
    """Weights of which no two are alike, norms far from 1 and biases far from 0."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        spread = 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread + (parameter.ndim == 1) * 0.7
    return model.eval()


def same(expected, folder, length, vocab_size, bound=2e-5):
    """Logits to rounding, relative to their spread, and greedy tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours = expected(ids), model(ids).logits
    assert (ours - theirs).abs().max() < bound * theirs.std()
    tokens = ids[:1, : length // 2]
    for _ in range(length // 2 - 1):
        with torch.no_grad():
            tokens = torch.cat([tokens, expected(tokens)[:, -1:].argmax(-1)], dim=1)
    # No padding token, and no end of text.
    made = model.generate(ids[:1, : length // 2], max_new_tokens=length // 2 - 1, do_sample=False, pad_token_id=0)
    assert torch.equal(made, tokens)


# nanoGPT, as its README describes the model and the paper of GPT-2 does.
class NanoGPT(nn.Module):
    def __init__(self, width, heads, layers, context, vocab_size, bias):
        super().__init__()
        self.heads = heads

        def norm():
            return nn.LayerNorm(width, bias=bias)

        def block():
            attention = nn.ModuleDict(
                {"c_attn": nn.Linear(width, 3 * width, bias=bias), "c_proj": nn.Linear(width, width, bias=bias)}
            )
            network = nn.ModuleDict(
                {"c_fc": nn.Linear(width, 4 * width, bias=bias), "c_proj": nn.Linear(4 * width, width, bias=bias)}
            )
            return nn.ModuleDict({"ln_1": norm(), "attn": attention, "ln_2": norm(), "mlp": network})

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, width), "wpe": nn.Embedding(context, width),
                "h": nn.ModuleList(block() for _ in range(layers)), "ln_f": norm(),
            }
        )  # fmt: skip
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids):
        parts = self.transformer
        states = parts["wte"](ids) + parts["wpe"](torch.arange(ids.shape[1]))
        for block in parts["h"]:
            packed = block["attn"]["c_attn"](block["ln_1"](states))
            q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in packed.chunk(3, dim=-1))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            states = states + block["attn"]["c_proj"](mixed)
            states = states + block["mlp"]["c_proj"](F.gelu(block["mlp"]["c_fc"](block["ln_2"](states))))
        return self.lm_head(parts["ln_f"](states))


def nanogpt(folder, bias=True, compiled=False, masks=False, **more):
    arguments = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "block_size": 24,
        "bias": bias,
        "vocab_size": 50,
        "dropout": 0.1,
    }
    model = randomise_(NanoGPT(32, 4, 2, 24, 50, bias))
    state = model.state_dict()
    if masks:
        state |= {f"transformer.h.{n}.attn.bias": torch.ones(24, 24).tril()[None, None] for n in range(2)}
    state = {("_orig_mod." if compiled else "") + name: tensor for name, tensor in state.items()}
    content = {
        "model": state, "optimizer": {"state": {}}, "model_args": arguments | more, "iter_num": 3,
        "best_val_loss": torch.tensor(1.0), "config": {"device": "cpu"},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "ckpt.pt")
    return model


@pytest.mark.parametrize(("bias", "compiled", "masks"), [(True, False, True), (False, True, False)])
def test_nanogpt(bias, compiled, masks, tmp_path):
    model = nanogpt(tmp_path / "out", bias, compiled, masks)
    for source in (tmp_path / "out", tmp_path / "out" / "ckpt.pt"):
        destination = tmp_path / source.name.replace(".", "-") / "variant"
        report = convert(source, destination, verify=True)
        assert report.verification.ok
        same(model, destination, 20, 50)
    assert bool(report.passed_over) == masks
    assert verify(tmp_path / "out", destination).ok
    if not bias:
        return
    # And on to a type that every engine loads, which has biases.
    native = hf_variants.to_native(hf_variants.from_native(tmp_path / "out"))
    ids = torch.arange(20)[None]
    assert (native(ids).logits - model(ids)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_head": 2}, "n_kv_head"),
        ({"n_layer": 3}, "model.layers.2"),
        ({"n_layer": 1}, r"layers\.1"),
        ({"n_head": "four"}, "n_head"),
        ({"n_embd": 64}, "shape"),
    ],
)
def test_nanogpt_is_not_guessed(change, message, tmp_path):
    nanogpt(tmp_path / "out", **change)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "out", tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def test_nanogpt_with_other_masks_and_untied_heads(tmp_path):
    nanogpt(tmp_path / "out", masks=True)
    content = torch.load(tmp_path / "out" / "ckpt.pt")
    content["model"]["transformer.h.1.attn.bias"][..., 0, 3] = 1
    torch.save(content, tmp_path / "out" / "ckpt.pt")
    with pytest.raises(ConversionError, match=r"h\.1\.attn\.bias"):
        convert(tmp_path / "out", tmp_path / "variant")
    nanogpt(tmp_path / "out")
    content = torch.load(tmp_path / "out" / "ckpt.pt")
    content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"] + 1
    torch.save(content, tmp_path / "out" / "ckpt.pt")
    with pytest.raises(ConversionError, match=r"lm_head\.weight"):
        convert(tmp_path / "out", tmp_path / "variant")


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["ckpt.pt", "consolidated.00.pth", "lit_model.pth"])
def test_no_pickle_runs_code(name, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "params.json").write_text('{"dim": 8, "n_heads": 1, "n_layers": 1}')
    (source / "model_config.yaml").write_text("{n_embd: 8, n_head: 1, n_layer: 1}")
    content = {"model": {}, "model_args": {}, "other": _Touch(tmp_path / "ran")}
    with (source / name).open("wb") as stream:
        pickle.dump(content, stream)
    assert main(["convert", str(source / name), str(tmp_path / "variant")]) == 2
    assert "fault" not in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "variant").exists()


# Meta's model as the papers of Llama describe it: rotations as products of complex numbers.
class MetaLlama(nn.Module):
    def __init__(self, width, heads, kv_heads, layers, hidden, vocab_size, theta=10000.0, scaling=None):
        super().__init__()
        self.heads, self.kv_heads, self.theta, self.scaling = heads, kv_heads, theta, scaling
        size = width // heads

        def linear(a, b):
            return nn.Linear(a, b, bias=False)

        def block():
            attention = {
                "wq": linear(width, heads * size), "wk": linear(width, kv_heads * size),
                "wv": linear(width, kv_heads * size), "wo": linear(heads * size, width),
            }  # fmt: skip
            network = {"w1": linear(width, hidden), "w2": linear(hidden, width), "w3": linear(width, hidden)}
            return nn.ModuleDict(
                {
                    "attention": nn.ModuleDict(attention), "feed_forward": nn.ModuleDict(network),
                    "attention_norm": nn.RMSNorm(width, eps=1e-5), "ffn_norm": nn.RMSNorm(width, eps=1e-5),
                }
            )  # fmt: skip

        self.tok_embeddings = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(block() for _ in range(layers))
        self.norm, self.output = nn.RMSNorm(width, eps=1e-5), linear(width, vocab_size)

    def frequencies(self, size):
        made = [self.theta ** (-2 * n / size) for n in range(size // 2)]
        if self.scaling is None:
            return made
        # Llama 3.1: long waves are slowed, short ones kept, and those between mixed.
        scaled = []
        for frequency in made:
            turns = 8192 * frequency / (2 * math.pi)
            kept = min(max((turns - 1) / (4 - 1), 0), 1)
            scaled.append((1 - kept) * frequency / self.scaling + kept * frequency)
        return scaled

    def forward(self, ids):
        states, length = self.tok_embeddings(ids), ids.shape[1]
        size = self.tok_embeddings.embedding_dim // self.heads
        angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor(self.frequencies(size))
        turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

        def rotated(x):
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * turn[:, None]).flatten(-2)

        for block in self.layers:
            inside, parts = block["attention_norm"](states), block["attention"]
            q, k, v = (parts[name](inside).unflatten(-1, (-1, size)) for name in ("wq", "wk", "wv"))
            q, k, v = (x.transpose(1, 2) for x in (rotated(q), rotated(k), v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            states = states + parts["wo"](mixed.transpose(1, 2).flatten(2))
            inside, parts = block["ffn_norm"](states), block["feed_forward"]
            states = states + parts["w2"](F.silu(parts["w1"](inside)) * parts["w3"](inside))
        return self.output(self.norm(states))


def meta(folder, ranks=1, vocabulary_split=True, frequencies=False, scaling=None, theta=10000.0, **more):
    model = randomise_(MetaLlama(32, 4, 2, 2, 48, 40, theta, scaling))
    state = model.state_dict()
    folder.mkdir()
    dims = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
    dims["tok_embeddings"] = 0 if vocabulary_split else 1
    for rank in range(ranks):
        part = {}
        for name, tensor in state.items():
            dim = dims.get(name.split(".")[-2])
            part[name] = tensor if dim is None else tensor.chunk(ranks, dim)[rank].clone()
        if frequencies:
            part["rope.freqs"] = torch.tensor([theta ** (-2 * n / 8) for n in range(4)]).to(torch.bfloat16)
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    params = {
        "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5, "vocab_size": -1,
        "rope_theta": theta,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params | more))
    return model


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("form", ["vocabulary", "width", "scaled"])
def test_meta(ranks, form, tmp_path):
    if form == "scaled":
        scaled = {"use_scaled_rope": True, "rope_scaling_factor": 8}
        model = meta(tmp_path / "meta", ranks, scaling=8, theta=500000.0, **scaled)
    else:
        model = meta(tmp_path / "meta", ranks, form == "vocabulary", frequencies=form == "width")
    report = convert(tmp_path / "meta", tmp_path / "variant")
    same(model, tmp_path / "variant", 40, 40)
    assert list(report.passed_over) == (["rope.freqs"] if form == "width" else [])
    record = json.loads((tmp_path / "variant" / "conversion_report.json").read_text())
    assert len(record["source_sha256"]) == ranks
    # Every value is a copy.
    stored = load_file(tmp_path / "variant" / "model.safetensors")
    assert torch.equal(stored["model.layers.1.self_attn.q_proj.weight"], model.layers[1]["attention"]["wq"].weight)


def test_meta_to_llama(tmp_path):
    model = meta(tmp_path / "meta", 2)
    native = hf_variants.to_native(hf_variants.from_native(tmp_path / "meta"), "llama")
    ids = torch.arange(30)[None]
    assert (native(ids).logits - model(ids)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_scaled_rope": True}, "rope_scaling_factor"),
        ({"moe_args": {"num_experts": 16}}, "moe_args"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"n_kv_heads": 4}, "shape"),
        ({"n_layers": 0}, "n_layers"),
        ({"rope_theta": 100.0}, r"rope\.freqs"),
    ],
)
def test_meta_is_not_guessed(change, message, tmp_path):
    meta(tmp_path / "meta", 2, frequencies=True, **{k: v for k, v in change.items() if k != "rope_theta"})
    if "rope_theta" in change:
        path = tmp_path / "meta" / "params.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "meta", tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def test_meta_without_one_of_its_files(tmp_path):
    meta(tmp_path / "meta", 2)
    norm = torch.load(tmp_path / "meta" / "consolidated.01.pth")
    torch.save(norm | {"norm.weight": norm["norm.weight"] + 1}, tmp_path / "meta" / "consolidated.01.pth")
    with pytest.raises(ConversionError, match=r"norm\.weight"):
        convert(tmp_path / "meta", tmp_path / "variant")
    (tmp_path / "meta" / "consolidated.00.pth").unlink()
    with pytest.raises(ConversionError, match=r"01\.pth"):
        convert(tmp_path / "meta", tmp_path / "variant")


# Of LitGPT's config what its classes decide by, one row for each kind of model that it has.
LITGPT = {
    "pythia": {},
    "pythia, one norm": {"shared_attention_norm": True, "rotary_percentage": 0.5, "gelu_approximate": "tanh"},
    "phi": {"shared_attention_norm": True, "lm_head_bias": True},
    "llama": {
        "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "bias": False, "parallel_residual": False,
        "rotary_percentage": 1.0, "n_query_groups": 2, "intermediate_size": 56,
    },
    "llama 3.1": {
        "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "bias": False, "parallel_residual": False,
        "rotary_percentage": 1.0, "intermediate_size": 56, "rope_base": 500000,
        "rope_adjustments": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32,
        },
    },
    "condensed": {"rope_condense_ratio": 4, "rotary_percentage": 1.0},
    "linear": {"rope_adjustments": {"factor": 2.0}, "rotary_percentage": 1.0, "rope_interleave": True},
    "qwen": {
        "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "bias": False, "attn_bias": True, "head_size": 16,
        "parallel_residual": False, "rotary_percentage": 1.0, "n_query_groups": 1, "intermediate_size": 56,
        "norm_qk": True,
    },
    "olmo": {"name": "OLMo-tiny", "bias": False, "parallel_residual": False, "rotary_percentage": 1.0},
    "olmo 2": {
        "name": "OLMo-2-tiny", "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "bias": False, "norm_1": False,
        "norm_2": False, "post_attention_norm": True, "post_mlp_norm": True, "parallel_residual": False, "norm_qk": True,
        "norm_qk_type": "olmo2", "rotary_percentage": 1.0, "intermediate_size": 56,
    },
    "gemma 2": {
        "name": "Gemma-2-tiny", "norm_class_name": "RMSNorm", "mlp_class_name": "GemmaMLP", "bias": False,
        "gelu_approximate": "tanh", "parallel_residual": False, "post_attention_norm": True, "post_mlp_norm": True,
        "rotary_percentage": 1.0, "intermediate_size": 56, "scale_embeddings": True, "attention_scores_scalar": 12,
        "attention_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "sliding_window_size": 8,
        "sliding_window_indices": [1, 0],
    },
    "gemma 3": {
        "name": "Gemma-3-tiny", "norm_class_name": "RMSNorm", "mlp_class_name": "GemmaMLP", "bias": False,
        "gelu_approximate": "tanh", "parallel_residual": False, "post_attention_norm": True, "post_mlp_norm": True,
        "rotary_percentage": 1.0, "intermediate_size": 56, "scale_embeddings": True, "norm_qk": True,
        "sliding_window_size": 8, "sliding_window_indices": [1, 0], "rope_indices": [1, 0], "rope_base": 1000000,
        "rope_local_base_freq": 10000, "rope_adjustments": {"factor": 8.0},
    },
}  # fmt: skip
SIZES = {
    "n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 64, "vocab_size": 50, "padding_multiple": 8, "hf_config": {},
}  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("kind", LITGPT)
def test_litgpt(kind, tmp_path):
    package = pytest.importorskip("litgpt", reason="LitGPT is not among our tools: pip install litgpt")
    config = package.Config(**SIZES | LITGPT[kind])
    model = randomise_(package.GPT(config))
    torch.save(model.state_dict(), tmp_path / "lit_model.pth")
    (tmp_path / "model_config.yaml").write_text(yaml.dump(asdict(config)))
    convert(tmp_path, tmp_path / "variant", verify=True)
    same(model, tmp_path / "variant", 40, 50)


@pytest.mark.parametrize("kind", LITGPT)
def test_litgpt_config_with_every_key(kind, tmp_path):
    """As the package writes it, defaults and all; and each mechanism that no field expresses is refused."""
    config, _ = litgpt_room.config_of(SIZES | LITGPT[kind], "model_config.yaml")
    assert config.vocab_size == 56
    for key, value in {"n_expert": 4, "latent_attention": {"kv_lora_rank": 2}, "unheard_of": 1, "norm_1": 3}.items():
        with pytest.raises(ConversionError, match=key):
            litgpt_room.config_of(SIZES | LITGPT[kind] | {key: value}, "model_config.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_2": False}, "norms"),
        ({"mlp_class_name": "LLaMAMoE"}, "mlp_class_name"),
        ({"norm_class_name": "GroupNorm"}, "norm_class_name"),
        ({"rope_adjustments": {"factor": 2.0, "beta_fast": 32}}, "rope_adjustments"),
        ({"rope_adjustments": {"factor": 2.0}, "rope_condense_ratio": 2}, "rope_condense_ratio"),
        ({"rope_local_base_freq": 100, "rope_indices": [0, 1]}, "rope_indices"),
        ({"rotary_percentage": 0.0}, "rotary_percentage"),
    ],
)
def test_litgpt_is_not_guessed(change, message):
    with pytest.raises(ConversionError, match=message):
        litgpt_room.config_of(SIZES | change, "model_config.yaml")
