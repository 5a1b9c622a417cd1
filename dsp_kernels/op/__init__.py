"""The one operation: gather, grouped convolution, bias, residual, activation, scatter."""
