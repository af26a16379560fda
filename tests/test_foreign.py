"""Checkpoints of other training code bases: the same logits and tokens as from the code that wrote them."""

import json
import math
import pickle
from argparse import Namespace
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import hf_variants
from hf_variants.conversion import convert, from_x_transformers, verify
from hf_variants.conversion.errors import ConversionError
from hf_variants.conversion.foreign import litgpt as litgpt_room
from hf_variants.conversion.foreign import open_x_transformers
from hf_variants_cli import main


def randomise_(model):
    """Weights of which no two are alike, norms far from 1 and biases far from 0."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        spread = 0.5 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread + (parameter.ndim < 2) * 0.7
    return model.eval()


def same(expected, folder, length, vocab_size, bound=2e-5, first=0):
    """Logits to rounding, relative to their spread, and greedy tokens; of ids from `first` on."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(first, vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
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
    approximate = "none"

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
            inside = F.gelu(block["mlp"]["c_fc"](block["ln_2"](states)), approximate=self.approximate)
            states = states + block["mlp"]["c_proj"](inside)
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
    ("decayed", "approximate", "is_said"),
    [(8, "tanh", True), (10, "none", True), (None, "none", False)],
)
def test_nanogpt_before_and_after_its_gelu_changed(decayed, approximate, is_said, tmp_path):
    """Settings do not say which it is; the optimizer does, whose first group had the layers' matrices alone."""
    model = nanogpt(tmp_path / "out")
    model.approximate = approximate
    content = torch.load(tmp_path / "out" / "ckpt.pt")
    content["optimizer"] = {} if decayed is None else {"param_groups": [{"params": list(range(decayed))}]}
    torch.save(content, tmp_path / "out" / "ckpt.pt")
    report = convert(tmp_path / "out", tmp_path / "variant")
    same(model, tmp_path / "variant", 20, 50)
    assert any("gelu_new" in note for note in report.notes) != is_said


def test_nanogpt_of_its_first_weeks(tmp_path):
    """Without a word on biases and the vocabulary, and with a head of its own."""
    nanogpt(tmp_path / "out")
    content = torch.load(tmp_path / "out" / "ckpt.pt")
    del content["model_args"]["bias"], content["model_args"]["vocab_size"]
    table = torch.randn(50257, 32)
    content["model"] |= {"transformer.wte.weight": table, "lm_head.weight": table.flip(0).contiguous()}
    torch.save(content, tmp_path / "out" / "ckpt.pt")
    model = NanoGPT(32, 4, 2, 24, 50257, True)
    model.lm_head.weight = nn.Parameter(torch.empty(50257, 32))
    model.load_state_dict(content["model"])
    model.approximate = "tanh"
    convert(tmp_path / "out", tmp_path / "variant")
    same(model, tmp_path / "variant", 20, 50257)


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
    assert "a fault in" not in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "variant").exists()


# Meta's model as the papers of Llama describe it: rotations as products of complex numbers.
class MetaLlama(nn.Module):
    def __init__(
        self, width, heads, kv_heads, layers, hidden, vocab_size, theta=10000.0, scaling=None, size=None, windows=None
    ):
        super().__init__()
        self.heads, self.kv_heads, self.theta, self.scaling = heads, kv_heads, theta, scaling
        self.size = size = size or width // heads
        self.windows = windows or [None] * layers

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
        size, places = self.size, torch.arange(length)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor(self.frequencies(size))
        turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

        def rotated(x):
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * turn[:, None]).flatten(-2)

        for block, window in zip(self.layers, self.windows, strict=True):
            inside, parts = block["attention_norm"](states), block["attention"]
            q, k, v = (parts[name](inside).unflatten(-1, (-1, size)) for name in ("wq", "wk", "wv"))
            q, k, v = (x.transpose(1, 2) for x in (rotated(q), rotated(k), v))
            back = places[:, None] - places
            seen = (back >= 0) & (back < (window or length))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
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


MISTRAL = {
    "dim": 32, "n_layers": 4, "head_dim": 16, "hidden_dim": 48, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
    "vocab_size": 40,
}  # fmt: skip


def mistral(folder, pickled=False, tied=False, **more):
    """The same blocks, with head sizes of their own and windows."""
    windows = more.get("sliding_window") or more.get("_sliding_window")
    windows = (windows if isinstance(windows, list) else [windows]) * 4
    theta = more.get("rope_theta", 1000000.0)
    model = randomise_(MetaLlama(32, 4, 2, 4, 48, 40, theta, size=16, windows=windows[:4]))
    if tied:
        model.output.weight = model.tok_embeddings.weight
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(MISTRAL | more))
    state = {name: tensor for name, tensor in model.state_dict().items() if not tied or name != "output.weight"}
    if pickled:
        torch.save(state, folder / "consolidated.00.pth")
    else:
        save_file(state, folder / "consolidated.safetensors")
    return model


