"""How long layers take on this machine: a model of their time, measured once by ``dsp calibrate``."""
