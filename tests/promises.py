"""What is promised, row by row; a test says which row it shows with ``@pytest.mark.promise(row, …)``.

docs/reliability.md is made from this list and from what the tests came to (reliability.py).
"""

from dataclasses import dataclass

NO_KERNEL = "no kernel takes part"
NO_COMPILER = "the interpreter compiles nothing"
CPU_COMPILES_NOTHING = "the CPU compiles nothing"
ONE_DEVICE = "there is one device"
GPU_MEMORY = "memory of a GPU"
TOO_LARGE = "matrices of 2048³"
ONLY_FAKES = "the dispatcher's business, not the kernel's"
DRAWN = "drawn inputs run on the CPU"
KERNELS_ONLY = "no kernel runs"
KERNELS_ONLY_GPU = "compute-sanitizer watches a GPU"


@dataclass(frozen=True)
class Promise:
    """A row of the page. What does not apply says why."""

    name: str
    outcome: str
    cpu: str | None = None
    interpreter: str | None = None
    h200: str | None = None


P = Promise

PROMISES: dict[str, list[Promise]] = {
    "Bitwise": [
        P("codes and absmax", "every quantiser gives the bits of its CPU meaning"),
        P("output and grad_input", "the same bits on the CPU, in the interpreter and on the GPU"),
        P("every tile configuration", "the same bits", cpu="the CPU has no tiles"),
        P("any position in the batch", "the same bits, alone, permuted or split"),
        P("run to run", "the same bits"),
        P(
            "no fused multiply-add",
            "products and sums are rounded by themselves",
            interpreter="NumPy fuses none",
            h200="read from the compiled code, without a GPU",
        ),
        P("int8 grad_weight", "the same bits as on the CPU; if rotated, to a code in a thousand of its operands"),
    ],
    "Hostile inputs": [
        P(
            "NaN or ±Inf at X[i,k] or G[i,k]",
            "row i of the matching outputs non-finite, no other row; with a frozen weight and with mem_efficient too",
        ),
        P("GradScaler", "skips a step with NaN or Inf"),
        P("NaN in W", "everything non-finite (global), its output column (rowwise)"),
        P("zero row, tensor or weight", "exactly 0 (+ bias), never NaN"),
        P("row absmax 1e-30 or 1e30", "signal to noise within 0.1 dB of the unscaled row, float32 and bfloat16"),
        P("absmax below 2⁻¹²¹", "codes 0: 127 / absmax would overflow"),
        P("fp16 result above 65,504", "Inf as nn.Linear gives; finite in bfloat16 and float32"),
        P(
            "fp64, complex, integer, mismatched dtype, device or shape",
            "TypeError or ValueError that names the argument, also under -O",
            interpreter="refused before a kernel is called",
        ),
        P("slices, transposes, expanded, storage offsets", "bitwise equal to .contiguous()"),
        P("no tokens; 1-D, 2-D, 3-D, 4-D x; in or out of 1; primes", "nn.Linear's shapes; zero gradients of nothing"),
        P("inner dimension 133,144 / 133,145 / 262,144, all ±127", "exact, in all three products"),
        P("rows of 1,048,577", "exact"),
        P("≥ 2³¹ elements", "exact", cpu="PyTorch's own indexing", interpreter="it would take hours"),
        P(
            "tensor on cuda:1 while cuda:0 is current",
            "works; the current device is unchanged",
            cpu=ONE_DEVICE,
            interpreter=ONE_DEVICE,
        ),
        P("W edited in place between forward and backward", "PyTorch's version-counter error"),
        P("a second backward without retain_graph; double backward", "RuntimeError"),
        P(
            "no GPU, no Triton",
            "imports, builds, trains on the CPU, loads and saves",
            interpreter="it is Triton",
            h200="there is a GPU",
        ),
        P(
            "train(), eval(), prepare_for_eval(), in any order",
            "the state is right and reversible",
            interpreter=NO_KERNEL,
        ),
        P("casts of a prepared layer", "leave its absmax in float32", interpreter=NO_KERNEL),
        P("a NaN beside transposed codes", "corrupts no neighbour (triton issue 11111)"),
    ],
    "Bad state": [
        P(
            "prepared into unprepared, and the reverse",
            "loads, and the layer becomes what was loaded",
            interpreter=NO_KERNEL,
        ),
        P("prepared by bitsandbytes", "an error that says so, the layer unchanged", interpreter=NO_KERNEL),
        P(
            "truncated, of another dtype, shape or type",
            "an error that names it, the layer unchanged",
            interpreter=NO_KERNEL,
        ),
        P(
            "checkpoints of examples and commands",
            "read as tensors alone, never as programs",
            interpreter=NO_KERNEL,
            h200=NO_KERNEL,
        ),
    ],
    "Faults": [
        P(
            "out of memory in the middle of a forward",
            "OutOfMemoryError; then everything as before",
            interpreter=GPU_MEMORY,
        ),
        P(
            "a product's kernel that does not compile",
            "a plainer one runs, and says so once",
            cpu=CPU_COMPILES_NOTHING,
        ),
        P(
            "an operation of which nothing compiles, or no Triton beside a GPU",
            "the same bits in plain PyTorch, and says so once",
            interpreter=NO_COMPILER,
        ),
        P("a corrupt or read-only Triton cache", "is passed by, and said so once", interpreter=NO_COMPILER),
        P("8 processes on a cold cache", "all compute the same", cpu=CPU_COMPILES_NOTHING, interpreter=NO_COMPILER),
        P(
            "fork and spawn DataLoader workers",
            "train, and may quantise themselves",
            interpreter="workers run on the CPU",
        ),
        P(
            "an exception inside a saved-tensor hook",
            "reaches the caller; then everything as before",
            interpreter=NO_KERNEL,
        ),
        P(
            "CUDA-graph capture after warm-up",
            "replays what eager computes; nothing is compiled or tuned",
            cpu="no CUDA graphs",
            interpreter="no CUDA graphs",
        ),
        P("a token count that changes every step", "at most one compile a power of two", interpreter=NO_COMPILER),
    ],
    "Properties, on inputs that hypothesis draws": [
        P("|codes| ≤ 127, within half a step", "of the exact value", interpreter=DRAWN, h200=DRAWN),
        P(
            "output within the sum of all roundings",
            "½·s_w·‖x‖₁ + ½·s_x·‖w‖₁ + ¼·K·s_x·s_w + the output's rounding",
            interpreter=DRAWN,
            h200=DRAWN,
        ),
        P("int8 grad_weight within the sum of all roundings", "likewise", interpreter=DRAWN, h200=DRAWN),
        P("a power of two", "leaves the codes"),
        P("permuting or splitting rows", "permutes or splits the output", interpreter=DRAWN, h200=DRAWN),
        P("fused transpose", "equals quantise then .t()"),
        P("any stride layout", "equals contiguous", interpreter=DRAWN, h200=DRAWN),
        P("the int8 product", "equals the int64 one"),
        P("the NaN mask", "equals the reference's", interpreter=DRAWN, h200=DRAWN),
    ],
    "Signal to noise, 2048³ in bfloat16 against float64; the worst 1 % of rows at most 5 dB below the gate": [
        P("output, Gaussian", "≥ 36.4 dB (global), 38.1 dB (rowwise)", interpreter=TOO_LARGE),
        P("output, LayerNorm's outputs", "≥ 34.4 dB, 35.4 dB", interpreter=TOO_LARGE),
        P("output, after GELU", "≥ 35.0 dB, 36.2 dB", interpreter=TOO_LARGE),
        P("grad_input, tokens log-normal σ=2", "≥ 36.5 dB, 38.2 dB", interpreter=TOO_LARGE),
        P("output, Student t₃", "≥ 25.7 dB, 26.0 dB", interpreter=TOO_LARGE),
        P("output, 0.1 % of channels × 50", "≥ 19.0 dB, 19.0 dB", interpreter=TOO_LARGE),
        P("16-bit grad_weight", "within 0.5 dB of PyTorch's product of the same operands", interpreter=TOO_LARGE),
        P(
            "int8 grad_weight, tokens log-normal σ=2",
            "≥ 34.9 dB, with 0.1 % of X's channels × 50 ≥ 34.1 dB; ≥ 33 dB for every rotation",
            interpreter=TOO_LARGE,
        ),
    ],
    "PyTorch": [
        P("opcheck", "every operation × dtype × layout", interpreter=ONLY_FAKES),
        P("torch.compile(fullgraph=True)", "under aot_eager and inductor equal to eager", interpreter=ONLY_FAKES),
        P("export", "with a dynamic batch", interpreter=ONLY_FAKES),
        P("20 batch sizes", "at most 2 recompiles", interpreter=ONLY_FAKES),
        P("meta initialisation", "and to_empty", interpreter=NO_KERNEL),
        P("inference_mode", "the same output"),
        P("autocast", "casts as nn.Linear's", interpreter=ONLY_FAKES),
        P("checkpointing (both modes), save_on_cpu", "the same gradients"),
        P("X after the backward", "freed; with int8 codes after the forward", interpreter=NO_KERNEL),
        P("what the backward keeps", "X in 16 bit or in int8, and no copy of the weight", interpreter=NO_KERNEL),
        P("nn.Linear's state_dict", "loads into the layer and back, strict", interpreter=NO_KERNEL, h200=NO_KERNEL),
        P("conversion", "keeps parameters, hooks and keys, and is undone", interpreter=NO_KERNEL, h200=NO_KERNEL),
    ],
    "Memory of a GPU": [
        P("guard bands", "nothing is read beyond an operand or written beyond an output", cpu=KERNELS_ONLY),
        P("memcheck", "0 reports; a planted fault is reported", cpu=KERNELS_ONLY, interpreter=KERNELS_ONLY_GPU),
        P(
            "racecheck",
            "0 reports but of Triton's own hand-over between warps; a planted race is reported",
            cpu=KERNELS_ONLY,
            interpreter=KERNELS_ONLY_GPU,
        ),
        P(
            "initcheck",
            "0 reports, products' outputs being written before; a planted read is reported",
            cpu=KERNELS_ONLY,
            interpreter=KERNELS_ONLY_GPU,
        ),
        P("synccheck", "0 reports", cpu=KERNELS_ONLY, interpreter=KERNELS_ONLY_GPU),
        P("steps, one after the other", "allocate no more", cpu=KERNELS_ONLY, interpreter=KERNELS_ONLY_GPU),
        P(
            "soak",
            "random steps, out of memory provoked between: all within their bounds, memory flat",
            interpreter="it would take hours",
        ),
    ],
    "What is installed": [
        P(
            "the wheel",
            "holds the package alone, installs and imports without Triton",
            interpreter=NO_KERNEL,
            h200=NO_KERNEL,
        ),
        P("the order of layers", "is the one in architecture.md", interpreter=NO_KERNEL, h200=NO_KERNEL),
        P(
            "importing",
            "imports neither Triton nor what takes longer than the package",
            interpreter=NO_KERNEL,
            h200=NO_KERNEL,
        ),
    ],
}
