"""Exact EML trees: compiled from expressions, or recovered from samples.

tree        nested eml(., .) over 1 and variables, evaluated and written out
compiler    `compile_expression` and `verify`
enumerate   `search_tree`: every tree up to a depth, meeting in the middle beyond
anneal      `train_master_formula`: soft trees by gradients, snapped and mended
"""
