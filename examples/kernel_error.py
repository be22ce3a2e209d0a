"""What an author sees when a kernel is wrong: the line, the rule, and a change that would work.

python examples/kernel_error.py
"""

from __future__ import annotations

import numpy as np

import dure
import dure.lang as dl


@dure.kernel
def product(a: dl.Tensor, b: dl.Tensor, c: dl.Tensor):
    """The tiles' inner sizes differ."""
    i = dl.program_id(0)
    left = dl.load(a, (i, 0), (16, 32))
    right = dl.load(b, (0, 0), (64, 16))
    dl.store(c, (i, 0), left @ right)


def main() -> None:
    """Launch it and print the error."""
    square = np.ones((64, 64), np.float32)
    try:
        product(square, square, np.zeros((64, 16), np.float32))
    except dure.KernelError as error:
        print(error)
        return
    raise AssertionError("the kernel was accepted")


if __name__ == "__main__":
    main()
