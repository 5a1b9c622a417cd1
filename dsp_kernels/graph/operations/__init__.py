"""The one table of operations (table.py), and what its entries are made of."""
