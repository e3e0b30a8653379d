/* The functions of the CUDA driver that kernels/_driver.py and _repeat.c call, by the declarations of cuda.h, and a
   launch as Triton's: of one kernel, whose parameters are a descriptor, an address and a number. It is noted, not run. */

#include <string.h>
#include <unistd.h>

#include "cuda.h"

static const size_t SIZES[] = {sizeof(CUtensorMap), sizeof(CUdeviceptr), sizeof(int)};
enum { PARAMETERS = sizeof(SIZES) / sizeof(SIZES[0]) };

typedef struct {
    CUfunction function;
    unsigned int grid[3], block[3], shared_bytes;
    CUstream stream;
    unsigned int attribute, value;
    unsigned char parameters[PARAMETERS][sizeof(CUtensorMap)];
} Launch;

/* What the test reads: launches that were no capture's, how many of two addresses that are not next to each other, how
   often a descriptor got an address, and what is alive. */
Launch launched[8];
int launches, apart, readdressed, streams, graphs, mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
/* What it sets: the number of the launch that fails, whether descriptors get no address, and a full queue, in which a
   launch waits before it looks at what it was given. */
int operations_a_launch = 1, failing_launch = -1, failing_readdress;
volatile int is_full, waiting;

static Launch captured;
static int capturing, nodes;
static void *pointers[PARAMETERS];

CUresult cuStreamCreate(CUstream *stream, unsigned int flags) {
    if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    *stream = (CUstream)0x57000;
    streams++;
    return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
    streams--;
    return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *other) {
    CUstreamCaptureMode before = mode;
    mode = *other;
    *other = before;
    return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode with) {
    if (with != CU_STREAM_CAPTURE_MODE_RELAXED || mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    capturing = 1, nodes = 0;
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    capturing = 0;
    *graph = (CUgraph)0x62000;
    graphs++;
    return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph graph) {
    if (mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    memset(&captured, 0xff, sizeof(captured)); /* parameters are the graph's */
    graphs--;
    return CUDA_SUCCESS;
}

CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode *into, size_t *count) {
    for (size_t i = 0; i < *count; i++) into[i] = i < (size_t)nodes ? (CUgraphNode)(0x60000 + i) : NULL;
    if (*count > (size_t)nodes) *count = nodes;
    return CUDA_SUCCESS;
}

CUresult cuGraphKernelNodeGetParams(CUgraphNode node, CUDA_KERNEL_NODE_PARAMS *params) {
    if (node != (CUgraphNode)0x60000) return CUDA_ERROR_INVALID_VALUE;
    memset(params, 0, sizeof(*params));
    params->func = captured.function;
    params->gridDimX = captured.grid[0], params->gridDimY = captured.grid[1], params->gridDimZ = captured.grid[2];
    params->blockDimX = captured.block[0], params->blockDimY = captured.block[1], params->blockDimZ = captured.block[2];
    params->sharedMemBytes = captured.shared_bytes;
    for (int i = 0; i < PARAMETERS; i++) pointers[i] = captured.parameters[i];
    params->kernelParams = pointers;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t *offset, size_t *size) {
    if (function != (CUfunction)0xf0000 || index >= PARAMETERS) return CUDA_ERROR_INVALID_VALUE;
    *offset = 0, *size = SIZES[index];
    return CUDA_SUCCESS;
}

CUresult cuTensorMapReplaceAddress(CUtensorMap *map, void *address) {
    if (failing_readdress) return CUDA_ERROR_INVALID_CONTEXT;
    readdressed++;
    memcpy(map, &address, sizeof(address));
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    while (!capturing && is_full) waiting = 1, usleep(1000);
    if (!capturing && launches == failing_launch) return CUDA_ERROR_INVALID_CONTEXT;
    Launch *launch = capturing ? &captured : &launched[launches % 8];
    memset(launch, 0, sizeof(*launch));
    launch->function = function;
    launch->grid[0] = config->gridDimX, launch->grid[1] = config->gridDimY, launch->grid[2] = config->gridDimZ;
    launch->block[0] = config->blockDimX, launch->block[1] = config->blockDimY, launch->block[2] = config->blockDimZ;
    launch->shared_bytes = config->sharedMemBytes;
    launch->stream = config->hStream;
    if (config->numAttrs > 0) {
        launch->attribute = config->attrs[0].id;
        launch->value = config->attrs[0].value.programmaticStreamSerializationAllowed;
    }
    for (int i = 0; i < PARAMETERS; i++) memcpy(launch->parameters[i], parameters[i], SIZES[i]);
    CUdeviceptr described, address;
    memcpy(&described, parameters[0], sizeof(described)), memcpy(&address, parameters[1], sizeof(address));
    if (capturing) nodes++;
    else launches++, apart += described - address != 1 && address - described != 1;
    return CUDA_SUCCESS;
}

void launch_as_triton(void *described, CUdeviceptr address, int number) {
    CUtensorMap map;
    memset(&map, 0x11, sizeof(map));
    memcpy(&map, &described, sizeof(described));
    void *parameters[] = {&map, &address, &number};
    CUlaunchConfig config = {7, 5, 3, 128, 2, 1, 4096, (CUstream)0x57000, NULL, 0};
    for (int i = 0; i < operations_a_launch; i++) cuLaunchKernelEx(&config, (CUfunction)0xf0000, parameters, NULL);
}