@pytest.mark.parametrize(
    ("native_type", "pickled", "tied", "more"),
    [
        ("llama", False, False, {"max_batch_size": 0, "model_type": "transformer", "moe": None}),
        ("mistral", True, False, {"sliding_window": 6, "rope_theta": 10000.0}),
        ("ministral", False, False, {"_sliding_window": [None, 6, 6, 6], "sliding_window": None, "rope_theta": 1e8}),
        ("mistral", False, True, {"tied_embeddings": True, "max_seq_len": 64}),
    ],
)
def test_mistral(native_type, pickled, tied, more, tmp_path):
    model = mistral(tmp_path / "mistral", pickled, tied, **more)
    report = convert(tmp_path / "mistral", tmp_path / "variant")
    same(model, tmp_path / "variant", 40, 40)
    config = hf_variants.VariantConfig.from_pretrained(tmp_path / "variant")
    assert config.max_position_embeddings == more.get("max_seq_len", 128_000)
    assert any("128000" in note for note in report.notes) == ("max_seq_len" not in more)
    native = hf_variants.to_native(hf_variants.from_native(tmp_path / "mistral"), native_type)
    ids = torch.arange(30)[None]
    assert (native(ids).logits - model(ids)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 6}, "no `rope_theta`.*10000 for Mistral 7B 0.1"),
        ({"sliding_window": [6, None, 6], "rope_theta": 1e4}, r"`sliding_window` in .*divides the 4 layers"),
        ({"sliding_window": [6, 7], "rope_theta": 1e4}, r"windows of \[6, 7\] positions"),
        ({"sliding_window": 6, "_sliding_window": 6}, "Remove one of them"),
        ({"moe": {"num_experts": 8}}, "`moe`"),
        ({"vision_encoder": {"hidden_size": 8}}, "`vision_encoder`"),
        ({"yarn": {"factor": 4}}, "`yarn`"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"head_dim": 8}, "shape"),
        ({"n_layers": 5}, r"model\.layers\.4"),
        ({"n_layers": 10**9}, "`n_layers` in .*no checkpoint has so many"),
    ],
)
def test_mistral_is_not_guessed(change, message, tmp_path):
    mistral(tmp_path / "mistral")
    (tmp_path / "mistral" / "params.json").write_text(json.dumps(MISTRAL | change))
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "mistral", tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


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


@pytest.mark.parametrize("config", ["model_config.yaml", "lit_config.json"])
def test_litgpt_of_old_releases(config, tmp_path):
    """Queries, keys and values of a group lay together until 0.5.4, under another name."""
    width, size, groups = 32, 8, 2
    shapes = {"attn.qkv": (64, width), "attn.proj": (width, width), "mlp.fc_1": (56, width), "mlp.fc_2": (56, width)}
    shapes |= {"mlp.proj": (width, 56), "norm_1": (width,), "norm_2": (width,)}
    state = {
        f"transformer.h.{n}.{name}.weight": torch.randn(shape) for n in range(2) for name, shape in shapes.items()
    }
    state |= {name: torch.randn(56, width) for name in ("transformer.wte.weight", "lm_head.weight")}
    state["transformer.ln_f.weight"] = torch.randn(width)
    values = SIZES | LITGPT["llama"]
    old = {}
    for name, tensor in state.items():
        if "attn.qkv" in name:
            queries, keys, values_ = tensor.split([width, groups * size, groups * size])
            parts = zip(queries.chunk(groups), keys.chunk(groups), values_.chunk(groups), strict=True)
            old[name.replace("attn.qkv", "attn.attn")] = torch.cat([part for group in parts for part in group])
        else:
            old[name] = tensor
    for folder, tensors in {"new": state, "old": old}.items():
        (tmp_path / folder).mkdir()
        torch.save(tensors, tmp_path / folder / "lit_model.pth")
    (tmp_path / "new" / "model_config.yaml").write_text(yaml.dump(values))
    if config == "lit_config.json":
        values = {"_" + key.removesuffix("_name") if "class" in key else key: x for key, x in values.items()}
    (tmp_path / "old" / config).write_text(json.dumps(values) if config.endswith("json") else yaml.dump(values))
    new, made = (hf_variants.from_native(tmp_path / folder).state_dict() for folder in ("new", "old"))
    assert new.keys() == made.keys()
    assert all(torch.equal(new[name], made[name]) for name in new)


