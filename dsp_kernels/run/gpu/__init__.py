"""GPU kernels: memory layouts, single convolutions, whole Programs, CUDA graphs."""
