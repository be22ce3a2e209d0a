"""Text from a model, through the engine that `dure run` uses.

python examples/generate.py [MODEL]
"""

from __future__ import annotations

import sys

from dure.models.download import resolve
from dure.serve.chat import ChatTemplate
from dure.serve.engine import Engine
from dure.serve.sampler import SamplingParams
from dure.serve.tokenizer import Detokenizer


def main(model: str) -> None:
    """Ask one question and print the answer as it comes."""
    with Engine.load(resolve(model), context=512) as engine:
        tokenizer = engine.tokenizer
        question = [{"role": "user", "content": "Explain in one sentence why the sky is blue."}]
        text = ChatTemplate.of(tokenizer).render(question)
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        detokenizer = Detokenizer(tokenizer)
        for token in engine.generate(ids, SamplingParams(temperature=0.2, top_p=0.9, seed=1), 64):
            if token in tokenizer.eos_ids:
                break
            print(detokenizer.push(token), end="", flush=True)
        print(detokenizer.flush())
        stats = engine.stats
        print(f"{(stats.tokens - 1) / stats.decode_s:.1f} tokens/s on {engine.threads} threads")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
