"""The three products of a linear layer as equations (arXiv 2304.13013, algorithms 1 to 3).

With X [tokens, in], W [out, in] and G = dL/dY [tokens, out]:

    Y           = X Wᵀ + b    int8
    grad_input  = G W         int8
    grad_weight = Gᵀ X        16 bit: its inner dimension is the tokens, where int8 noise hurts; or int8, both rotated
    grad_bias   = Σ G         float32 accumulation
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _grad_weight
from .config import ROTATIONS, SwitchBackConfig
from .ops import direct as ops
from .ops._library import as_one
from .ops._numerics import quantize_traceably
from .ops._validation import FLOAT_DTYPES, check_device, check_dtype, check_float, check_same_device, check_shape
from .ops.column_sums import sum_columns

Quantized = tuple[torch.Tensor, torch.Tensor]


class Scaling(NamedTuple):
    """What one absmax of the weight covers decides all but the last three; a new scheme is a new row of _SCALINGS."""

    quantize: Callable[[torch.Tensor], Quantized]
    """W -> its codes [out, in] and absmax."""
    quantize_with_transpose: Callable[[torch.Tensor], tuple[Quantized, Quantized]]
    """W -> the same, and the codes of Wᵀ [in, out] and their absmax."""
    quantize_transpose: Callable[[torch.Tensor, torch.Tensor], Quantized]
    """W and the absmax that the forward found -> the codes of Wᵀ [in, out] and their absmax."""
    transpose_codes: Callable[[torch.Tensor, torch.Tensor], Quantized]
    """The same from the codes and absmax of a weight that was quantised for good."""
    matmul: Callable[..., torch.Tensor]
    quantize_input: Callable[[torch.Tensor], Quantized] = ops.quantize_rowwise
    """X [tokens, in] -> its codes and absmax, one a row; and so the next."""
    quantize_grad: Callable[[torch.Tensor], Quantized] = ops.quantize_rowwise
    run: Callable[..., Any] = as_one
    """How a function of the above is called; as one only if they are operations and nothing else."""


def requantize_columnwise(codes: torch.Tensor, absmax: torch.Tensor) -> Quantized:
    """Row-wise codes [out, in] and absmax [out] of W -> the codes of Wᵀ [in, out] and their absmax [in]."""
    return ops.quantize_columnwise_and_transpose(ops.dequantize_rowwise(codes, absmax, torch.float32))


def _quantize_global_with_transpose(weight: torch.Tensor) -> tuple[Quantized, Quantized]:
    codes, codes_t, absmax = ops.quantize_global_with_transpose(weight)
    return (codes, absmax), (codes_t, absmax)


_SCALINGS = {
    "global": Scaling(
        quantize=ops.quantize_global,
        quantize_with_transpose=_quantize_global_with_transpose,
        quantize_transpose=lambda weight, absmax: (ops.quantize_transpose_by_absmax(weight, absmax), absmax),
        transpose_codes=lambda codes, absmax: (codes.t().contiguous(), absmax),
        matmul=ops.int8_matmul_mixed_dequantize,
    ),
    "rowwise": Scaling(
        quantize=ops.quantize_rowwise,
        quantize_with_transpose=lambda weight: (
            ops.quantize_rowwise(weight),
            ops.quantize_columnwise_and_transpose(weight),
        ),
        quantize_transpose=lambda weight, absmax: ops.quantize_columnwise_and_transpose(weight),
        transpose_codes=requantize_columnwise,
        matmul=ops.int8_matmul_rowwise_dequantize,
    ),
}


def _rotating(block: int) -> Scaling:
    """Row-wise scaling of operands that are rotated along each product's inner dimension, which leaves the product."""

    def quantize_rows(x: torch.Tensor) -> Quantized:
        return ops.quantize_rotated_rowwise(x, block)

    def quantize_columns(weight: torch.Tensor, absmax: torch.Tensor | None = None) -> Quantized:
        return ops.quantize_rotated_columnwise_and_transpose(weight, block)

    return _SCALINGS["rowwise"]._replace(
        quantize=quantize_rows,
        quantize_with_transpose=lambda weight: (quantize_rows(weight), quantize_columns(weight)),
        quantize_transpose=quantize_columns,
        quantize_input=quantize_rows,
        quantize_grad=quantize_rows,
    )


_ROTATING_SCALINGS = {block: _rotating(block) for block in ROTATIONS}


def scaling_of(config: SwitchBackConfig) -> Scaling:
    if config.rotate_features is not None:
        return _ROTATING_SCALINGS[config.rotate_features]
    return _SCALINGS[config.weight_scaling]


