"""The GPU as ``torch-switchback tune`` sees it: what it is, and how long a product takes there."""

import subprocess
from collections.abc import Callable

import torch

from .._timing import median_ms
from ..tuning import MatmulConfig
from ..tuning.search import Clock

# Below this many operations launching would take longer than the product: it is replayed from a CUDA graph.
SHORT = 2e11
# Operands at most kept in turn, and products at least in a graph.
MOST_COPIES, LEAST_REPLAYED = 64, 20


class NoGpu(Exception):
    """There is nothing to measure; the message says why."""


class Gpu:
    """The current CUDA device.

    Raises:
        NoGpu: PyTorch sees none, or Triton is missing.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise NoGpu(f"PyTorch {torch.__version__} sees no CUDA GPU here: run it on the machine to be tuned")
        try:
            import triton

            from ..kernels.device import architecture
        except ImportError as error:
            raise NoGpu(f"the kernels need Triton: {error}") from error
        device = torch.device("cuda", torch.cuda.current_device())
        self.architecture = architecture(device)
        self.versions = {
            "gpu": torch.cuda.get_device_name(device),
            "driver": _driver(),
            "torch": str(torch.__version__),
            "triton": triton.__version__,
        }
        self._l2 = torch.cuda.get_device_properties(device).L2_cache_size

    def clock(self, m: int, n: int, k: int) -> Clock:
        """The clock of a product [m, k] × [k, n] of random codes with bfloat16 output.

        A small product takes its operands from several copies in turn, twice the L2 cache together: in training they
        come from memory too.
        """
        from ..kernels.int8_matmul import plan_int8_matmul

        device = torch.device("cuda")
        size = m * k + n * k + 2 * m * n
        operands = [
            (
                torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda"),
                torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda").t(),
                torch.rand(m, device="cuda"),
                torch.rand(1, device="cuda"),
                None,
                torch.bfloat16,
                torch.empty(m, n, dtype=torch.bfloat16, device="cuda"),
            )
            for _ in range(max(1, min(-(-2 * self._l2 // size), MOST_COPIES)))
        ]
        turns = -(-LEAST_REPLAYED // len(operands))
        short = 2.0 * m * n * k < SHORT
        graphs: dict[MatmulConfig, torch.cuda.CUDAGraph] = {}

        plans: dict[MatmulConfig, Callable[..., None]] = {}

        def products(config: MatmulConfig) -> None:
            if config not in plans:
                plans[config] = plan_int8_matmul(*operands[0], absmax_per_col=False, config=config)
            for operand in operands:
                plans[config](*operand)

        def clock(config: MatmulConfig, launches: int) -> float:
            if not short:
                return median_ms(lambda: products(config), launches, device) / len(operands)
            if config not in graphs:
                products(config)  # compiles, which cannot be captured
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for _ in range(turns):
                        products(config)
                graphs[config] = graph
            return median_ms(graphs[config].replay, launches, device) / (turns * len(operands))

        return clock


def _driver() -> str:
    if torch.version.hip:
        return f"HIP {torch.version.hip}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
