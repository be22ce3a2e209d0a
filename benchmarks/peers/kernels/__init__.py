"""Single kernels, dure's beside those of the CPU's other libraries."""
