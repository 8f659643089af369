"""Kernels in Triton, on CUDA.

Memories with a vector for each channel (conv, decay_scan, selective_scan) stay in registers while a
kernel walks through time; it writes the memory down once in STEPS tokens, and backward walks the
other way and computes what lies between again. Matrix memories (memory, by scores and products) go
chunk by chunk, with matrix products on tensor cores: for any length, any decay, and float64 too.

What is summed over programs is written apart and summed afterwards, never by atomic additions:
results do not depend on the order in which programs run.

The grids are of a batch row (or a row and a head) and of a block of channels or a chunk. Widths are
padded to powers of two. Inputs may have any strides, but for the last dimension, and any float
dtype; sums are in float32, or in float64 where the input is.
"""
