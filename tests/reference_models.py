"""Tiny random models of ``transformers``, and dure's step program with their weights on the CPU.

Import this only where torch and transformers are there (they are no dependency of dure).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

import dure.library
from dure.compiler.pipeline import compile_program
from dure.models import shapes
from dure.models.config import ModelConfig
from dure.models.decoder import ROPE_TABLES, StepLimits, WeightTypes, step_program
from dure.models.rope import rope_tables
from dure.models.stored import program_name
from dure.models.weights import WeightSpec, hf_names, weight_specs
from dure.serve.kv import KVCache, Sequence
from dure.serve.work import BatchEntry, build_step

assert dure.library
Floats = npt.NDArray[np.float32]
LIMITS = StepLimits(
    tokens=64, sequences=3, pages=5, pool_pages=12, logit_rows=64, positions=80, query_rows=8
)


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights whose products keep their size; norms around what leaves a value as it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
                value += 0.2 * noise
            elif "embed" in name:
                value.copy_(noise)
            elif value.ndim == 1 or name.endswith("bias"):
                value.copy_(0.5 * noise)
            else:
                value.copy_(noise * value.shape[-1] ** -0.5)


def reference_model(kind: str, values: dict[str, Any]) -> Any:
    """A random model of this ``model_type``, in float32, with plain attention."""
    config = transformers.AutoConfig.for_model(kind, **values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    randomize(model)
    return model


def written_config(model: Any, folder: Path) -> ModelConfig:
    """What dure reads from the ``config.json`` that transformers writes."""
    model.config.save_pretrained(folder)
    return shapes.model_config(folder)


class Reference:
    """Weights of a model of transformers by dure's names, and its logits."""

    def __init__(self, model: Any, config: ModelConfig) -> None:
        self.model = model
        self.config = config
        self.state = {n: v.detach().numpy() for n, v in model.state_dict().items()}

    def weights(self) -> dict[str, Floats]:
        """Every weight of the step program."""
        names = hf_names(self.config)
        found: dict[str, Floats] = {}
        for spec in weight_specs(self.config):
            kind = spec.name.partition("_")[0]
            expert = self.config.experts is not None and kind in ("router", "gate", "up", "down")
            value = self.of_experts(spec) if expert else self.state[spec.in_file(names)]
            if "norm" in spec.name:
                value = value + np.float32(self.config.norm_offset)
            assert value.shape == spec.shape, (spec, value.shape)
            found[program_name(spec)] = np.ascontiguousarray(value)
        return found

    def of_experts(self, spec: WeightSpec) -> Floats:
        """Experts and router, as each family keeps them."""
        place = f"model.layers.{spec.layer}.mlp."
        kind, _, bias = spec.name.partition("_")
        suffix = "_bias" if bias else ""
        if kind == "router":
            router = "router" if self.config.family == "gpt_oss" else "gate"
            return self.state[f"{place}{router}.{bias or 'weight'}"]
        both = kind in ("gate", "up")
        value = self.state[f"{place}experts.{'gate_up' if both else 'down'}_proj{suffix}"]
        if self.config.family == "gpt_oss":
            value = value if bias else value.swapaxes(1, 2)
            return value[:, (0 if kind == "gate" else 1) :: 2] if both else value
        half = self.config.intermediate
        return value[:, half * (kind == "up") :][:, :half] if both else value

    def logits(self, ids: list[int]) -> Floats:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].numpy()


class Compiled:
    """The step program on the CPU, with caches in float32."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, Floats], workers: int | None = 2
    ) -> None:
        types = WeightTypes(
            {s.name: "float32" for s in weight_specs(config) if s.layer is None},
            tuple(
                {s.name: "float32" for s in weight_specs(config) if s.layer == layer}
                for layer in range(config.layers)
            ),
        )
        self.function = step_program(config, types, LIMITS, "float32")
        self.program = compile_program(self.function, workers=workers)
        values = dict(weights)
        for kind, rope in (("global", config.rope), ("local", config.local_rope)):
            if rope is not None:
                tables = rope_tables(rope, config.head_dim, LIMITS.positions)
                values |= dict(zip(ROPE_TABLES[kind], tables, strict=True))
        names = self.program.weight_types
        self.program.load({n: v for n, v in values.items() if n in names})
        self.program.allocate_states()
        self.cache = KVCache(
            sequences=LIMITS.sequences,
            pool_pages=LIMITS.pool_pages,
            pages_per_sequence=LIMITS.pages,
            page_size=LIMITS.page_size,
        )

    def step(self, parts: list[tuple[Sequence, list[int]]]) -> Floats:
        entries: list[BatchEntry] = []
        for sequence, ids in parts:
            self.cache.extend(sequence, len(ids))
            entries.append(BatchEntry(sequence, np.array(ids, np.int32), tuple(range(len(ids)))))
        inputs = build_step(self.cache, entries, LIMITS.query_rows).arrays()
        logits = self.program.run(inputs)["logits"].copy()
        for sequence, _ in parts:
            self.cache.commit(sequence)
        return logits
