"""The Triton kernels, one file per family, each with its launcher. The first CUDA call imports them, and Triton.

A launcher takes an operation's arguments and then its empty outputs, which it fills. It runs on the current device.
"""


class CannotCompile(Exception):
    """Triton cannot compile a kernel, or the GPU cannot hold it."""
