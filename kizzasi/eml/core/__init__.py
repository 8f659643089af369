"""eml-core's face: its trees, models, benchmark, events and JSON, to the digit where asked.

attention   `ToyEmlAttention` and its affine twin `BaselineAttention`; flat is what both are
model       `EmlModel`, the regressor of a fixed trunk
tree        `SafeTree`, which attention is made of
descent     the sequence of trials, by tensor operations; native is its way on the CPU, in C
benchmark   `run_benchmark`, `compare_eml_vs_baseline`
events, fields, rng    its records, its JSON, its random numbers
"""
