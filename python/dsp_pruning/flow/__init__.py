"""Which channels of a traced network are zero, constant, tied or read."""
