"""One generation by onnxruntime, timed: the loop that `model.onnx` leaves to its user. Torch is not imported here."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class OnnxTurns:
    """
    Args:
        folder: with an exported decoder in `onnx/`.
        threads: of one generation.
        engines: names; there is one kind.
    """

    def __init__(self, folder: str, threads: int, engines: list[str]):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        model = Path(folder) / "onnx"
        self.session = onnxruntime.InferenceSession(str(model / "model.onnx"), options, ["CPUExecutionProvider"])
        self.given = [tensor.name for tensor in self.session.get_outputs()]
        self.past = {
            tensor.name: (tensor.shape[1], tensor.shape[3])
            for tensor in self.session.get_inputs()
            if tensor.name.startswith("past_key_values")
        }
        self.takes_positions = "position_ids" in [tensor.name for tensor in self.session.get_inputs()]
        ends = json.loads((model / "generation_config.json").read_text()).get("eos_token_id")
        self.ends = [] if ends is None else np.atleast_1d(ends)

    def turn(self, engine: str, prompts: list[list[int]], new_tokens: int) -> dict:
        """
        Generate greedily, with exactly this many new tokens.

        Returns:
            seconds until the first token, seconds from there to the last, and the tokens of every row.
        """
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        ids = np.array(prompts, dtype=np.int64)
        rows, length = ids.shape
        # Keys and values stay where onnxruntime has them.
        past = {
            name: value(np.zeros((rows, heads, 0, size), dtype=np.float32))
            for name, (heads, size) in self.past.items()
        }
        tokens: list[Any] = []
        moments: list[float] = []
        begun = time.perf_counter()
        while len(tokens) < new_tokens:
            fed = {"input_ids": value(ids), "attention_mask": value(np.ones((rows, length), dtype=np.int64)), **past}
            if self.takes_positions:
                positions = np.arange(length - ids.shape[1], length, dtype=np.int64)
                fed["position_ids"] = value(np.broadcast_to(positions, ids.shape).copy())
            made = dict(zip(self.given, self.session.run_with_ort_values(self.given, fed)))
            logits = made["logits"].numpy()[:, -1]
            logits[:, self.ends] = -np.inf
            ids = logits.argmax(-1)[:, None]
            tokens.append(ids[:, 0].tolist())
            moments.append(time.perf_counter())
            past = {name: made[name.replace("past_key_values", "present")] for name in past}
            length += 1
        return {
            "prefill_s": moments[0] - begun, "decode_s": moments[-1] - moments[0],
            "tokens": [list(row) for row in zip(*tokens)],
        }  # fmt: skip
