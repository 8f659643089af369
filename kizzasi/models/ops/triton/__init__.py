"""Kernels in Triton, on CUDA.

A kernel keeps its memory in registers, walks through time, and writes the memory down once in STEPS
tokens; backward walks the other way and computes what lies between again. What is summed over
programs is written apart and summed afterwards, never by atomic additions: results do not depend on
the order in which programs run.

The grids are of a batch row (or a row and a head) and of a block of channels. Widths are padded to
powers of two. Inputs may have any strides, but for the last dimension, and any float dtype; sums
are in float32, or in float64 where the input is.
"""
