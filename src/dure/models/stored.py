"""A model in a file: its configuration, the element type of each weight, and their bytes.

The bytes are views of the mapped file; what isn't in a file (rope tables) is computed.  Where a
file's heads pair neighbours under rope (Llama's GGUF), the rows of q and k are put into the order
that pairs halves: the same model, and a rotation that reads whole vectors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dure.errors import ModelFileError
from dure.frontends.gguf import GGMLType, GGUFFile, open_gguf
from dure.models.config import ModelConfig
from dure.models.decoder import ROPE_TABLES, WeightTypes, layer_weight
from dure.models.gguf_config import config_from_gguf
from dure.models.rope import rope_tables
from dure.models.weights import GGUF_NAMES, WeightSpec, check_weights, weight_specs

#: Element types by the file's types.
ELEMENT_TYPES: dict[GGMLType, str] = {
    GGMLType.F32: "float32",
    GGMLType.F16: "float16",
    GGMLType.BF16: "bfloat16",
    GGMLType.Q8_0: "q8_0",
    GGMLType.Q4_0: "q4_0",
    GGMLType.Q4_1: "q4_1",
    GGMLType.Q5_0: "q5_0",
    GGMLType.Q5_1: "q5_1",
    GGMLType.Q4_K: "q4_k",
    GGMLType.Q5_K: "q5_k",
    GGMLType.Q6_K: "q6_k",
}
_DIVISORS = "rope_freqs.weight"
#: What rope turns, and its biases.
_ROTATED = frozenset({"q", "k", "q_bias", "k_bias"})


def program_name(spec: WeightSpec) -> str:
    """What the step program calls a weight."""
    return spec.name if spec.layer is None else layer_weight(spec.layer, spec.name)


@dataclass(frozen=True)
class StoredWeight:
    """One weight's place: what the program calls it, its shape, element type and bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: npt.NDArray[np.uint8]


class StoredModel:
    """An open GGUF file that holds a model which dure knows."""

    def __init__(self, file: GGUFFile) -> None:
        """Raises :class:`ModelFileError` unless the weights are those of its architecture."""
        self.file = file
        shapes = {name: info.shape for name, info in file.tensors.items()}
        stored = config_from_gguf(file.metadata, shapes, file.path)
        check_weights(stored, GGUF_NAMES, shapes.get)
        self._interleaved = stored.interleaved
        self.config: ModelConfig = replace(stored, interleaved=False)
        self.specs = weight_specs(self.config)
        for spec in self.specs:
            self._element_type(spec)

    @staticmethod
    def open(path: str | os.PathLike[str]) -> StoredModel:
        """Open and check a file; close it when it isn't a model."""
        file = open_gguf(path)
        try:
            return StoredModel(file)
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Let go of the file; views of its bytes stay valid."""
        self.file.close()

    def _element_type(self, spec: WeightSpec) -> str:
        name = spec.in_file(GGUF_NAMES)
        found = ELEMENT_TYPES.get(self.file.tensor(name).type)
        plain = found in ("float32", "float16", "bfloat16")
        if found is None or (len(spec.shape) == 1 and not plain):
            raise ModelFileError(
                f"tensor {name!r} is {self.file.tensor(name).type.name}",
                where=self.file.path,
                rule=f"matrices are {', '.join(t.name for t in ELEMENT_TYPES)}, vectors are floats",
                fix="use a file in one of these types, such as Q4_0, Q4_K_M or Q8_0",
            )
        return found

    @cached_property
    def types(self) -> WeightTypes:
        """The element types that the step program is built for."""
        model: dict[str, str] = {}
        layers: tuple[dict[str, str], ...] = tuple({} for _ in range(self.config.layers))
        for spec in self.specs:
            where = model if spec.layer is None else layers[spec.layer]
            where[spec.name] = self._element_type(spec)
        return WeightTypes(model, layers)

    @cached_property
    def bytes_per_step(self) -> int:
        """Bytes in the file of every weight that a step reads, each once (a tied head once)."""
        return sum(self.file.tensor(s.in_file(GGUF_NAMES)).nbytes for s in self._read_by_a_step())

    @property
    def weight_bytes(self) -> int:
        """Bytes in the file of every weight."""
        return sum(self.file.tensor(spec.in_file(GGUF_NAMES)).nbytes for spec in self.specs)

    def _read_by_a_step(self) -> list[WeightSpec]:
        """A step reads all of every weight but an embedding that is no head (of it, rows)."""
        untied = not self.config.tied
        return [s for s in self.specs if not (untied and s.name == "embedding")]

    def weights(self) -> list[StoredWeight]:
        """Every weight of the file, in the order in which a step uses them."""
        return [
            StoredWeight(
                program_name(spec), spec.shape, self._element_type(spec), self._bytes(spec)
            )
            for spec in self.specs
        ]

    def _bytes(self, spec: WeightSpec) -> npt.NDArray[np.uint8]:
        data = self.file.bytes_of(spec.in_file(GGUF_NAMES))
        if not self._interleaved or spec.name not in _ROTATED:
            return data
        size = self.config.head_dim
        rows = data.reshape(spec.shape[0] // size, size // 2, 2, -1)
        return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)

    def tables(self, positions: int) -> Mapping[str, npt.NDArray[np.float32]]:
        """The rope tables by the program's names, for so many positions."""
        config = self.config
        found = dict(
            zip(
                ROPE_TABLES["global"],
                rope_tables(config.rope, config.head_dim, positions, self._divisors()),
                strict=True,
            )
        )
        if config.local_rope is not None:
            local = rope_tables(config.local_rope, config.head_dim, positions)
            found |= dict(zip(ROPE_TABLES["local"], local, strict=True))
        return found

    def _divisors(self) -> npt.NDArray[np.float32] | None:
        """What Llama 3's files divide rope frequencies by."""
        info = self.file.tensors.get(_DIVISORS)
        if info is None:
            return None
        expected = (self.config.head_dim // 2,)
        values = None
        if info.shape == expected and info.type is GGMLType.F32:
            values = self.file.bytes_of(_DIVISORS).view(np.float32)
        if values is None or not (np.isfinite(values).all() and (values > 0).all()):
            raise ModelFileError(
                f"tensor {_DIVISORS!r} holds no divisors of rope frequencies",
                where=self.file.path,
                rule=f"it is F32 of the shape {expected}, finite and positive",
                fix="the file is damaged: fetch or convert it again",
            )
        return values
