"""The reference: ``transformers`` running the GGUF's weights dequantized to float32.

``transformers`` fills in what a Gemma 3 GGUF does not say (the pattern of local and global layers,
the local rope base) from its own defaults; :func:`check_configuration` proves that it did.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from peers.protocol import Unsupported, Worker, serve


class TransformersWorker(Worker):
    """Eager float32 inference; slow and trusted."""

    def load(self, model: str, threads: int, sequences: int, context: int) -> dict[str, Any]:
        import torch
        import transformers

        self.torch = torch
        self.threads = threads
        torch.set_num_threads(threads)
        folder, name = str(Path(model).parent), Path(model).name
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        check_configuration(self.model.config)
        self.vocabulary = self.model.config.vocab_size
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def prefill(self, tokens: int) -> float:
        ids = self.torch.tensor([self.random_ids(tokens)])
        start = time.perf_counter()
        with self.torch.inference_mode():
            self.model(ids, logits_to_keep=1)
        return time.perf_counter() - start

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        prompt = self.torch.tensor([self.random_ids(context) for _ in range(sequences)])
        with self.torch.inference_mode():
            output = self.model(prompt, logits_to_keep=1)
            start = time.perf_counter()
            for _ in range(tokens):
                step = output.logits[:, -1:].argmax(-1)
                output = self.model(step, past_key_values=output.past_key_values)
            return time.perf_counter() - start

    def logits(self, ids: list[int]) -> np.ndarray:
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([ids])).logits[0].float().numpy()

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def greedy(self, messages: list[dict[str, str]], tokens: int) -> dict[str, Any]:
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        with self.torch.inference_mode():
            output = self.model.generate(
                self.torch.tensor([ids]), max_new_tokens=tokens, do_sample=False
            )
        new = output[0, len(ids) :].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return {"prompt": prompt, "prompt_ids": ids, "ids": new, "text": text}


def check_configuration(configuration: Any) -> None:
    """Raise unless a Gemma 3 model has its published layer pattern, rope bases and window.

    Five local layers to one global one, rope base 10,000 local and as in the file global, from the
    model family's technical report (arXiv 2503.19786) and its published ``config.json`` files.
    """
    if not configuration.model_type.startswith("gemma3"):
        return
    wanted = [
        "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention"
        for layer in range(configuration.num_hidden_layers)
    ]
    ropes = configuration.rope_parameters
    found = (
        configuration.layer_types == wanted,
        ropes["sliding_attention"]["rope_theta"] == 10_000.0,
        ropes["full_attention"]["rope_theta"] == 1_000_000.0,
        configuration.hidden_activation == "gelu_pytorch_tanh",
        configuration.query_pre_attn_scalar == configuration.head_dim,
    )
    if not all(found):
        raise Unsupported(f"transformers made a wrong Gemma 3 of this file: {configuration}")


if __name__ == "__main__":
    serve(TransformersWorker())
