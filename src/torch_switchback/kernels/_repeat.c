/* What a function did, done again for other tensors: memory allocated, kernels launched by the CUDA driver.

   Trace.through_triton says the same in Python, which through Triton takes several times as long as the driver does, and
   longer still where the interpreter's own code has left the processor's caches, as it has in autograd's thread.
   _repeat.py makes what it is given and has Triton compile it, which needs a C compiler itself. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* The structures are those of _repeat.py, their fields in its order. */

typedef struct {
    void *place;    /* an address's, or a descriptor */
    int64_t number; /* which of the given goes there */
} Slot;

typedef struct {
    void *config, *function, **parameters;
    Slot *addresses, *descriptors;
    int64_t address_count, descriptor_count;
} Launch;

typedef struct {
    PyObject *function; /* to be called with a list of the tensors, or NULL: launches */
    Launch *launches;
    int64_t launch_count;
} Step;

typedef struct {
    int (*enqueue_kernel)(const void *config, void *function, void **parameters, void **extra);
    int (*replace_address)(void *descriptor, void *address);
    Step *steps;
    PyObject *allocators; /* a tuple of functions that return a tensor each */
    int64_t *offsets;     /* in the last of these tensors, of what lies in it */
    int64_t *results;     /* each the number of a tensor, or -1 for None */
    PyObject **tensors;   /* the arguments, then what is allocated */
    uint64_t *given;      /* to the launches: the arguments' addresses, the allocated tensors', those in the last; a stream */
    uint64_t *next;       /* what they are to be given */
    int64_t step_count, arg_count, tensor_count, offset_count, result_count, given_count;
    int32_t is_single, is_given;
    char is_busy;
} Plan;

static PyObject *data_ptr; /* the method's name */

static int to_address(PyObject *number, uint64_t *address)
{
    *address = number == Py_None ? 0 : PyLong_AsUnsignedLongLong(number);
    return !(*address == (uint64_t)-1 && PyErr_Occurred());
}

static int allocate(Plan *plan, PyObject *args, PyObject *addresses, PyObject *stream)
{
    uint64_t *next = plan->next, address = 0;
    int64_t i = 0;
    for (; i < plan->arg_count; i++) {
        plan->tensors[i] = Py_NewRef(PyTuple_GET_ITEM(args, i));
        if (!to_address(PyList_GET_ITEM(addresses, i), next++)) return 0;
    }
    for (; i < plan->tensor_count; i++) {
        plan->tensors[i] = PyObject_CallNoArgs(PyTuple_GET_ITEM(plan->allocators, i - plan->arg_count));
        if (plan->tensors[i] == NULL) return 0;
        PyObject *number = PyObject_CallMethodNoArgs(plan->tensors[i], data_ptr);
        int is_known = number != NULL && to_address(number, &address);
        Py_XDECREF(number);
        if (!is_known) return 0;
        *next++ = address;
    }
    for (i = 0; i < plan->offset_count; i++) *next++ = address + plan->offsets[i];
    return to_address(stream, next);
}

static int give(Plan *plan)
{
    size_t size = plan->given_count * sizeof(uint64_t);
    if (plan->is_given && memcmp(plan->given, plan->next, size) == 0) return 1;
    plan->is_given = 0; /* until the last is */
    memcpy(plan->given, plan->next, size);
    for (Step *step = plan->steps; step < plan->steps + plan->step_count; step++)
        for (Launch *launch = step->launches; launch < step->launches + step->launch_count; launch++) {
            Slot *slot = launch->addresses;
            for (; slot < launch->addresses + launch->address_count; slot++)
                *(uint64_t *)slot->place = plan->given[slot->number];
            for (slot = launch->descriptors; slot < launch->descriptors + launch->descriptor_count; slot++)
                if (plan->replace_address(slot->place, (void *)plan->given[slot->number])) return 0;
        }
    return plan->is_given = 1;
}

