"""Tiny random models of ``transformers``, and their weights by dure's names.

Import this only where torch and transformers are there (they are no dependency of dure).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from step_runner import Floats

from dure.models import shapes
from dure.models.config import ModelConfig
from dure.models.stored import program_name
from dure.models.weights import WeightSpec, hf_names, weight_specs


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
