"""A residual block as one CUDA kernel."""