@pytest.mark.parametrize(
    ("said", "windows"),
    [
        ({}, "SSS"),
        ({"sliding_window_layer_placing": "all"}, "SSS"),
        ({"sliding_window_layer_placing": "interleaved"}, "SFS"),
        ({"sliding_window_layer_placing": 2}, "SFS"),
        ({"sliding_window_indices": [0, 1, 0, 1, 1]}, "FSF"),
    ],
)
def test_litgpt_says_which_layers_have_windows(said, windows):
    config, _ = litgpt_room.config_of(SIZES | {"n_layer": 3, "sliding_window_size": 8} | said, "model_config.yaml")
    assert "".join({"sliding_attention": "S", "full_attention": "F"}[kind] for kind in config.layer_types) == windows


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
        ({"sliding_window_size": 8, "sliding_window_layer_placing": 3}, "sliding_window_layer_placing"),
        ({"sliding_window_size": 8, "sliding_window_indices": [1]}, "sliding_window_indices"),
    ],
)
def test_litgpt_is_not_guessed(change, message):
    with pytest.raises(ConversionError, match=message):
        litgpt_room.config_of(SIZES | change, "model_config.yaml")


# nanochat, as its README describes the model: norms without weights, and a rotation by the negative angle.
class NanoChat(nn.Module):
    def __init__(self, width, heads, kv_heads, layers, vocab_size, rows):
        super().__init__()
        self.heads, self.size, self.vocab_size = heads, width // heads, vocab_size

        def linear(a, b):
            return nn.Linear(a, b, bias=False)

        def block():
            attention = {
                "c_q": linear(width, width), "c_k": linear(width, kv_heads * self.size),
                "c_v": linear(width, kv_heads * self.size), "c_proj": linear(width, width),
            }  # fmt: skip
            network = {"c_fc": linear(width, 4 * width), "c_proj": linear(4 * width, width)}
            return nn.ModuleDict({"attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(network)})

        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(rows, width), "h": nn.ModuleList(block() for _ in range(layers))}
        )
        self.lm_head = linear(width, rows)

    def forward(self, ids):
        def norm(x):
            return x / (x.pow(2).mean(-1, keepdim=True) + 2**-23).sqrt()

        angles = torch.arange(ids.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, self.size, 2) / self.size)
        turn = torch.polar(torch.ones_like(angles), -angles)

        def rotated(x):
            turned = torch.complex(*x.chunk(2, dim=-1)) * turn[:, None]
            return torch.cat([turned.real, turned.imag], dim=-1)

        states = norm(self.transformer["wte"](ids))
        for block in self.transformer["h"]:
            inside, parts = norm(states), block["attn"]
            q, k, v = (parts[f"c_{name}"](inside).unflatten(-1, (-1, self.size)) for name in "qkv")
            q, k, v = (x.transpose(1, 2) for x in (norm(rotated(q)), norm(rotated(k)), v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            states = states + parts["c_proj"](mixed.transpose(1, 2).flatten(2))
            states = states + block["mlp"]["c_proj"](F.relu(block["mlp"]["c_fc"](norm(states))).square())
        logits = self.lm_head(norm(states))[..., : self.vocab_size]
        return 15 * torch.tanh(logits / 15)


def nanochat(folder, step=7, tensors=None, **more):
    model = randomise_(NanoChat(32, 4, 2, 3, 50, 64))
    # As nanochat keeps it.
    model.transformer["wte"].weight.data = model.transformer["wte"].weight.data.bfloat16().float()
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.transformer.wte.weight"].bfloat16()
    folder.mkdir(exist_ok=True)
    torch.save(state | (tensors or {}), folder / f"model_{step:06d}.pt")
    sizes = {"sequence_len": 48, "vocab_size": 50, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32} | more
    description = {"step": step, "val_bpb": 1.2, "model_config": sizes, "user_config": {"run": "dummy"}}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(description))
    return model


def test_nanochat(tmp_path):
    neutral = {"resid_lambdas": torch.ones(3), "x0_lambdas": torch.zeros(3)}
    model = nanochat(tmp_path / "d3", 40, neutral, window_pattern="L")
    nanochat(tmp_path / "d3", 7)
    torch.save({}, tmp_path / "d3" / "model_000050.pt")
    report = convert(tmp_path / "d3", tmp_path / "variant", verify=True)
    assert report.verification.ok
    assert any("14 rows" in note for note in report.notes)
    same(model, tmp_path / "variant", 40, 50)
    convert(tmp_path / "d3" / "model_000007.pt", tmp_path / "of an earlier step")
    same(model, tmp_path / "of an earlier step", 8, 50)
    # And what transformers has of this name.
    native = hf_variants.to_native(hf_variants.from_native(tmp_path / "d3"), "nanochat")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert (native(ids).logits - model(ids)).abs().max() < 2e-5 * model(ids).std()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_pattern": "SSSL"}, "window_pattern"),
        ({"n_kv_head": 4}, "shape"),
        ({"n_layer": 4}, r"model\.layers\.3"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"tensors": {"x0_lambdas": torch.full((3,), 0.1)}}, "x0_lambdas"),
        ({"tensors": {"resid_lambdas": torch.full((3,), 1.1)}}, "resid_lambdas"),
        ({"tensors": {"value_embeds.2.weight": torch.zeros(64, 16)}}, "value_embeds"),
        ({"tensors": {"transformer.h.2.attn.ve_gate.weight": torch.zeros(2, 12)}}, "ve_gate"),
        ({"tensors": {"smear_lambda": torch.zeros(1)}}, "smear_lambda"),
        # All that a checkpoint of a later release has.
        (
            {
                "window_pattern": "SL",
                "tensors": {
                    "x0_lambdas": torch.full((3,), 0.1),
                    "value_embeds.2.weight": torch.zeros(64, 16),
                    "smear_gate.weight": torch.zeros(1, 24),
                    "backout_lambda": torch.zeros(1),
                },
            },
            r"x0_lambdas\).*value_embeds\.2\.weight\).*smear_gate\.weight\).*backout_lambda\)",
        ),
    ],
)
def test_nanochat_is_not_guessed(change, message, tmp_path):
    nanochat(tmp_path / "d3", **change)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "d3", tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


