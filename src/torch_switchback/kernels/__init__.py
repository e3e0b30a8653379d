"""The Triton kernels, one file per family, each with the plans of its operations. The first CUDA call imports them.

A plan takes an operation's arguments and then its empty outputs, which it fills, on the current device. It is made for
one specialization key, and takes even arguments that it does not read, so that all plans are called alike.
"""


class CannotCompile(Exception):
    """Triton cannot compile a kernel, or the GPU cannot hold it."""
