"""From the Python source of a kernel to a tile function, without running the kernel's body."""
