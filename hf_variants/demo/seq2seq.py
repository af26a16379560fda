"""The encoder-decoder demo: the 2017 architecture with real weights, from a `torch.nn.Transformer` checkpoint.

Fetch a model that marks the stress of Russian words, convert it, compare its output with its own code's, fine-tune it,
and take the stacks back out as a `torch.nn.Transformer`.
"""

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hf_variants.card import write_card
from hf_variants.conversion import from_torch_seq2seq, to_torch
from hf_variants.conversion.record import write_record
from hf_variants.conversion.report import Report
from hf_variants.conversion.verification import Check, VerificationReport

from ._common import fetch, prepare, say_where, step, train


PACKAGE = "ruaccent-predictor==1.2.0"
FILES = {
    "ruaccent/model/acc_model.pt": "6414337c709f3552f306fdc2b734852d6a0d0ee9e95165964f440f0df1d9ac11",
    "ruaccent/model/vocab.json": "a1edd5c13ce351c99abf616d1eb0cbc4efdd94d0c9133052bcfe82ded1198585",
    "ruaccent/accentor.py": "b73b4d54390ad116aaadacd920475c6e433b3d3314a205209d99a1e655421fe0",
}
SIZES = {"d_model": 256, "nhead": 8, "num_encoder_layers": 4, "num_decoder_layers": 4, "dim_feedforward": 1024}
# Its own code pads every text to this length and encodes without a padding mask.
LENGTH = 256
NEW_TOKENS = 64

SENTENCES = (
    "Мама мыла раму.", "Сегодня хорошая погода.", "Я иду домой.", "Кошка спит на диване.", "Дети играют во дворе.",
    "Вода в реке холодная.", "Он читает новую книгу.", "Завтра будет дождь.", "Мы живём в большом городе.",
    "Поезд пришёл вовремя.", "Сестра поёт песню.", "Брат чинит машину.", "Учитель пишет на доске.",
    "Весной цветут сады.", "Зимой рано темнеет.", "Осенью падают листья.", "Летом жарко и сухо.",
    "Бабушка печёт пироги.", "Дедушка ловит рыбу.", "Собака громко лает.", "Птицы летят на юг.",
    "Врач осмотрел больного.", "Художник рисует портрет.", "Студенты сдают экзамен.", "Солнце встаёт на востоке.",
    "Луна светит ночью.", "Море сегодня спокойное.", "Корабль вышел из порта.", "Самолёт набирает высоту.",
    "Дорога ведёт к замку.", "Старый мост закрыли.", "В лесу растут грибы.", "На столе лежит письмо.",
    "Окно выходит в сад.", "Дверь открыта.", "Хлеб стоит дёшево.", "Молоко в кувшине.", "Яблоки созрели рано.",
    "Часы показывают полдень.", "Музыка играет тихо.", "Улица была пуста.", "Народ собрался на площади.",
    "Писатель закончил роман.", "Город стоит на горе.", "Река впадает в море.", "Ветер гонит облака.",
    "Снег покрыл поля.", "Костёр горит ярко.", "Лодка плывёт к берегу.", "Ученик решил задачу.",
    "Праздник начался утром.", "Друзья встретились вечером.",
)  # fmt: skip


def run(output: Path, *, steps: int = 40) -> None:
    """See `hf_variants.demo.run`."""
    folders = {name: output / name for name in ("variant", "variant-tuned")}
    prepare(output, [*folders.values(), output / "torch.pt"])

    with step("Fetch a Russian stress marker (28 MB, once)"):
        weights, vocabulary, code = fetch(output / "download", PACKAGE, FILES)

    with step("Load it with its own code, around torch.nn.Transformer: the reference"):
        state = torch.load(weights, map_location="cpu", weights_only=True)
        vocab = json.loads(vocabulary.read_text(encoding="utf-8"))
        reference = _load(code).StressAccentTransformer(len(vocab), **SIZES, max_len=LENGTH)
        reference.load_state_dict(state)
        reference.eval()

    with step("Convert it to a variant, and save it with a tokenizer"):
        converted = from_torch_seq2seq(
            state,
            num_heads=SIZES["nhead"],
            embedding="embed.char_embed.weight",
            sinusoids="embed.pos_encoding",
            output="output_proj",
            dropout=0.1,
            decoder_start_token_id=vocab["<s>"],
            eos_token_id=vocab["</s>"],
            pad_token_id=vocab["<pad>"],
        )
        converted.save_pretrained(folders["variant"])
        character_tokenizer(vocab).save_pretrained(folders["variant"])
        model = AutoModelForSeq2SeqLM.from_pretrained(folders["variant"]).eval()
        tokenizer = AutoTokenizer.from_pretrained(folders["variant"])
        print(f"{type(reference).__name__} -> {type(model).__name__}, {model.num_parameters():,} parameters")

    with step(f"Proof: its weights, scores, and the same text as its own code on {len(SENTENCES)} sentences"):
        proof = VerificationReport(weights.name, folders["variant"].name)
        proof.checks = [
            _check_weights(converted, state),
            _check_scores(reference, model, tokenizer),
            _check_texts(reference, model, tokenizer),
        ]
        print(proof.to_markdown())
        if not proof.ok:
            raise RuntimeError("The variant is not the original")
        report = Report(
            source=str(weights),
            destination=str(folders["variant"]),
            direction="convert",
            model_type="torch.nn.Transformer",
            head="seq2seq_lm",
            tensors=len(state),
            parameters=model.num_parameters(),
            command="hf-variants demo --kind seq2seq",
            verification=proof,
        )
        write_record(folders["variant"], report.to_dict(), weights)
        write_card(folders["variant"])

    with step(f"Fine-tune it to leave the marks out: {steps} steps"):
        _fine_tune(model, tokenizer, steps)
        model.save_pretrained(folders["variant-tuned"])
        tokenizer.save_pretrained(folders["variant-tuned"])
        for sentence, text in zip(SENTENCES[:3], texts(model, tokenizer, SENTENCES[:3])):
            print(f"{sentence:<28} {text}")

    with step("Take the stacks back out as a torch.nn.Transformer"):
        torch.save(to_torch(converted).state_dict(), output / "torch.pt")

    say_where(
        {
            weights: "the original weights",
            folders["variant"]: "the variant: load it with AutoModelForSeq2SeqLM after `import hf_variants`",
            folders["variant-tuned"]: "the same, fine-tuned",
            output / "torch.pt": "the state dict of the torch.nn.Transformer",
        }
    )