# fairseq's Transformer, as its papers describe it: a function of a state dict that has fairseq's names.
class Fairseq:
    def __init__(self, pair, before, learned, tied, one_table, norm_after_embedding, act, old):
        self.state, self.heads, self.width = {}, 4, 32
        self.pair, self.before, self.learned, self.old = pair, before, learned, old
        self.act = {"relu": F.relu, "gelu": F.gelu, "gelu_accurate": lambda x: F.gelu(x, approximate="tanh")}[act]
        generator = torch.Generator().manual_seed(0)

        def draw(name, *shape):
            drawn = torch.randn(*shape, generator=generator)
            self.state[name] = drawn * shape[-1] ** -0.5 if len(shape) > 1 else drawn * 0.5 + 0.7

        def affine(name, rows, columns=None):
            draw(f"{name}.weight", *(rows, columns) if columns else (rows,))
            draw(f"{name}.bias", rows)

        for stack, layers, hidden in (("encoder", 3, 40), ("decoder", 2, 48))[0 if pair else 1 :]:
            draw(f"{stack}.embed_tokens.weight", 44 if stack == "encoder" and not one_table else 50, 32)
            if learned:
                draw(f"{stack}.embed_positions.weight", 24 + 2, 32)
            else:
                self.state[f"{stack}.embed_positions._float_tensor"] = torch.ones(1)
            if norm_after_embedding:
                affine(f"{stack}.layernorm_embedding", 32)
            self.state[f"{stack}.version"] = torch.tensor([1.0 if old else 3.0])
            for n in range(layers):
                layer = f"{stack}.layers.{n}."
                kinds = ["self_attn", "encoder_attn"] if pair and stack == "decoder" else ["self_attn"]
                for kind in kinds:
                    if old:
                        draw(f"{layer}{kind}.in_proj_weight", 96, 32)
                        draw(f"{layer}{kind}.in_proj_bias", 96)
                    for name in () if old else ("q_proj", "k_proj", "v_proj"):
                        affine(f"{layer}{kind}.{name}", 32, 32)
                    affine(f"{layer}{kind}.out_proj", 32, 32)
                for number, name in enumerate([*(f"{kind}_layer_norm" for kind in kinds), "final_layer_norm"]):
                    affine(layer + (f"layer_norms.{number}" if old else name), 32)
                affine(f"{layer}fc1", hidden, 32)
                affine(f"{layer}fc2", 32, hidden)
            if before and not old:
                affine(f"{stack}.layer_norm", 32)
        if one_table:
            self.state["encoder.embed_tokens.weight"] = self.state["decoder.embed_tokens.weight"]
        if not tied:
            draw("decoder.embed_out" if old else "decoder.output_projection.weight", 50, 32)
        elif not old:
            self.state["decoder.output_projection.weight"] = self.state["decoder.embed_tokens.weight"]

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x, name):
        if f"{name}.weight" not in self.state:
            return x
        return F.layer_norm(x, (32,), self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def attend(self, x, memory, name, mask):
        if self.old:
            parts = zip(*(self.state[f"{name}.in_proj_{leaf}"].chunk(3) for leaf in ("weight", "bias")), strict=True)
            q, k, v = (F.linear(y, *part) for y, part in zip((x, memory, memory), parts, strict=True))
        else:
            q, k, v = (self.linear(y, f"{name}.{z}_proj") for y, z in zip((x, memory, memory), "qkv", strict=True))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf)
        return self.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.out_proj")

    def stack(self, name, ids, layers, memory=None, memory_mask=None):
        real = ids != 1
        places = real.long().cumsum(1) * real + 1
        if self.learned:
            positions = self.state[f"{name}.embed_positions.weight"][places]
        else:
            angles = places[..., None] * 10000.0 ** (-torch.arange(16) / 15)
            positions = torch.cat([angles.sin(), angles.cos()], -1) * real[..., None]
        x = self.norm(
            self.state[f"{name}.embed_tokens.weight"][ids] * 32**0.5 + positions, f"{name}.layernorm_embedding"
        )
        mask = real[:, None, None]
        if name == "decoder":
            mask = mask & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for n in range(layers):
            layer, number = f"{name}.layers.{n}.", 0

            def sublayer(x, kind, compute, layer=layer):
                nonlocal number
                norm = layer + (f"layer_norms.{number}" if self.old else f"{kind}_layer_norm")
                number += 1
                return x + compute(self.norm(x, norm)) if self.before else self.norm(x + compute(x), norm)

            x = sublayer(x, "self_attn", lambda x: self.attend(x, x, f"{layer}self_attn", mask))  # noqa: B023
            if memory is not None:
                x = sublayer(
                    x, "encoder_attn",
                    lambda x: self.attend(x, memory, f"{layer}encoder_attn", memory_mask),  # noqa: B023
                )  # fmt: skip
            x = sublayer(x, "final", lambda x: self.linear(self.act(self.linear(x, f"{layer}fc1")), f"{layer}fc2"))  # noqa: B023
        return self.norm(x, f"{name}.layer_norm")

    def __call__(self, ids, source=None):
        memory = None if source is None else self.stack("encoder", source, 3)
        x = self.stack("decoder", ids, 2, memory, None if source is None else (source != 1)[:, None, None])
        heads = ("decoder.output_projection.weight", "decoder.embed_out", "decoder.embed_tokens.weight")
        return x @ self.state[next(name for name in heads if name in self.state)].T