def quantize_weight(weight: torch.Tensor, config: SwitchBackConfig) -> Quantized:
    """A weight [out, in] quantised for good.

    Returns:
        int8 codes [out, in] and their absmax: (1,) if scaling is global, (out,) if rowwise.

    Raises:
        TypeError: the weight is not float16, bfloat16 or float32.
        ValueError: the config rotates the features: in a state_dict those codes could not be told from plain ones.
    """
    check_float("quantize_weight", "weight", weight)
    if config.rotate_features is not None:
        raise ValueError(
            f"rotate_features={config.rotate_features}: codes of a rotated weight cannot be kept, as nothing would "
            "tell them from plain ones; quantise it for good with a config that has rotate_features=None"
        )
    return scaling_of(config).quantize(weight)


_generation = object()
"""Another one after every optimiser's step: what a step writes through ``.data`` shows in no version counter."""


@functools.cache
def _watch_optimizers() -> None:
    def begin_generation(*_: Any) -> None:
        global _generation
        _generation = object()

    register_optimizer_step_post_hook(begin_generation)


class WeightCache:
    """The codes of one weight, plain and transposed, until it changes."""

    def __init__(self) -> None:
        _watch_optimizers()
        # What tells the weight and its state, an alias of it, and the codes. At once, as threads may share a layer. The
        # alias shares the version counter and keeps the memory, so no other weight can come to lie there.
        self._kept: tuple[tuple[Any, ...], torch.Tensor, tuple[Quantized, Quantized | None]] | None = None

    @staticmethod
    def can_hold(weight: torch.Tensor) -> bool:
        """Whether a weight is one whose changes can be told: a parameter or codes, outside of tracing and capture."""
        return (
            not torch.compiler.is_compiling()
            and (type(weight) is torch.nn.Parameter or weight.dtype == torch.int8)
            and not weight.is_inference()
            and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def get(
        self, weight: torch.Tensor, config: SwitchBackConfig, with_transpose: bool, absmax: torch.Tensor | None = None
    ) -> tuple[Quantized, Quantized | None]:
        """Codes and absmax of W and, with_transpose, of Wᵀ: as last quantised if W has not changed since.

        With absmax W is int8 codes itself: only those of Wᵀ are computed.
        """
        absmax_state = None if absmax is None else (absmax.data_ptr(), absmax._version)
        generation = _generation if weight.requires_grad else None
        stream = torch.cuda.current_stream(weight.device) if weight.is_cuda else None  # another may not have them yet
        state = (weight.data_ptr(), weight._version, weight.dtype, config, absmax_state, generation, stream)
        kept = self._kept
        if kept is not None and kept[0] == state and not (with_transpose and kept[2][1] is None):
            return kept[2]
        kept = self._kept = None  # its memory serves the next
        quantized: tuple[Quantized, Quantized | None]
        with torch.inference_mode(False):  # what an evaluation leaves here must serve the next training step
            scaling = scaling_of(config)
            if absmax is not None:
                quantized = (weight, absmax), scaling.transpose_codes(weight, absmax) if with_transpose else None
            elif with_transpose:
                quantized = scaling.quantize_with_transpose(weight)
            else:
                quantized = scaling.quantize(weight), None
        self._kept = state, weight.detach(), quantized
        return quantized


def switchback_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    config: SwitchBackConfig | None = None,
    *,
    weight_absmax: torch.Tensor | None = None,
    weight_cache: WeightCache | None = None,
) -> torch.Tensor:
    """torch.nn.functional.linear with int8 forward and input-gradient products.

    Args:
        x: (*, in_features), float16, bfloat16 or float32; under autocast it is cast to autocast's dtype.
        weight: [out_features, in_features], float16, bfloat16 or float32 (not necessarily x's dtype); or int8
            codes, with weight_absmax.
        bias: [out_features], float16, bfloat16 or float32, or None.
        config: how the products are computed; the paper's default if None.
        weight_absmax: for an int8 weight its absmax, as a prepared layer's ``weight_absmax``.
        weight_cache: a layer's own, with ``cache_quantized_weight``: where this weight's codes stay until it changes.

    Returns:
        (*, out_features) in x's dtype, or in autocast's.

    Raises:
        TypeError: an argument has another dtype, x is no tensor, a NestedTensor or sparse, or config is something else.
        ValueError: shapes do not match, the arguments are on different devices, or on one that is neither a CPU nor
            CUDA (ROCm's is) nor meta, or the weight is codes and config rotates the features.
        RuntimeError: once its gradients are differentiated again.
    """
    if config is None:
        config = SwitchBackConfig()
    _check_types(x, config)
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and x.dtype in FLOAT_DTYPES:
        x = x.to(torch.get_autocast_dtype(device_type))
    _check(x, weight, bias, weight_absmax, config)
    if _is_distributed(x) or _is_distributed(weight):
        from .distributed import tensor_parallel

        return tensor_parallel.switchback_linear(x, weight, bias, config)
    int8_grad_weight = _grad_weight.runs_in_int8(config, x, weight)
    scaling = scaling_of(config)
    return SwitchBackFunction.apply(x, weight, weight_absmax, bias, config, weight_cache, scaling, int8_grad_weight)


