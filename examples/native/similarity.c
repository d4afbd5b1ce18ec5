/* similarity.distance(a, b): how many characters must be inserted, deleted or replaced to get from a to b.
 *
 * What a function needs to run beside the hub and beside its own kind:
 *   1. take from Python's objects what it needs, in memory of its own;
 *   2. let go of the GIL, and touch no object of Python's until it has it again;
 *   3. make of the result an object.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Levenshtein's, row by row; costs has room for one row. */
static Py_ssize_t
measure(const Py_UCS4 *a, Py_ssize_t size_a, const Py_UCS4 *b, Py_ssize_t size_b, Py_ssize_t *costs)
{
    for (Py_ssize_t j = 0; j <= size_b; j++) {
        costs[j] = j;
    }
    for (Py_ssize_t i = 0; i < size_a; i++) {
        Py_ssize_t diagonal = costs[0];
        costs[0] = i + 1;
        for (Py_ssize_t j = 0; j < size_b; j++) {
            Py_ssize_t replaced = diagonal + (a[i] != b[j]);
            Py_ssize_t deleted = costs[j + 1] + 1;
            Py_ssize_t inserted = costs[j] + 1;
            diagonal = costs[j + 1];
            Py_ssize_t least = deleted < inserted ? deleted : inserted;
            costs[j + 1] = replaced < least ? replaced : least;
        }
    }
    return costs[size_b];
}

static PyObject *
distance(PyObject *module, PyObject *args)
{
    PyObject *first, *second, *result = NULL;
    if (!PyArg_ParseTuple(args, "UU:distance", &first, &second)) {
        return NULL;
    }
    Py_ssize_t size_a = PyUnicode_GET_LENGTH(first), size_b = PyUnicode_GET_LENGTH(second);
    /* 1. Copies: the caller may drop its strings while we are at it. */
    Py_UCS4 *a = PyUnicode_AsUCS4Copy(first);
    Py_UCS4 *b = PyUnicode_AsUCS4Copy(second);
    Py_ssize_t *costs = PyMem_New(Py_ssize_t, size_b + 1);
    if (costs == NULL) {
        PyErr_NoMemory();
    }
    if (a != NULL && b != NULL && costs != NULL) {
        Py_ssize_t found;
        /* 2. */
        Py_BEGIN_ALLOW_THREADS
        found = measure(a, size_a, b, size_b, costs);
        Py_END_ALLOW_THREADS
        /* 3. */
        result = PyLong_FromSsize_t(found);
    }
    PyMem_Free(costs);
    PyMem_Free(b);
    PyMem_Free(a);
    return result;
}

static PyMethodDef functions[] = {
    {"distance", distance, METH_VARARGS,
     "distance(a, b, /)\n--\n\nHow many edits lead from one string to the other. Runs without the GIL."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "similarity",
    .m_doc = "Functions that let go of the GIL.",
    .m_methods = functions,
};

PyMODINIT_FUNC
PyInit_similarity(void)
{
    return PyModuleDef_Init(&module);
}
