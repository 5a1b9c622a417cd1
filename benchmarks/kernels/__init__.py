"""Single convolutions with pytest-benchmark: ``pytest benchmarks/kernels --benchmark-enable``."""
