"""The linear layer as a function: checks, autocast, and the autograd Function (arXiv 2304.13013, algorithms 1 to 3).

With X [tokens, in], W [out, in] and G = dL/dY [tokens, out]:

    Y           = X Wᵀ + b    int8
    grad_input  = G W         int8
    grad_weight = Gᵀ X        16 bit, as its inner dimension is the tokens, where int8 noise hurts; or int8, rotated
    grad_bias   = Σ G         float32 accumulation
"""

import math
from typing import Any, NamedTuple

import torch

from . import extensions
from .config import SwitchBackConfig, config_of
from .ops._numerics import quantize_traceably
from .ops._validation import (
    DEVICE_TYPES,
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_float,
    check_same_device,
    check_shape,
)
from .scaling import Quantized, Scaling, scaling_for
from .weight_cache import WeightCache

DYNAMO_KNOWS_EXPORTS = torch.__version__ >= "2.13"
"""True if ``torch.compiler.is_exporting`` is exact in Dynamo, which traces strict exports. In older versions it is
always true there, in torch.compile as well."""

_PLAIN = torch.Tensor, torch.nn.Parameter

Transposed = tuple[torch.Tensor, torch.Tensor | None]
"""The transpose of an int8 weight, int8 [in, out], and its absmax, or None if that is the weight's."""


class Prepared(NamedTuple):
    """Hold what a prepared layer has besides the int8 values of its weight."""

    absmax: torch.Tensor
    """Absmax of the weight: float32, (1,) or (out_features,)."""
    transposed: Transposed | None = None
    """None if it is not kept."""


def quantize_weight(weight: torch.Tensor, config: SwitchBackConfig) -> Quantized:
    """Quantize a weight for good, for a layer that keeps no other.

    Args:
        weight: [out, in], float16, bfloat16 or float32.
        config: how it is scaled.

    Returns:
        int8 values [out, in], of a layer that rotates its features in whole blocks of them; and their absmax: (1,) if
        scaling is global, (out,) if rowwise.

    Raises:
        TypeError: the weight has another dtype.
    """
    check_float("quantize_weight", "weight", weight)
    return _quantize(scaling_for(config, weight), weight)


def _quantize(scheme: Scaling, weight: torch.Tensor) -> Quantized:
    try:
        return scheme.quantize_weight(weight)
    except NotImplementedError as error:  # of a tensor subclass, such as torchao's quantize_ puts in a weight's place
        raise NotImplementedError(
            f"SwitchBackLinear cannot compute with a weight of class {type(weight).__name__}: "
            "revert_switchback(model) makes its layers nn.Linear, with the weights they have"
        ) from error


def switchback_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    config: SwitchBackConfig | str | None = None,
) -> torch.Tensor:
    """Apply torch.nn.functional.linear with int8 matmuls for the output and the input's gradient.

    Args:
        x: (*, in_features), float16, bfloat16 or float32; under autocast it is cast to autocast's dtype.
        weight: [out_features, in_features], float16, bfloat16 or float32, not necessarily x's dtype.
        bias: [out_features], float16, bfloat16 or float32, or None.
        config: a SwitchBackConfig, or the name of a recipe; the paper's default if None.

    Returns:
        (*, out_features) in x's dtype, or in autocast's.

    Raises:
        TypeError: an argument has another dtype, x is no tensor, a NestedTensor or sparse, or config is something else.
        ValueError: shapes do not match; the arguments are on different devices, or on one that is neither a CPU nor
            CUDA (ROCm included) nor meta; or there is no recipe of that name.
        RuntimeError: once its gradients are differentiated again.
        NotImplementedError: it is called under a transform of torch.func.
    """
    return linear(x, weight, bias, SwitchBackConfig() if config is None else config_of(config))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: SwitchBackConfig,
    prepared: Prepared | None = None,
    weight_cache: WeightCache | None = None,
) -> torch.Tensor:
    """Apply :func:`switchback_linear` with the state that a layer has besides its parameters.

    Args:
        prepared: of a weight that is int8 itself.
        weight_cache: holds the int8 values of a float weight until that changes.
    """
    weight_absmax, transposed = (None, None) if prepared is None else prepared
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"switchback_linear: x must be a tensor, got {type(x).__name__}")
    tracing = torch._C._get_tracing_state()  # of torch.jit.trace, which cannot save an autograd Function
    if not tracing:  # it warns of every comparison; the operation below checks, too
        check(x, weight, bias, weight_absmax, config)
        if config.min_tokens and weight_absmax is None and has_few_tokens(x, weight, config.min_tokens):
            return _high_precision_linear(x, weight, bias)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        refuse_transforms()
    x = autocast_input(x)
    if type(x) not in _PLAIN or type(weight) not in _PLAIN:
        if hasattr(x, "device_mesh") or hasattr(weight, "device_mesh"):  # a DTensor, whose module may not be loaded
            return extensions.distributed.linear(x, weight, bias, config)
    if tracing or _is_exporting():
        flags = config.weight_scaling, config.mem_efficient, config.grad_weight
        rotations = config.rotate_tokens, config.rotate_features
        return torch.ops.torch_switchback.linear(x, weight, weight_absmax, bias, *flags, *rotations)
    call = Call(config, weight_cache, None, has_int8_grad_weight(config, weight))
    return SwitchBackFunction.apply(x, weight, weight_absmax, *(transposed or (None, None)), bias, call)


