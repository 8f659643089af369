"""Checkpoints of other programs, one file per family. foreign.py says how to add one."""
