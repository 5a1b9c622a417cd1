"""An interpreter of PTX: the CUDA kernels as nvcc compiles them, run on a CPU and checked."""
