"""The Triton kernels, each with its launcher: the only importers of triton. Imported by the first CUDA call.

A launcher takes an operation's arguments and then its empty outputs, which it fills.
"""