def fairseq(folder, pair, form, before, learned, tied, one_table, norm_after_embedding=False, act="relu", change=None):
    model = Fairseq(pair, before, learned, tied, one_table, norm_after_embedding, act, form == "old")
    values = {
        "activation_fn": act, "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0, "relu_dropout": 0.0,
        "layernorm_embedding": norm_after_embedding, "share_decoder_input_output_embed": tied, "decoder_embed_dim": 32,
        "decoder_output_dim": 32, "decoder_input_dim": 32, "decoder_ffn_embed_dim": 48, "decoder_layers": 2,
        "decoder_attention_heads": 4, "decoder_normalize_before": before, "decoder_learned_pos": learned,
        "max_target_positions": 24, "adaptive_softmax_cutoff": None, "quant_noise_pq": 0,
    }  # fmt: skip
    if pair:
        values |= {
            "share_all_embeddings": one_table, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 40, "encoder_layers": 3,
            "encoder_attention_heads": 4, "encoder_normalize_before": before, "encoder_learned_pos": learned,
            "max_source_positions": 24, "encoder_embed_path": None,
        }  # fmt: skip
    kind = "transformer_iwslt_de_en" if pair else "transformer_lm_gpt"
    change = dict(change or {})
    tensors = change.pop("tensors", {})
    values |= change
    content = {"model": model.state | tensors, "extra_state": {"epoch": 3}, "last_optimizer_state": {}, "args": None}
    training = {"arch": kind, "lr": [0.1], "optimizer": "adam", "data": "data-bin", "task": "translation"}
    if form == "flat in cfg":
        content["cfg"] = {"_name": None, "model": Namespace(**training | values), "task": Namespace()}
    elif form == "cfg":
        del values["max_target_positions"]
        values["_name"] = "transformer" if pair else "transformer_lm"
        content["cfg"] = {
            "model": values,
            "task": {"_name": "x", "max_target_positions": 24, "tokens_per_sample": 512},
        }
    else:
        content["args"] = Namespace(**training | values)
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "checkpoint_best.pt")
    (folder / "dict.txt").write_text("a 3\n")
    return model