def _check_weights(converted: PreTrainedModel, state: dict[str, torch.Tensor]) -> Check:
    """The stacks, taken back out, and what stands around them, bit by bit; the table of sinusoids is computed."""
    prefix = "transformer."
    back = {prefix + name: tensor for name, tensor in to_torch(converted).state_dict().items()}
    back["embed.char_embed.weight"] = converted.get_input_embeddings().weight
    back |= {f"output_proj.{name}": tensor for name, tensor in converted.get_output_embeddings().named_parameters()}
    stored = {name: tensor for name, tensor in state.items() if name != "embed.pos_encoding"}
    different = sorted(stored.keys() ^ back.keys()) or [n for n in stored if not torch.equal(stored[n], back[n])]
    seen = f"{len(stored)} tensors, taken back out" if not different else ", ".join(different[:6])
    return Check("weights", not different, seen)


@torch.no_grad()
def _check_scores(reference: torch.nn.Module, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Check:
    """Logits of both where the decoder is given the source's own characters, in float64: torch's kernels sum otherwise."""
    reference, model = (copy.deepcopy(each).double() for each in (reference, model))
    ids = _encode(tokenizer, SENTENCES[:8])
    given = ids[:, :NEW_TOKENS]
    causal = torch.nn.Transformer.generate_square_subsequent_mask(given.shape[1], dtype=torch.float64)
    theirs = reference(ids, given, tgt_mask=causal)
    ours = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=given).logits
    error = ((ours - theirs).abs().max() / theirs.std()).item()
    return Check(
        f"outputs on {given.numel()} characters", error < 1e-5, f"at most {error:.1e} of their spread, in float64"
    )


def _check_texts(reference: torch.nn.Module, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Check:
    expected = _own_texts(reference, tokenizer)
    made = texts(model, tokenizer, SENTENCES)
    for sentence, ours, theirs in list(zip(SENTENCES, made, expected))[:6]:
        print(f"{sentence:<28} {ours:<34} {'equal' if ours == theirs else 'DIFFERS: ' + theirs}")
    equal = sum(ours == theirs for ours, theirs in zip(made, expected))
    return Check(
        f"{NEW_TOKENS} greedy tokens", equal == len(SENTENCES), f"the text of {equal} of {len(SENTENCES)} sentences"
    )


def character_tokenizer(vocab: dict[str, int]) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters between `<s>` and `</s>`."""
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, vocab[name]) for name in ("<s>", "</s>")]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _load(code: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ruaccent_accentor", code)
    if spec is None or spec.loader is None:
        raise OSError(f"{code} cannot be imported. Remove the download and run the demo again.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _encode(tokenizer: PreTrainedTokenizerFast, sentences: tuple[str, ...]) -> torch.Tensor:
    return tokenizer(list(sentences), padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids


def _cut(tokenizer: PreTrainedTokenizerFast, tokens: torch.Tensor) -> list[str]:
    """Texts up to the first end token."""
    rows = [row[1:].tolist() for row in tokens]
    end = tokenizer.eos_token_id
    kept = [row[: row.index(end)] if end in row else row for row in rows]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in kept]


def texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sentences: tuple[str, ...]) -> list[str]:
    """What the variant writes, greedily. All of the padded input is attended to, as the original does."""
    ids = _encode(tokenizer, sentences)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1
    )
    return _cut(tokenizer, made)


def _own_texts(reference: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    made = []
    for first in tqdm(range(0, len(SENTENCES), 13), desc="Its own decoding", unit="batch", delay=1.0):
        ids = _encode(tokenizer, SENTENCES[first : first + 13])
        made += _cut(tokenizer, reference.generate(ids, max_len=NEW_TOKENS))
    return made


def _fine_tune(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    ids = _encode(tokenizer, SENTENCES[:8])[:, :48]
    labels = ids[:, 1:].masked_fill(ids[:, 1:] == tokenizer.pad_token_id, -100)
    train(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, steps)
