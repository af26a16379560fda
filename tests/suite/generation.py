"""Generation in every mode and format, on the classes of a tester; a mixin for a test case."""

import copy

import torch
from transformers import set_seed
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache


MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "several": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}
NEW = 6


class GenerationTesterMixin:
    """To be mixed in beside transformers' `ModelTesterMixin`."""

    def _generators(self):
        """Every class that generates: a model without an end of text, its inputs, and how long they are in the result."""
        for model_class in self.all_generative_model_classes:
            set_seed(0)
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            for name in ("decoder_input_ids", "decoder_attention_mask"):
                inputs.pop(name, None)
            model = model_class(config).eval()
            model.generation_config.eos_token_id = None
            prompt = 1 if config.is_encoder_decoder else inputs["input_ids"].shape[1]
            with self.subTest(model_class.__name__):
                yield model, inputs, prompt

    def _generate(self, model, inputs, **options):
        set_seed(0)
        return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **options})

    def test_generation_modes_and_their_outputs(self):
        for model, inputs, prompt in self._generators():
            for options in MODES.values():
                plain = self._generate(model, inputs, **options)
                assert plain.shape[1] == prompt + NEW
                model.set_attn_implementation("eager")
                full = self._generate(
                    model, inputs, return_dict_in_generate=True, output_scores=True, output_logits=True,
                    output_attentions=True, output_hidden_states=True, **options,
                )  # fmt: skip
                assert full.sequences.shape == plain.shape
                assert len(full.scores) == NEW
                rows = plain.shape[0] // options.get("num_return_sequences", 1) * options.get("num_beams", 1)
                assert full.logits[0].shape == (rows, model.config.vocab_size)
                decoder = "decoder_" if model.config.is_encoder_decoder else ""
                hidden, attentions = full[f"{decoder}hidden_states"], full[f"{decoder}attentions"]
                assert (len(hidden), len(attentions)) == (NEW, NEW)
                assert hidden[0][-1].shape[:2] == (rows, prompt)
                assert attentions[-1][0].shape[0] == rows
                if decoder:
                    assert full.cross_attentions[-1][0].shape[-1] == inputs["input_ids"].shape[1]
                model.set_attn_implementation("sdpa")

    def test_generation_with_every_cache(self):
        for model, inputs, _ in self._generators():
            for options in (MODES["greedy"], MODES["beams"]):
                expected = self._generate(model, inputs, use_cache=False, **options)
                for cache in ({}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}):
                    if cache and "num_beams" in options:
                        continue
                    assert torch.equal(self._generate(model, inputs, **options, **cache), expected)

    def test_generation_returns_its_cache(self):
        for model, inputs, prompt in self._generators():
            for options, kind in (({}, DynamicCache), ({"cache_implementation": "static"}, StaticCache)):
                made = self._generate(model, inputs, return_dict_in_generate=True, **options).past_key_values
                if model.config.is_encoder_decoder:
                    assert isinstance(made, EncoderDecoderCache)
                    assert int(made.cross_attention_cache.get_seq_length()) == inputs["input_ids"].shape[1]
                    made = made.self_attention_cache
                assert isinstance(made, kind)
                assert int(made.get_seq_length()) == prompt + NEW - 1

    def test_generation_continues_from_a_cache(self):
        for model, inputs, _ in self._generators():
            if model.config.is_encoder_decoder:
                continue
            whole = self._generate(model, inputs, max_new_tokens=2 * NEW)
            first = self._generate(model, inputs, return_dict_in_generate=True)
            mask = torch.ones_like(first.sequences)
            cache = copy.deepcopy(first.past_key_values)
            second = model.generate(
                first.sequences, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False
            )
            assert torch.equal(second, whole)

    def test_generation_from_embeddings(self):
        for model, inputs, prompt in self._generators():
            embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
            del embeds["input_ids"]
            for options in (MODES["greedy"], MODES["beams"]):
                expected = self._generate(model, inputs, **options)
                skipped = 0 if model.config.is_encoder_decoder else prompt
                assert torch.equal(self._generate(model, embeds, **options), expected[:, skipped:])

    def test_generation_with_any_padding(self):
        for model, inputs, _ in self._generators():
            for holes in (slice(-3, None), slice(0, 3), slice(3, 5)):
                masked = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
                masked["attention_mask"][0, holes] = 0
                for options in (MODES["greedy"], MODES["beams"], MODES["sampling"]):
                    with_cache = self._generate(model, masked, **options)
                    assert torch.equal(self._generate(model, masked, use_cache=False, **options), with_cache)

    def test_left_padding_changes_no_logits(self):
        for model, inputs, _ in self._generators():
            if model.config.is_encoder_decoder:
                continue
            ids = inputs["input_ids"]
            padding = torch.zeros(ids.shape[0], 5, dtype=torch.long)
            mask = torch.cat([padding, torch.ones_like(ids)], 1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                expected = model(ids).logits[:, -1]
                padded = model(torch.cat([padding, ids], 1), attention_mask=mask, position_ids=positions).logits[:, -1]
            torch.testing.assert_close(padded, expected, atol=1e-5, rtol=1e-4)

    def test_assisted_generation(self):
        for model, inputs, _ in self._generators():
            one = {name: tensor[:1] for name, tensor in inputs.items()}
            expected = self._generate(model, one)
            assert torch.equal(self._generate(model, one, prompt_lookup_num_tokens=2), expected)
            assistant = copy.deepcopy(model)
            assert torch.equal(self._generate(model, one, assistant_model=assistant), expected)

    def test_generation_in_chunks(self):
        for model, inputs, _ in self._generators():
            if not model.config.is_encoder_decoder:
                chunked = self._generate(model, inputs, prefill_chunk_size=4)
                assert torch.equal(chunked, self._generate(model, inputs))

    def test_attention_implementations_agree(self):
        for model, inputs, _ in self._generators():
            texts = []
            for implementation in ("eager", "sdpa"):
                model.set_attn_implementation(implementation)
                texts.append(self._generate(model, inputs))
            assert torch.equal(*texts)

    def test_logits_to_keep(self):
        for model, inputs, _ in self._generators():
            if model.config.is_encoder_decoder:
                inputs = {**inputs, "decoder_input_ids": inputs["input_ids"]}
            with torch.no_grad():
                whole = model(**inputs).logits
                for kept in (1, 4, torch.tensor([2, 5])):
                    expected = whole[:, kept if torch.is_tensor(kept) else slice(-kept, None)]
                    torch.testing.assert_close(model(**inputs, logits_to_keep=kept).logits, expected)