@pytest.mark.parametrize(
    ("pair", "form", "before", "learned", "tied", "one_table", "norm_after_embedding", "act"),
    [
        (True, "args", False, False, True, True, False, "relu"),
        (True, "flat in cfg", True, False, True, False, False, "gelu_accurate"),
        (True, "cfg", False, True, False, False, True, "gelu"),
        (True, "old", True, False, False, False, False, "relu"),
        (False, "cfg", True, False, True, False, False, "relu"),
        (False, "args", False, True, False, False, True, "gelu"),
    ],
)
def test_fairseq(pair, form, before, learned, tied, one_table, norm_after_embedding, act, tmp_path):
    model = fairseq(tmp_path / "out", pair, form, before, learned, tied, one_table, norm_after_embedding, act)
    report = convert(tmp_path / "out", tmp_path / "variant", verify=True)
    assert report.verification.ok
    if not pair:
        same(model, tmp_path / "variant", 20, 50, first=4)
        return
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "variant").eval()
    generator = torch.Generator().manual_seed(1)
    source, ids = (torch.randint(4, 44, (2, length), generator=generator) for length in (17, 13))
    # Padding on either side, as fairseq has it in a source and in a target.
    source[1, :5], ids[1, 10:] = 1, 1
    with torch.no_grad():
        theirs = model(ids, source)
        made = ours(input_ids=source, attention_mask=(source != 1).long(), decoder_input_ids=ids).logits
    assert (made - theirs)[ids != 1].abs().max() < 2e-5 * theirs.std()
    tokens = torch.tensor([[2], [2]])
    for _ in range(9):
        tokens = torch.cat([tokens, model(tokens, source)[:, -1:].argmax(-1)], dim=1)
    out = ours.generate(source, max_new_tokens=9, do_sample=False)
    for theirs, made in zip(tokens.tolist(), out.tolist(), strict=True):
        end = theirs.index(2, 1) + 1 if 2 in theirs[1:] else None
        assert made[:end] == theirs[:end]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "lightconv"}, "lightconv"),
        ({"adaptive_softmax_cutoff": "10,20"}, "adaptive_softmax_cutoff"),
        ({"scale_heads": True}, "scale_heads"),
        ({"decoder_unheard_of": 1}, "decoder_unheard_of"),
        ({"decoder_layers": 3}, r"layers\.2"),
        ({"decoder_ffn_embed_dim": 32}, "shape"),
        ({"decoder_input_dim": 16}, "decoder_input_dim"),
        ({"activation_fn": "swish"}, "swish"),
        (
            {"share_decoder_input_output_embed": False, "tensors": {"decoder.adaptive_softmax.head": torch.ones(2)}},
            "adap",
        ),
        ({"tensors": {"decoder.output_projection.weight": torch.zeros(50, 32)}}, "output_projection"),
    ],
)
def test_fairseq_is_not_guessed(change, message, tmp_path):
    fairseq(tmp_path / "out", False, "args", True, False, True, False, change=change)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "out", tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def test_fairseq_with_other_objects_is_refused_with_the_way_out(tmp_path):
    folder = tmp_path / "out"
    fairseq(folder, False, "args", True, False, True, False)
    content = torch.load(folder / "checkpoint_best.pt", weights_only=False)
    torch.save(content | {"extra_state": {"meters": _Touch(tmp_path / "ran")}}, folder / "checkpoint_best.pt")
    for source in (folder, folder / "checkpoint_best.pt"):
        with pytest.raises(ConversionError, match="load_checkpoint_to_cpu"):
            convert(source, tmp_path / "variant")
    assert not (tmp_path / "ran").exists()


# The arguments of x-transformers' layers and of its wrapper, one row for each kind of model that fields express.
X_TRANSFORMERS = {
    "as it comes": ({}, {}),
    "tied": ({"norm_add_unit_offset": False}, {"tie_embedding": True, "post_emb_norm": True}),
    "rotary": ({"rotary_pos_emb": True, "ff_swish": True, "ff_glu": True, "use_rmsnorm": True, "ff_no_bias": True}, {}),
    "rotary, scaled": (
        {"rotary_pos_emb": True, "rotary_emb_dim": 8, "rotary_interpolation_factor": 2.0, "use_simple_rmsnorm": True,
         "rotary_base_rescale_factor": 3.0, "attn_kv_heads": 2}, {},
    ),
    "alibi": ({"alibi_pos_bias": True, "ff_relu_squared": True, "attn_one_kv_head": True}, {"use_abs_pos_emb": False}),
    "norms behind": ({"pre_norm": False, "ff_glu": True}, {}),
    "norms around": ({"sandwich_norm": True, "attn_qk_norm": True, "attn_qk_norm_scale": 7}, {"tie_embedding": True}),
    "norms of heads": ({"attn_qk_rmsnorm": True, "rotary_pos_emb": True, "attn_flash": True, "use_rmsnorm": True}, {}),
    "no positions": ({"pre_norm_has_final_norm": False, "attn_softclamp_logits": True}, {"use_abs_pos_emb": False}),
    "scales": ({"norm_add_unit_offset": False, "use_layerscale": True, "ff_post_act_ln": True, "ff_mult": 2.5}, {}),
    "dynamic tanh": ({"norm_add_unit_offset": False, "use_dynamic_tanh": True, "depth_scale_residual": 0.5}, {}),
    "sinks": ({"attn_head_learned_sink": True, "rotary_pos_emb": True, "attn_kv_heads": 2}, {}),
    "windows": ({"attn_max_attend_past": 5, "rotary_pos_emb": True}, {}),
    "bidirectional": ({"causal": False, "alibi_pos_bias": True}, {"max_seq_len": 0}),
    "bidirectional, no head": ({"causal": False}, {"return_only_embed": True}),
}  # fmt: skip