def _is_distributed(x: torch.Tensor) -> bool:
    """Whether x is a DTensor, without importing torch.distributed.tensor for those that are none."""
    return type(x) not in (torch.Tensor, torch.nn.Parameter) and hasattr(x, "device_mesh")


def _check_types(x: torch.Tensor, config: SwitchBackConfig) -> None:
    op = "switchback_linear"
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(f"{op}: x must not be a NestedTensor, got layout {x.layout}; pass its values()")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: x must be dense, got layout {x.layout}")
    if not isinstance(config, SwitchBackConfig):
        raise TypeError(f"{op}: config must be a SwitchBackConfig, got {config!r}")


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weight_absmax: torch.Tensor | None,
    config: SwitchBackConfig,
) -> None:
    op = "switchback_linear"
    check_device(op, "x", x)
    check_float(op, "x", x)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be 2-D, got {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    if weight_absmax is None:
        check_float(op, "weight", weight)
    else:
        check_dtype(op, "weight", weight, torch.int8)
        check_dtype(op, "weight_absmax", weight_absmax, torch.float32)
        check_shape(op, "weight_absmax", weight_absmax, config.scales_of(out_features))
        if config.rotate_features is not None:
            raise ValueError(f"{op}: rotate_features={config.rotate_features} needs a float weight, not codes")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{op}: x must have shape (*, {in_features}) to match weight, got {tuple(x.shape)}")
    if bias is not None:
        check_float(op, "bias", bias)
        check_shape(op, "bias", bias, out_features)
    check_same_device(op, x, weight=weight, bias=bias, weight_absmax=weight_absmax)


class SwitchBackFunction(torch.autograd.Function):
    """Y = X Wᵀ + b whose backward runs grad_input in int8 and grad_weight in the input's dtype or in int8."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_absmax: torch.Tensor | None,
        bias: torch.Tensor | None,
        config: SwitchBackConfig,
        weight_cache: WeightCache | None,
        scaling: Scaling,
        int8_grad_weight: bool,
    ) -> torch.Tensor:
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        x_2d = _as_rows(x)
        operand, absmax, quantized_t = weight, weight_absmax, None
        if weight_cache is not None:
            (operand, absmax), quantized_t = weight_cache.get(weight, config, needs_input, weight_absmax)
        keeps_codes = needs_weight and config.mem_efficient and not int8_grad_weight
        y, absmax, saved_x, x_absmax = scaling.run(
            _output, x_2d, operand, absmax, bias, config, scaling, int8_grad_weight, keeps_codes
        )
        if keeps_codes:
            saved_x = _codes_to_keep(x_2d, saved_x, x_absmax)
        elif needs_weight and not int8_grad_weight:
            saved_x = x_2d
        # Beside its transposed codes the weight is kept for its version: a change before the backward is an error.
        codes_t, absmax_t = (None, absmax) if quantized_t is None else quantized_t
        saved_weight = (weight, absmax_t, codes_t) if needs_input else (None, None, None)
        ctx.save_for_backward(saved_x, x_absmax, *saved_weight)
        ctx.config, ctx.scaling, ctx.int8_grad_weight = config, scaling, int8_grad_weight
        ctx.input_shape, ctx.input_dtype = x.shape, x.dtype
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        # A view that autograd does not know as one: in-place operations on the output stay allowed.
        return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            grad_input, grad_weight, grad_bias = _gradients(ctx, grad_output, saved)
        else:  # create_graph=True
            with torch.no_grad():
                grads = _gradients(ctx, grad_output, saved)
            needs_input, needs_weight, *_ = ctx.needs_input_grad
            # Stands for x, on which grad_weight depends, and of which there may be codes alone.
            x = torch.empty(0, requires_grad=needs_input and needs_weight)
            weight = saved[2]
            grad_input, grad_weight, grad_bias = _DifferentiatedOnce.apply(grad_output, x, weight, *grads)
        return grad_input, grad_weight, None, grad_bias, None, None, None, None


class _DifferentiatedOnce(torch.autograd.Function):
    """Gradients as they are; differentiated again, they raise.

    PyTorch's once_differentiable does so only if the incoming gradient requires one, and drops what x and W contribute.
    """

    @staticmethod
    def forward(
        ctx: Any, grad_output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        return grads

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:
        raise RuntimeError(
            "switchback_linear has no double backward: its gradients (create_graph=True) cannot be differentiated again"
        )


def _gradients(
    ctx: Any, grad_output: torch.Tensor, saved: tuple[Any, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Those of x, weight and bias that are needed, from what the forward saved."""
    saved_x, x_absmax, weight, absmax, codes_t = saved
    needs_input, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
    grad = _as_rows(grad_output)
    int8_grad_weight = needs_weight and ctx.int8_grad_weight
    if needs_input and codes_t is None and weight.dtype == torch.int8:
        codes_t, absmax = ctx.scaling.transpose_codes(weight, absmax)
    weights = (weight, absmax, False) if codes_t is None else (codes_t, absmax, True)
    inputs = (saved_x, x_absmax) if int8_grad_weight else (None, None)
    dtypes = ctx.input_dtype, ctx.weight_dtype, ctx.bias_dtype if needs_bias else None
    grad_input, grad_weight, grad_bias = ctx.scaling.run(
        _gradients_by_operations, grad, *weights, *inputs, *dtypes, ctx.config, ctx.scaling
    )
    if needs_input and len(ctx.input_shape) != 2:
        grad_input = grad_input.view(ctx.input_shape)
    if needs_weight and not int8_grad_weight:
        if x_absmax is not None:
            saved_x = ops.dequantize_rowwise(saved_x, x_absmax, ctx.input_dtype)
        grad_weight = _high_precision_product(grad.t(), saved_x, ctx.weight_dtype)
    return grad_input, grad_weight, grad_bias


def _output(
    x: torch.Tensor,
    weight: torch.Tensor,
    absmax: torch.Tensor | None,
    bias: torch.Tensor | None,
    config: SwitchBackConfig,
    scaling: Scaling,
    int8_grad_weight: bool,
    keeps_codes: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Y from W, or its codes if its absmax is given; that absmax; and codes of X with theirs, for the weight gradient.

    Those are of Xᵀ, maybe rotated, if that is int8_grad_weight, X's own if it keeps_codes, and else two Nones.
    """
    quantized_x: tuple[Any, ...] = _grad_weight.quantize(
        x, config, rowwise=scaling.quantize_input, int8_grad_weight=int8_grad_weight
    )
    codes, row_absmax, *transposed = quantized_x
    weight_codes, absmax = scaling.quantize(weight) if absmax is None else (weight, absmax)
    y = scaling.matmul(codes, weight_codes.t(), row_absmax, absmax, bias, x.dtype)
    return y, absmax, *((codes, row_absmax) if keeps_codes else transposed)


def _gradients_by_operations(
    grad: torch.Tensor,
    weight: torch.Tensor | None,
    absmax: Any,
    is_transposed: bool,
    x_codes_t: torch.Tensor | None,
    x_absmax_t: Any,
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    config: SwitchBackConfig,
    scaling: Scaling,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """That of x from W or, if it is_transposed, the codes of Wᵀ; of W from the codes of Xᵀ; of the bias: as given."""
    grad_input = grad_weight = None
    rowwise = None if weight is None else scaling.quantize_grad
    quantized: tuple[Any, ...] = _grad_weight.quantize(
        grad, config, rowwise=rowwise, int8_grad_weight=x_codes_t is not None
    )
    codes, row_absmax, codes_t, absmax_t = quantized
    if weight is not None:
        weight_t, absmax = (weight, absmax) if is_transposed else scaling.quantize_transpose(weight, absmax)
        grad_input = scaling.matmul(codes, weight_t.t(), row_absmax, absmax, None, input_dtype)
    if x_codes_t is not None:
        grad_weight = ops.int8_matmul_rowwise_dequantize(
            codes_t, x_codes_t.t(), absmax_t, x_absmax_t, None, weight_dtype
        )
    return grad_input, grad_weight, None if bias_dtype is None else _bias_gradient(grad, bias_dtype)


def _codes_to_keep(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """The row-wise codes of x; to torch.compile as PyTorch operations on x, not as the quantiser's output.

    It keeps what an operation returns that it does not know. Its own it repeats in the backward where their input is
    kept anyway or computed from what is, such as a GELU's input; elsewhere it keeps the codes: nothing is smaller.
    """
    # Not is_compiling(), which torch.export is as well: it would record them, though it has no backward. Strict export
    # does record them: what tells it from torch.compile, is_exporting(), is always true under Dynamo in torch 2.11.
    return quantize_traceably(x, absmax[:, None]) if torch.compiler.is_dynamo_compiling() else codes


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """x (*, features) as [tokens, features]. Without -1, which does not say how many rows of no features there are."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _high_precision_product(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """a @ b in the operands' own dtype, accumulated in float32 and rounded once to out_dtype where PyTorch can."""
    if out_dtype == a.dtype:
        return torch.mm(a, b)
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32).to(out_dtype)
    return torch.mm(a, b).to(out_dtype)


def _bias_gradient(grad: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """The sums of the columns of G; to torch.compile PyTorch's, which it fuses with what computes G."""
    return (sum_columns if torch.compiler.is_compiling() else ops.column_sums)(grad, out_dtype)
