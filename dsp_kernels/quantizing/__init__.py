"""Networks of 8-bit integers, made from packed ones and some images."""
