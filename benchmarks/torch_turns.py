"""One generation in torch, by a stock class or by ours, timed; and the weights that all engines share."""

import copy
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from shapes import ENCODERS, SHAPES
from transformers.generation.streamers import BaseStreamer

import hf_variants
from hf_variants.conversion.engines import export_to_engine
from hf_variants.conversion.errors import ConversionError


# Of torch.float32: what is read to measure the memory's bandwidth, far more than a cache holds.
READ_BYTES = 1 << 30


def write_models(shape: str, folder: Path) -> None:
    """Write a model with random weights for its native class (`native/`) and ours (`ours/`)."""
    class_name, config_name, fields = {**SHAPES, **ENCODERS}[shape]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(
        **fields, bos_token_id=0, eos_token_id=None, pad_token_id=0, decoder_start_token_id=0
    )
    model = getattr(transformers, class_name)(config).eval()
    scatter(model)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=0, pad_token_id=0, decoder_start_token_id=0 if config.is_encoder_decoder else None
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "native")
    hf_variants.from_native(folder / "native").save_pretrained(folder / "ours")


def prepare(shape: str, folder: Path) -> None:
    """The same, and for CTranslate2 (`ctranslate2/`)."""
    write_models(shape, folder)
    (folder / "ctranslate2").mkdir()
    try:
        export_to_engine(folder / "ours", folder / "ctranslate2" / "model", "ctranslate2")
    except ConversionError as error:
        (folder / "ctranslate2" / "refusal.txt").write_text(str(error))


@torch.no_grad()
def scatter(model: torch.nn.Module) -> None:
    """Give a new model norm weights off one, biases off zero, and matrices that make tokens differ clearly."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.mul_(3.0)


class Moments(BaseStreamer):
    """Notes when each step's tokens come."""

    def __init__(self):
        self.tokens: list[torch.Tensor] = []
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(time.perf_counter())
        self.tokens.append(value)

    def end(self) -> None:
        pass


class TorchTurns:
    """
    Args:
        folder: which `prepare` filled.
        threads: of torch.
        engines: name -> (ours or stock, attention, options of `generate`).
    """

    def __init__(self, folder: str, threads: int, engines: dict[str, tuple[str, str | None, dict]]):
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.engines = engines
        config = transformers.AutoConfig.from_pretrained(Path(folder) / "native")
        auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        self.models = {
            "stock": auto.from_pretrained(Path(folder) / "native", dtype=torch.float32).eval(),
            "ours": auto.from_pretrained(Path(folder) / "ours", dtype=torch.float32).eval(),
        }
        self.models["ours int8"] = hf_variants.quantize_int8(copy.deepcopy(self.models["ours"]))

    def about(self) -> dict:
        """The size of the model, and what a step of decoding has to read."""
        model = self.models["ours"]
        config = model.config
        pair = config.is_encoder_decoder
        decoder = config.decoder if pair else config
        read = dict(model.get_decoder().named_parameters()) | dict(model.lm_head.named_parameters(prefix="lm_head"))
        head = model.lm_head.weight
        tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} - {id(head)}
        weights = {id(p): p.nbytes for p in read.values() if id(p) not in tables}
        kv_heads, head_dim = decoder.num_key_value_heads, decoder.head_dim
        return {
            "parameters": model.num_parameters(),
            "weight_bytes_per_step": sum(weights.values()),
            # Of self-attention, or, of an encoder-decoder, of the source, which is the longer.
            "cache_bytes_per_token": 4 * 2 * decoder.num_hidden_layers * kv_heads * head_dim,
        }

    def read_bandwidth(self) -> float:
        """Bytes a second, of the fastest of several ways to read memory once, on all threads."""
        numbers = torch.ones(READ_BYTES // 4)
        rows = numbers.view(-1, 4096)
        batches, vector = numbers.view(torch.get_num_threads(), -1, 4096), torch.ones(4096)
        columns = vector.expand(batches.shape[0], 4096).unsqueeze(2)
        ways = (numbers.sum, numbers.max, lambda: rows @ vector, lambda: torch.bmm(batches, columns))
        best = float("inf")
        for way in ways:
            for _ in range(3):
                begun = time.perf_counter()
                way()
                best = min(best, time.perf_counter() - begun)
        return READ_BYTES / best

    def prompts(self, context: int, batch: int) -> list[list[int]]:
        config = self.models["stock"].config
        generator = torch.Generator().manual_seed(context + batch)
        return torch.randint(1, config.vocab_size, (batch, context), generator=generator).tolist()

    def generate(self, engine: str, prompts: list[list[int]], new_tokens: int, **more: Any) -> Any:
        """Greedily, with exactly this many new tokens."""
        which, attention, options = self.engines[engine]
        model = self.models[which]
        if attention is not None and model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, **options, **more}
        if not engine.startswith("ours fast"):
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        with hf_variants.accelerate_decoding(model) as acceleration:
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        if acceleration.steps < new_tokens - 1:
            raise RuntimeError(f"The step was plain: {acceleration.why_plain}")
        return output

    def turn(self, engine: str, prompts: list[list[int]], new_tokens: int) -> dict:
        """
        Generate greedily.

        Returns:
            seconds until the first token, seconds from there to the last, and the tokens of every row.
        """
        streamer = Moments()
        begun = time.perf_counter()
        self.generate(engine, prompts, new_tokens, streamer=streamer)
        # First comes the prompt.
        moments = streamer.moments[1:]
        tokens = torch.stack(streamer.tokens[1:], dim=1)
        return {"prefill_s": moments[0] - begun, "decode_s": moments[-1] - moments[0], "tokens": tokens.tolist()}

    def compare_logits(self, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
        """
        How far ours are off the stock class's logits, as long as tokens are the same: the largest difference, in standard
        deviations of the logits.
        """
        outputs = {
            name: self.generate(name, prompts, new_tokens, return_dict_in_generate=True, output_logits=True)
            for name in ("stock eager", "ours plain", "ours fast")
        }
        expected = torch.stack(outputs["stock eager"].logits)
        result = {}
        for name in ("ours plain", "ours fast"):
            logits = torch.stack(outputs[name].logits)
            steps = 0
            while steps < new_tokens and (steps == 0 or torch.equal(
                logits[steps - 1].argmax(-1), expected[steps - 1].argmax(-1)
            )):  # fmt: skip
                steps += 1
            difference = (logits[:steps] - expected[:steps]).abs().max() / expected.std()
            result[name] = float(f"{difference.item():.1e}")
        return result