/* The driver's error, and how many launches came before it. */
static int enqueue(Plan *plan, Step *step, int64_t *launched)
{
    int error = 0;
    Py_BEGIN_ALLOW_THREADS; /* as a full queue makes the driver wait */
    for (*launched = 0; *launched < step->launch_count && !error; *launched += !error) {
        Launch *launch = &step->launches[*launched];
        error = plan->enqueue_kernel(launch->config, launch->function, launch->parameters, NULL);
    }
    Py_END_ALLOW_THREADS;
    return error;
}

static int call(Plan *plan, PyObject *function)
{
    PyObject *tensors = PyList_New(plan->tensor_count);
    if (tensors == NULL) return 0;
    for (int64_t i = 0; i < plan->tensor_count; i++) PyList_SET_ITEM(tensors, i, Py_NewRef(plan->tensors[i]));
    PyObject *nothing = PyObject_CallOneArg(function, tensors);
    Py_DECREF(tensors);
    Py_XDECREF(nothing);
    return nothing != NULL;
}

static PyObject *result(Plan *plan, int64_t i)
{
    return Py_NewRef(plan->results[i] < 0 ? Py_None : plan->tensors[plan->results[i]]);
}

static PyObject *results(Plan *plan)
{
    if (plan->is_single) return result(plan, 0);
    PyObject *tuple = PyTuple_New(plan->result_count);
    for (int64_t i = 0; tuple != NULL && i < plan->result_count; i++) PyTuple_SET_ITEM(tuple, i, result(plan, i));
    return tuple;
}

static PyObject *run(Plan *plan, PyObject *args, PyObject *addresses, PyObject *stream)
{
    if (!allocate(plan, args, addresses, stream)) return NULL;
    if (!give(plan)) Py_RETURN_NOTIMPLEMENTED;
    for (int64_t i = 0; i < plan->step_count; i++) {
        Step *step = &plan->steps[i];
        if (step->function != NULL) {
            if (!call(plan, step->function)) return NULL;
            continue;
        }
        int64_t launched;
        int error = enqueue(plan, step, &launched);
        if (error && i + launched == 0) Py_RETURN_NOTIMPLEMENTED;
        if (error) return PyErr_Format(PyExc_RuntimeError, "cuLaunchKernelEx failed with CUDA's error %d", error);
    }
    return results(plan);
}

/* repeat(plan, args, addresses, stream): a plan's address; a tuple, and a list of its tensors' addresses.

   What the function returned; or NotImplemented, and nothing has happened, while the plan is in use elsewhere and where
   the driver refuses the first of the launches. */
static PyObject *repeat(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    Plan *plan = count == 4 ? PyLong_AsVoidPtr(args[0]) : NULL;
    if (plan == NULL || !PyTuple_Check(args[1]) || PyTuple_GET_SIZE(args[1]) != plan->arg_count ||
        !PyList_Check(args[2]) || PyList_GET_SIZE(args[2]) != plan->arg_count)
        return PyErr_Format(PyExc_TypeError, "repeat: not a plan and its arguments");
    if (__atomic_test_and_set(&plan->is_busy, __ATOMIC_ACQUIRE)) Py_RETURN_NOTIMPLEMENTED;
    PyObject *returned = run(plan, args[1], args[2], args[3]);
    for (int64_t i = 0; i < plan->tensor_count; i++) Py_CLEAR(plan->tensors[i]);
    __atomic_clear(&plan->is_busy, __ATOMIC_RELEASE);
    return returned;
}

static PyMethodDef methods[] = {{"repeat", (PyCFunction)(void (*)(void))repeat, METH_FASTCALL, NULL}, {NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "torch_switchback_repeat", NULL, -1, methods};

PyMODINIT_FUNC PyInit_torch_switchback_repeat(void)
{
    data_ptr = PyUnicode_InternFromString("data_ptr");
    return data_ptr == NULL ? NULL : PyModule_Create(&definition);
}
