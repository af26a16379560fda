"""Small stock checkpoints with all that lies beside a model, made here, and the variants that they convert to."""

import json
from argparse import Namespace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_variants.conversion import convert


TEXT = "The quick brown fox jumps over the lazy dog, hello world. " * 4
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
SMALL = {"vocab_size": 280, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}

MAKERS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, **SMALL,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SMALL)),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64, decoder_start_token_id=1,
            forced_eos_token_id=1, **SMALL,
        )
    ),
    "bert": lambda: BertForMaskedLM(
        BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=64, vocab_size=280, pad_token_id=1,
        )
    ),
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )


def make(root: Path) -> dict[str, dict[str, Path]]:
    """Folders by the kind of checkpoint, `"native"`, `"variant"`, `"foreign"` or `"plan"`, and model type or code base."""
    folders: dict[str, dict[str, Path]] = {"native": {}, "variant": {}, "foreign": {}, "plan": {}}
    for name, write_foreign in FOREIGN.items():
        folders["foreign"][name] = root / "foreign" / name
        folders["foreign"][name].mkdir(parents=True)
        write_foreign(folders["foreign"][name])
    folders["plan"]["recall"] = root / "plan"
    folders["plan"]["recall"].mkdir()
    write(root / "plan" / "plan.json", PLAN)
    for number, (name, maker) in enumerate(MAKERS.items()):
        torch.manual_seed(number)
        native = root / "native" / name
        maker().eval().save_pretrained(native)
        tokenizer().save_pretrained(native)
        (native / "LICENSE").write_text("Do as you like.\n")
        variant = root / "variant" / name
        convert(native, variant)
        folders["native"][name], folders["variant"][name] = native, variant
    return folders


# Sizes of a model of another code base, as nanoGPT and nanochat name them.
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 24}
PLAN = {
    "base": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "title": "A plan", "data": {"task": "recall", "pairs": 3, "keys": 8, "values": 8}, "seeds": 2,
    "training": {"steps": 1, "batch_size": 2}, "learning_rates": [1e-3],
    "configs": {"rope": {}, "none": {"position_embedding_type": "none"}},
}  # fmt: skip


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def nanogpt(folder: Path) -> None:
    layer = "transformer.h.0."
    shapes = {
        "transformer.wte.weight": (24, 16), "transformer.wpe.weight": (32, 16), "transformer.ln_f.weight": (16,),
        f"{layer}ln_1.weight": (16,), f"{layer}ln_2.weight": (16,), f"{layer}attn.c_attn.weight": (48, 16),
        f"{layer}attn.c_proj.weight": (16, 16), f"{layer}mlp.c_fc.weight": (64, 16), f"{layer}mlp.c_proj.weight": (16, 64),
    }  # fmt: skip
    arguments = {**SIZES, "block_size": 32, "bias": False, "dropout": 0.0}
    torch.save({"model": drawn(shapes), "model_args": arguments, "iter_num": 3, "config": {}}, folder / "ckpt.pt")


def nanochat(folder: Path) -> None:
    layer = "transformer.h.0."
    shapes = {
        "transformer.wte.weight": (64, 16), "lm_head.weight": (64, 16), f"{layer}mlp.c_fc.weight": (64, 16),
        f"{layer}mlp.c_proj.weight": (16, 64), **{f"{layer}attn.c_{x}.weight": (16, 16) for x in ("q", "k", "v", "proj")},
    }  # fmt: skip
    torch.save(drawn(shapes), folder / "model_000009.pt")
    write(folder / "meta_000009.json", {"step": 9, "model_config": {**SIZES, "n_kv_head": 2, "sequence_len": 32}})


def fairseq(folder: Path) -> None:
    layer = "decoder.layers.0."
    linears = {**{f"self_attn.{x}_proj": (16, 16) for x in ("q", "k", "v", "out")}, "fc1": (24, 16), "fc2": (16, 24)}
    shapes = {"decoder.embed_tokens.weight": (24, 16), "decoder.version": (1,)}
    for name, shape in linears.items():
        shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    for name in (f"{layer}self_attn_layer_norm", f"{layer}final_layer_norm"):
        shapes |= {f"{name}.weight": (16,), f"{name}.bias": (16,)}
    arguments = {
        "arch": "transformer_lm", "decoder_embed_dim": 16, "decoder_output_dim": 16, "decoder_input_dim": 16,
        "decoder_ffn_embed_dim": 24, "decoder_layers": 1, "decoder_attention_heads": 2, "tokens_per_sample": 32,
        "share_decoder_input_output_embed": True,
    }  # fmt: skip
    torch.save({"args": Namespace(**arguments), "cfg": None, "model": drawn(shapes)}, folder / "checkpoint_best.pt")


def x_transformers(folder: Path) -> None:
    shapes = {
        "token_emb.emb.weight": (24, 16), "to_logits.weight": (24, 16), "attn_layers.final_norm.gamma": (16,),
        "attn_layers.layers.0.0.0.gamma": (16,), "attn_layers.layers.1.0.0.gamma": (16,),
        "attn_layers.layers.1.1.ff.0.0.weight": (64, 16), "attn_layers.layers.1.1.ff.0.0.bias": (64,),
        "attn_layers.layers.1.1.ff.2.weight": (16, 64), "attn_layers.layers.1.1.ff.2.bias": (16,),
        **{f"attn_layers.layers.0.1.to_{x}.weight": (16, 16) for x in ("q", "k", "v", "out")},
    }  # fmt: skip
    torch.save(drawn(shapes), folder / "model.pt")
    layers = {"causal": True, "dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8}
    arguments = {"version": "2.31.10", "num_tokens": 24, "max_seq_len": 32, "use_abs_pos_emb": False}
    write(folder / "x_transformers.json", {**arguments, "attn_layers": layers})


FOREIGN = {"nanogpt": nanogpt, "nanochat": nanochat, "fairseq": fairseq, "x-transformers": x_transformers}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
