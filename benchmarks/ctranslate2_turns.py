"""One generation by CTranslate2, timed. Torch is not imported here: its pool of threads would slow this one's."""

import time
from pathlib import Path
from typing import Any

import ctranslate2


class CTranslate2Turns:
    """
    Args:
        folder: with a model in `ctranslate2/model/`, or `ctranslate2/refusal.txt` on why there is none.
        threads: of one generation.
        engines: name -> what it computes in.
    """

    def __init__(self, folder: str, threads: int, engines: dict[str, str]):
        self.folder = Path(folder) / "ctranslate2"
        self.threads = threads
        self.engines = engines
        # One file where both sides have the same tokens, or one for each; a decoder's alone is another.
        self.is_pair = any((self.folder / "model").glob("s*_vocabulary.*"))
        self.loaded: dict[str, Any] = {}

    def runner(self, engine: str) -> Any:
        refusal = self.folder / "refusal.txt"
        if refusal.exists():
            raise ValueError(refusal.read_text())
        if engine not in self.loaded:
            kind = ctranslate2.Translator if self.is_pair else ctranslate2.Generator
            self.loaded[engine] = kind(
                str(self.folder / "model"),
                compute_type=self.engines[engine],
                intra_threads=self.threads,
                inter_threads=1,
            )
        return self.loaded[engine]

    def turn(self, engine: str, prompts: list[list[int]], new_tokens: int) -> dict:
        """
        Generate greedily.

        Returns:
            seconds until the first token, seconds from there to the last, and the tokens of every row.
        """
        runner = self.runner(engine)
        rows = [[f"<id_{index}>" for index in prompt] for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in rows]
        moments: list[float] = []

        def note(step: Any) -> bool:
            # Once for every row; the last row's is the step's.
            tokens[step.batch_id].append(step.token_id)
            if len(moments) <= step.step:
                moments.append(0.0)
            moments[step.step] = time.perf_counter()
            return False

        options = {"beam_size": 1, "callback": note}
        begun = time.perf_counter()
        if self.is_pair:
            runner.translate_batch(rows, max_decoding_length=new_tokens, min_decoding_length=new_tokens, **options)
        else:
            runner.generate_batch(
                rows, max_length=new_tokens, min_length=new_tokens, include_prompt_in_result=False, **options
            )
        return {"prefill_s": moments[0] - begun, "decode_s": moments[-1] - moments[0], "tokens": tokens}