def x_arguments(kind):
    layers, wrapper = X_TRANSFORMERS[kind]
    layers = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 16, "causal": True} | layers
    return {"num_tokens": 50, "max_seq_len": 48, "attn_layers": layers} | wrapper


@pytest.mark.whole
@pytest.mark.parametrize("kind", X_TRANSFORMERS)
def test_x_transformers(kind, tmp_path):
    import x_transformers as package

    arguments = x_arguments(kind)
    layers = dict(arguments["attn_layers"])
    stack = (package.Decoder if layers.pop("causal") else package.Encoder)(**layers)
    model = randomise_(package.TransformerWrapper(**arguments | {"attn_layers": stack}))
    ours = from_x_transformers(model, arguments)
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(ids)
        made = ours(ids)
    made = made.last_hidden_state if arguments.get("return_only_embed") else made.logits
    assert (made - theirs).abs().max() < 2e-5 * theirs.std()
    if not arguments["attn_layers"]["causal"]:
        return
    # And as a folder.
    torch.save(package.AutoregressiveWrapper(model).state_dict(), tmp_path / "model.pt")
    (tmp_path / "x_transformers.json").write_text(json.dumps(arguments | {"version": "2.31.10"}))
    convert(tmp_path, tmp_path / "variant", verify=True)
    same(model, tmp_path / "variant", 40, 50)


@pytest.mark.whole
@pytest.mark.parametrize("shared", [False, True])
def test_x_transformers_of_two_stacks(shared):
    import x_transformers as package

    arguments = {
        "dim": 32, "tie_token_emb": shared, "enc_num_tokens": 50, "enc_max_seq_len": 32, "enc_depth": 2, "enc_heads": 4,
        "dec_num_tokens": 50, "dec_max_seq_len": 24, "dec_depth": 3, "dec_heads": 2, "dec_attn_dim_head": 16,
        "enc_ff_glu": True, "dec_rotary_pos_emb": shared, "dec_attn_qk_norm": shared, "enc_use_rmsnorm": True,
    }  # fmt: skip
    model = randomise_(package.XTransformer(**arguments))
    ours = from_x_transformers(model, arguments)
    generator = torch.Generator().manual_seed(1)
    source, ids = (torch.randint(0, 50, (2, length), generator=generator) for length in (20, 15))
    mask = torch.ones_like(source)
    mask[1, 12:] = 0
    with torch.no_grad():
        context = model.encoder(source, mask=mask.bool(), return_embeddings=True)
        theirs = model.decoder.net(ids, context=context, context_mask=mask.bool())
        made = ours(input_ids=source, attention_mask=mask, decoder_input_ids=ids).logits
    assert (made - theirs).abs().max() < 2e-5 * theirs.std()


@pytest.mark.parametrize("kind", X_TRANSFORMERS)
def test_x_transformers_arguments_are_used_or_refused(kind):
    """Without the package: of the tensors alone, every argument is known, and an unknown one is named."""
    arguments = x_arguments(kind)
    for where in ("attn_layers", None):
        changed = {**arguments, "attn_layers": dict(arguments["attn_layers"]), "version": "2.31.10"}
        (changed["attn_layers"] if where else changed)["unheard_of"] = 1
        with pytest.raises(ConversionError, match="unheard_of"):
            open_x_transformers({"token_emb.emb.weight": torch.zeros(50, 32)}, changed)


