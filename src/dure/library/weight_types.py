"""How weights and KV cache lie on a chip, and rows of activations meet weights: as numbers, or as
codes of few bits with scales.

A weight matrix (K, N) is then codes (K, N) and scales, one a column or one for each ``group`` codes
of a column; where K is no multiple of the group, the last scale stands for the rest.  The numbers
that they stand for are the model's weights: a product takes these, and what the activations are in
is another choice.  The schemes are those that models are published in:

- ``int8``, ``fp8`` (e4m3): a float32 scale a column (output channel) for the layers' matrices;
- ``int4``: a 16-bit scale for each 128 codes of a column, symmetric, as AWQ and GPTQ do;
- ``mxfp4``: e2m1 codes with a power of two (e8m0) for each 32 of a column, the OCP microscaling
  format; in a mixture of experts only the experts are, as in gpt-oss.

Embeddings, the head, routers, norms and biases keep the type of the activations in all of them.

Values between ops have a type of 16 bits or more.  What meets int8 or fp8 weights may be quantized
to the same codes on the chip, with a float32 scale for each row (:mod:`dure.library.quantized`):
W8A8 with dynamic scales a token, as vLLM and TensorRT-LLM have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dure.errors import UsageError
from dure.ir import dtypes
from dure.ir.dtypes import DType
from dure.ir.types import TensorType
from dure.library.call import stored_bytes, tensor

Array: TypeAlias = "npt.NDArray[Any]"


@dataclass(frozen=True)
class WeightType:
    """Codes of a type with scales of a type, one for ``group`` codes of a column, or one a column
    where that is 0; ``top`` is the largest code of a quantized weight.  ``experts`` alone are
    quantized where a model has them.
    """

    name: str
    code: DType
    scale: DType
    group: int
    top: float
    experts: bool = False

    def types(self, k: int, n: int, *lead: int) -> tuple[TensorType, TensorType]:
        """Codes and scales of a matrix (K, N), or of several."""
        return tensor(self.code, *lead, k, n), tensor(self.scale, *lead, self.rows(k), n)

    def rows(self, k: int) -> int:
        """Scales of a column of ``k`` codes."""
        return -(-k // self.group) if self.group else 1

    def bytes(self, k: int, n: int, *lead: int) -> int:
        """What such a matrix takes."""
        return sum(stored_bytes(kind) for kind in self.types(k, n, *lead))

    def quantize(self, weight: Array) -> tuple[Array, Array]:
        """The codes and scales nearest to a matrix (..., K, N): what a program that loads a model
        of another type would store.
        """
        wide = np.asarray(weight, np.float32)
        lead, k, n = wide.shape[:-2], wide.shape[-2], wide.shape[-1]
        group = self.group or k
        padded = np.zeros((*lead, self.rows(k) * group, n), np.float32)
        padded[..., :k, :] = wide
        blocks = padded.reshape(*lead, self.rows(k), group, n)
        largest = np.abs(blocks).max(-2)
        if self.scale is dtypes.float8_e8m0fnu:
            # The microscaling formats' own rule: the power of two of the largest, less the codes'.
            power = np.floor(np.log2(np.where(largest > 0, largest, 1))) - np.floor(
                np.log2(self.top)
            )
            scale = np.exp2(np.clip(power, -127, 127)).astype(self.scale.numpy)
        else:
            scale = np.where(largest > 0, largest / self.top, 1).astype(self.scale.numpy)
        codes = blocks / scale.astype(np.float32)[..., None, :]
        if self.code.is_integer:
            codes = np.rint(codes)
        codes = np.clip(codes, -self.top, self.top).reshape(padded.shape)[..., :k, :]
        return codes.astype(self.code.numpy), scale

    def dequantize(self, codes: Array, scales: Array) -> npt.NDArray[np.float64]:
        """The numbers that codes and scales stand for, exactly."""
        k = codes.shape[-2]
        spread = np.repeat(scales.astype(np.float64), self.group or k, axis=-2)[..., :k, :]
        return codes.astype(np.float64) * spread


_BF16 = dtypes.bfloat16
#: Schemes by the names of the command line.
WEIGHT_TYPES: dict[str, WeightType] = {
    "int8": WeightType("int8", dtypes.int8, dtypes.float32, 0, 127),
    "fp8": WeightType("fp8", dtypes.float8_e4m3fn, dtypes.float32, 0, 448),
    "int4": WeightType("int4", dtypes.int4, _BF16, 128, 7),
    "mxfp4": WeightType("mxfp4", dtypes.float4_e2m1fn, dtypes.float8_e8m0fnu, 32, 6, experts=True),
}
#: Types of activations that hold every code exactly.
_HOLDING = ("bf16", "f16", "f32")


#: A KV cache's elements: numbers of eight bits, whose scale is one as in caches without a
#: calibrated one, or codes with a scale for each token and head (a head's D are quantized).
KV_TYPES = {name: WEIGHT_TYPES[name] for name in ("fp8", "int8")}

#: Types of rows that meet quantized weights: those whose weights have a scale a column.
ACTIVATION_TYPES = {name: WEIGHT_TYPES[name] for name in ("int8", "fp8")}


def weight_type(name: str, activation: str) -> WeightType | None:
    """The scheme of this name, or None for numbers of the activations' own type.

    Raises :class:`UsageError` for what is neither, and for activations that don't hold the codes.
    """
    return _chosen(WEIGHT_TYPES, "weights", name, activation)


def kv_type(name: str, activation: str) -> WeightType | None:
    """The type of a KV cache's elements, or None for numbers of the activations' own type.

    Raises :class:`UsageError` like :func:`weight_type`.
    """
    return _chosen(KV_TYPES, "kv", name, activation)


def activation_type(name: str, weights: str, activation: str) -> WeightType | None:
    """How rows that meet quantized weights are quantized, or None where they aren't.

    Raises :class:`UsageError` for what isn't a type of weights with a scale a column, and for one
    that isn't the weights' own.
    """
    if name == activation:
        return None
    asked = f"activations in {name[:40]} with weights in {weights[:40]}"
    if name not in ACTIVATION_TYPES:
        raise UsageError(
            asked,
            rule="activations that meet weights may be of --dtype's type, or "
            f"{', '.join(ACTIVATION_TYPES)}",
            fix=f"--activations {activation}",
        )
    if weights != name:
        raise UsageError(
            asked,
            rule="codes are multiplied with codes of their own type",
            fix=f"--weights {name} --activations {name}",
        )
    return ACTIVATION_TYPES[name]


def _chosen(
    types: Mapping[str, WeightType], option: str, name: str, activation: str
) -> WeightType | None:
    if name == activation:
        return None
    what = {"weights": "weights", "kv": "a KV cache"}[option]
    asked = f"{what} in {name[:40]} with activations in {activation}"
    if name not in types:
        raise UsageError(
            asked,
            rule=f"{what} may be of the activations' type, or "
            f"{', '.join(dict.fromkeys((activation, *types)))}",
            fix=f"--{option} {activation}",
        )
    if activation not in _HOLDING:
        raise UsageError(
            asked,
            rule="codes are multiplied in the activations' type, which must hold them: "
            f"{', '.join(_HOLDING)}",
            fix="--dtype bf16",
        )
    return types[name]
