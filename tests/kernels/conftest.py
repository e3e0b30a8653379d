"""These tests run kernels on CPU tensors, which Triton does when TRITON_INTERPRET=1 is set before it is imported.

Every other test wants compiled kernels, so ``make test`` runs this folder in a process of its own.
"""

import os
from unittest import mock

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def products_of_bfloat16():
    """The interpreter holds bfloat16 as 16-bit integers and tl.dot multiplies these (seen in Triton 3.6 and 3.9)."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def widened(self, a, b, *args):
        a, b = (self.create_fp_ext(each, tl.float32) if each.dtype == tl.bfloat16 else each for each in (a, b))
        return create_dot(self, a, b, *args)

    with mock.patch.object(InterpreterBuilder, "create_dot", widened):
        yield
