"""The index arguments of the library's kernels: int32 tensors whose elements address memory."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import dure.lang as dl

#: Every element addresses something that is there.
Places: TypeAlias = Annotated[dl.Tensor, dl.Index(0, None)]
#: How many rows something has: at least one.
RowCounts: TypeAlias = Annotated[dl.Tensor, dl.Index(1, None)]
#: -1 is absent.
OptionalPlaces: TypeAlias = Annotated[dl.Tensor, dl.Index(-1, None)]
#: -1 is absent, and no other element occurs twice.
DistinctPlaces: TypeAlias = Annotated[dl.Tensor, dl.Index(-1, None, unique=True)]
