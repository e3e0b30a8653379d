"""These tests run kernels on CPU tensors, which Triton does when TRITON_INTERPRET=1 is set before it is imported.

Every other test wants compiled kernels, so ``make test`` runs this folder in a process of its own.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
