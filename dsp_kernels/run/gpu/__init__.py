"""GPU kernels: memory layouts, networks, CUDA graphs."""