@pytest.mark.parametrize(
    ("layers", "wrapper", "message"),
    [
        ({"rel_pos_bias": True}, {}, "rel_pos_bias"),
        ({"shift_tokens": 1}, {}, "shift_tokens"),
        ({"attn_num_mem_kv": 4}, {}, "attn_num_mem_kv"),
        ({"layer_dropout": [0.1, 0.2]}, {}, "layer_dropout"),
        ({"alibi_pos_bias": True}, {}, "use_abs_pos_emb"),
        ({"use_dynamic_tanh": True}, {}, "norm_add_unit_offset"),
        ({"heads": 1}, {}, "[Oo]ne head"),
        ({"attn_qk_rmsnorm": True}, {}, "attn_qk_rmsnorm"),
        ({"alibi_pos_bias": True, "attn_kv_heads": 2}, {"use_abs_pos_emb": False}, "attn_kv_heads"),
        ({"cross_attend": True}, {}, "cross_attend"),
        ({"causal": None}, {}, "causal"),
        ({"attn_max_attend_past": 4, "causal": False}, {}, "attn_max_attend_past"),
        ({}, {"num_memory_tokens": 2}, "num_memory_tokens"),
        ({}, {"scaled_sinu_pos_emb": True}, "scaled_sinu_pos_emb"),
        ({}, {"emb_dim": 16}, "emb_dim"),
        ({}, {"version": "1.29.0"}, "version"),
        ({}, {"version": "2.30.0"}, "version"),
        ({}, {"version": "2.40.0"}, "version"),
        ({}, {"version": None}, "version"),
        ({}, {}, "lacks|missing|no tensor"),
    ],
)
def test_x_transformers_is_not_guessed(layers, wrapper, message, tmp_path):
    arguments = {**x_arguments("as it comes"), "version": "2.31.10"} | wrapper
    arguments["attn_layers"] |= layers
    torch.save({"token_emb.emb.weight": torch.zeros(50, 32)}, tmp_path / "model.pt")
    (tmp_path / "x_transformers.json").write_text(json.dumps(arguments))
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path, tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def litgpt_folder(folder):
    """A small Pythia as LitGPT keeps one, with a tokenizer and settings of generation beside it."""
    config = {**SIZES, "vocab_size": 24, "padding_multiple": 1, "padded_vocab_size": 24, "intermediate_size": 128,
              "name": "tiny", "bias": True, "rotary_percentage": 0.25, "norm_class_name": "LayerNorm"}  # fmt: skip
    shapes = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc": (128, 32), "mlp.proj": (32, 128)}
    shapes |= {"norm_1": (32,), "norm_2": (32,)}
    state = {"transformer.wte.weight": (24, 32), "transformer.ln_f.weight": (32,), "transformer.ln_f.bias": (32,)}
    state |= {"lm_head.weight": (24, 32)}
    for name, shape in shapes.items():
        for layer in range(2):
            state |= {f"transformer.h.{layer}.{name}.weight": shape, f"transformer.h.{layer}.{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    torch.save(
        {n: torch.randn(shape, generator=generator) * 0.3 for n, shape in state.items()}, folder / "lit_model.pth"
    )
    (folder / "model_config.yaml").write_text(yaml.dump(config))
    words = Tokenizer(WordLevel({"<eos>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    GenerationConfig(eos_token_id=[0, 3], temperature=0.5, do_sample=True).save_pretrained(folder)
    return folder


def test_what_lies_beside_a_checkpoint_of_litgpt_travels(tmp_path):
    source = litgpt_folder(tmp_path / "lit")
    report = convert(source, tmp_path / "variant")
    assert not report.tokenizer
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "variant")
    assert tokenizer("a b c")["input_ids"] == [1, 2, 3]
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "variant"), hf_variants.from_native(source)):
        assert (model.generation_config.eos_token_id, model.generation_config.temperature) == ([0, 3], 0.5)


def test_every_command_takes_checkpoints_of_other_code_bases(tmp_path, capsys):
    source = litgpt_folder(tmp_path / "lit")
    convert(source, tmp_path / "variant")
    said = []
    for folder in (source, tmp_path / "variant"):
        assert main(["doctor", str(folder), "--for", "gguf"]) == main(["cost", str(folder), "--json"]) == 0
        said.append(capsys.readouterr().out.replace(str(folder), "SRC"))
        assert (
            main(["generate", str(folder), "a b", "--max-new-tokens", "5", "--no-do-sample", "--min-new-tokens", "5"])
            == 0
        )
        # Without the line that says how fast it was.
        said[-1] += capsys.readouterr().out.split("[")[0]
        for command, *options in (["edit", "--layers", "1"], ["export", "--engine", "gguf"]):
            assert main([command, str(folder), str(tmp_path / f"{folder.name}-{command}"), *options]) == 0
            capsys.readouterr()
    assert said[0] == said[1]
    one, other = (load_file(tmp_path / f"{name}-edit" / "model.safetensors") for name in ("lit", "variant"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    files = [next((tmp_path / f"{name}-export").glob("*.gguf")).read_bytes() for name in ("lit", "variant")]
    assert files[0] == files[1]
    assert AutoTokenizer.from_pretrained(tmp_path / "lit-edit")("a b c")["input_ids"] == [1, 2, 3]