def _is_exporting() -> bool:
    return torch.compiler.is_exporting() and (DYNAMO_KNOWS_EXPORTS or not torch.compiler.is_dynamo_compiling())


def has_int8_grad_weight(config: SwitchBackConfig, weight: torch.Tensor) -> bool:
    """Return whether the forward keeps x's int8 values for an int8 weight gradient."""
    return config.grad_weight == "int8" and weight.requires_grad and torch.is_grad_enabled()


def has_few_tokens(x: torch.Tensor, weight: torch.Tensor, min_tokens: int) -> bool:
    """Return whether a call is too small for int8. Weights that are gathered as int8, and DTensors, never are."""
    if type(weight) not in _PLAIN or (type(x) not in _PLAIN and hasattr(x, "device_mesh")):
        return False
    tokens = x.shape[:-1].numel()
    if torch.compiler.is_compiling() or isinstance(tokens, torch.SymInt):
        # A program for any number of tokens takes int8. Comparing a symbolic number would make it one for few.
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes a second to import

        return not _is_exporting() and statically_known_true(tokens < min_tokens)
    return tokens < min_tokens


def _high_precision_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return nn.Linear's output, with weight and bias cast to x's dtype as autocast would."""
    dtype = x.dtype
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        device_type = x.device.type
        if device_type == "meta" or not torch.is_autocast_enabled(device_type):
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return torch.nn.functional.linear(x, weight, bias)


def refuse_transforms() -> None:
    """Raise NotImplementedError: a transform of torch.func is active."""
    raise NotImplementedError(
        "switchback_linear: transforms of torch.func (grad, vmap, jvp, …) cannot pass SwitchBackLinear; "
        "revert_switchback(model) makes its layers nn.Linear"
    )


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """Return x in autocast's dtype if autocast is on for its device, as it is for nn.Linear, else x itself."""
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and x.dtype in FLOAT_DTYPES:
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weight_absmax: torch.Tensor | None,
    config: SwitchBackConfig,
) -> None:
    """Raise if the arguments do not fit. What fits costs no function call: it is CPU time of every forward."""
    op = "switchback_linear"
    if weight is None:
        raise TypeError(f"{op}: weight must be a tensor, got None")
    if x.is_nested:
        raise TypeError(f"{op}: x must not be a NestedTensor, got layout {x.layout}; pass its values()")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: x must be dense, got layout {x.layout}")
    device = x.device
    if device.type not in DEVICE_TYPES:
        check_device(op, "x", x)
    if x.dtype not in FLOAT_DTYPES:
        check_float(op, "x", x)
    if weight.layout != torch.strided:
        raise TypeError(f"{op}: weight must be dense, got layout {weight.layout}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be 2-D, got {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    if weight_absmax is not None:
        check_dtype(op, "weight", weight, torch.int8)
        check_dtype(op, "weight_absmax", weight_absmax, torch.float32)
        check_shape(op, "weight_absmax", weight_absmax, config.scales_of(out_features))
        check_same_device(op, x, weight_absmax=weight_absmax)
        block = config.rotate_features
        if block is not None and x.dim() and -(-x.shape[-1] // block) * block == in_features:
            in_features = x.shape[-1]  # zeros fill the last block
    elif weight.dtype not in FLOAT_DTYPES:
        check_float(op, "weight", weight)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{op}: x must have shape (*, {in_features}) to match weight, got {tuple(x.shape)}")
    if weight.device != device:
        check_same_device(op, x, weight=weight)
    if bias is not None:
        if bias.dtype not in FLOAT_DTYPES:
            check_float(op, "bias", bias)
        if bias.shape != (out_features,):
            check_shape(op, "bias", bias, out_features)
        if bias.device != device:
            check_same_device(op, x, bias=bias)


class Call(NamedTuple):
    """Hold what a call of the autograd Function takes besides tensors."""

    config: SwitchBackConfig
    weight_cache: WeightCache | None
    """Cache of the weight's int8 values, or None."""
    scaling: Scaling | None
    """None for the config's own; tensor-parallel layers bring another."""
    int8_grad_weight: bool


class SwitchBackFunction(torch.autograd.Function):
    """Y = X Wᵀ + b whose backward computes grad_input in int8 and grad_weight in the input's dtype or in int8."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_absmax: torch.Tensor | None,
        transposed_int8: torch.Tensor | None,
        transposed_absmax: torch.Tensor | None,
        bias: torch.Tensor | None,
        call: Call,
    ) -> torch.Tensor:
        """Compute the output (*, out) from x (*, in), weight [out, in] and bias [out].

        An int8 weight needs weight_absmax. Its transpose, for the backward, is optional.
        """
        config, weight_cache, scaling, int8_grad_weight = call
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        scheme = scaling_for(config, x, weight, bias) if scaling is None else scaling
        x_2d = _as_rows(x)
        saved_x: torch.Tensor | None
        x_absmax: torch.Tensor | None
        if int8_grad_weight:
            x_int8, row_absmax, saved_x, x_absmax = scheme.quantize_rows_and_columns(x_2d, config.rotate_tokens)
        else:
            x_int8, row_absmax = scheme.quantize_input(x_2d)
            saved_x, x_absmax = x_2d if needs_weight else None, None
            if needs_weight and config.mem_efficient:
                saved_x, x_absmax = _int8_to_keep(x_2d, x_int8, row_absmax), row_absmax

        if weight_cache is None and _fuses(scheme, weight):
            y, absmax = scheme.ops.int8_linear(x_int8, row_absmax, weight, bias, scheme.rowwise, x.dtype)
        else:
            if weight_absmax is not None:
                weight_int8, absmax = weight, weight_absmax
            elif weight_cache is not None:
                (weight_int8, absmax), transposed = weight_cache.get(weight, config, needs_input)
                if transposed is not None:
                    transposed_int8, transposed_absmax = transposed
            else:
                weight_int8, absmax = _quantize(scheme, weight)
            y = scheme.matmul(x_int8, weight_int8.t(), row_absmax, absmax, bias, x.dtype)

        if needs_input:
            # The weight is saved also beside its transposed int8 values, so that changing it before backward raises.
            saved_weight = (weight, absmax if transposed_absmax is None else transposed_absmax, transposed_int8)
            ctx.save_for_backward(saved_x, x_absmax, *saved_weight)
        else:
            ctx.save_for_backward(saved_x, x_absmax, None, None, None)
        ctx.call = call
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # no gradient of the output is none of the weight, and no zeros
        ctx.input_shape = x.shape
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        # A view that autograd does not know as one, so that in-place operations on the output stay allowed.
        return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of x, weight and bias that are needed."""
        if grad_output is None:
            return (None,) * 7
        saved = ctx.saved_tensors
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            grad_input, grad_weight, grad_bias = _gradients(ctx, grad_output, saved)
        else:  # create_graph=True
            with torch.no_grad():
                grads = _gradients(ctx, grad_output, saved)
            needs_input, needs_weight, *_ = ctx.needs_input_grad
            # Stands for x, on which grad_weight depends. Only x's int8 values may be left.
            x = torch.empty(0, requires_grad=needs_input and needs_weight)
            weight = saved[2]
            grad_input, grad_weight, grad_bias = _DifferentiatedOnce.apply(grad_output, x, weight, *grads)
        return grad_input, grad_weight, None, None, None, grad_bias, None


class _DifferentiatedOnce(torch.autograd.Function):
    """Pass gradients through, and raise when they are differentiated again.

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
    """Return the gradients of x, weight and bias, or None where none is needed."""
    saved_x, x_absmax, weight, absmax, transposed_int8 = saved
    needs_input, needs_weight, needs_bias = _asked_for(ctx)
    config, _, scaling, int8_grad_weight = ctx.call
    input_dtype, weight_dtype, bias_dtype = ctx.dtypes
    grad = _as_rows(grad_output)
    scheme = scaling_for(config, grad, weight) if scaling is None else scaling
    int8_grad_weight = needs_weight and int8_grad_weight
    is_prepared = needs_input and weight.dtype == torch.int8
    grad_input = grad_weight = grad_bias = None

    if int8_grad_weight and needs_input:
        grad_int8, row_absmax, columns_int8, column_absmax = scheme.quantize_rows_and_columns(
            grad, config.rotate_tokens
        )
    elif int8_grad_weight:
        columns_int8, column_absmax = scheme.quantize_columns(grad, config.rotate_tokens)
    elif needs_input and not is_prepared:
        grad_int8, row_absmax = scheme.quantize_grad(grad)

    if is_prepared:
        in_features = ctx.input_shape[-1]
        grad_input = scheme.prepared_grad_input(grad, weight, absmax, transposed_int8, in_features, input_dtype)
    elif needs_input and transposed_int8 is None and _fuses(scheme, weight):
        grad_input = scheme.ops.int8_linear_grad_input(
            grad_int8, row_absmax, weight, absmax, scheme.rowwise, input_dtype
        )
    elif needs_input:
        if transposed_int8 is None:
            transposed_int8, absmax = scheme.quantize_weight_transpose(weight, absmax)
        grad_input = scheme.matmul(grad_int8, transposed_int8.t(), row_absmax, absmax, None, input_dtype)
    if grad_input is not None and len(ctx.input_shape) != 2:
        grad_input = grad_input.view(ctx.input_shape)
    if int8_grad_weight:
        grad_weight = scheme.ops.int8_matmul_rowwise_dequantize(
            columns_int8, saved_x.t(), column_absmax, x_absmax, None, weight_dtype
        )
    elif needs_weight:
        if x_absmax is not None:
            saved_x = scheme.ops.dequantize_rowwise(saved_x, x_absmax, input_dtype)
        grad_weight = _high_precision_matmul(grad.t(), saved_x, weight_dtype)
    if needs_bias:
        grad_bias = sum_rows(grad, bias_dtype)
    return grad_input, grad_weight, grad_bias


def _asked_for(ctx: Any) -> tuple[bool, bool, bool]:
    """Return whether this backward needs the gradients of x, weight and bias.

    ``torch.autograd.grad(y, x)`` needs no other gradient than that of x, which ``needs_input_grad`` does not say.
    Pipeline schedules that split the backward call it so.
    """
    needs_input, needs_weight, *_, needs_bias, _ = ctx.needs_input_grad
    if torch.compiler.is_compiling():
        return needs_input, needs_weight, needs_bias
    edges = ctx.next_functions  # of x, weight, weight_absmax, the transpose, and bias, as far as given
    needs_input = needs_input and _engine_runs(edges[0][0])
    needs_weight = needs_weight and _engine_runs(edges[1][0])
    # A call takes about 1 µs. With the weight's gradient the bias's is a small sum more.
    needs_bias = needs_bias and (needs_weight or _engine_runs(edges[-1][0]))
    return needs_input, needs_weight, needs_bias


def _engine_runs(node: Any) -> bool:
    """Return whether autograd's engine runs a node in the backward under way."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient autograd.grad returns, or there is no backward under way
        return True


def _fuses(scheme: Scaling, weight: torch.Tensor) -> bool:
    """Return whether the weight is quantized within the matmul's operation."""
    return scheme.is_fused and weight.dtype != torch.int8 and type(weight) in _PLAIN


def _int8_to_keep(x: torch.Tensor, x_int8: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Return the int8 values of x; for torch.compile as PyTorch operations on x, not as the quantizer's output.

    The compiler keeps what an operation returns that it does not know. PyTorch's own operations it repeats in the
    backward where their input is kept anyway, such as a GELU's input. Elsewhere it keeps the int8 values.
    """
    # Not is_compiling(), which torch.export is as well: it would record them, though it has no backward. Strict export
    # does record them: what tells it from torch.compile, is_exporting(), is always true under Dynamo in torch 2.11.
    return quantize_traceably(x, absmax[:, None]) if torch.compiler.is_dynamo_compiling() else x_int8


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x (*, features) as [tokens, features]."""
    # Without -1, which does not say how many rows of no features there are.
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _high_precision_matmul(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return a @ b in the operands' dtype, accumulated in float32 and rounded once to out_dtype where PyTorch can."""
    if out_dtype == a.dtype:
        return torch.mm(a, b)
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32).to(out_dtype)
    return torch.mm(a, b).to(out_dtype)


def sum_rows(x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return the sum [cols] of the rows of x [rows, cols], accumulated in float32 and rounded once to out_dtype."""
    if x.dtype == out_dtype:
        return x.sum(0)  # PyTorch accumulates 16-bit sums in float32
    return x.sum(0, dtype=torch.float32).to(out_dtype)
