"""Backends that run one convolution (convs.py) or a whole Program (programs.py), by kind of device."""
