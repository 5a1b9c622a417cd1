"""Ways to run one convolution or a whole Program; one room per kind of device."""
