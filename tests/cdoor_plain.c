/* A client of ioloop's C-level door in plain C, for test_cdoor.py: the functions are
 * capsules in `ioloop.__pyx_capi__`, each named by its signature.  PyCapsule_GetPointer
 * checks that, so that a client of another ioloop fails here and not later. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <unistd.h>

typedef int (*handler)(PyObject *loop, int fd, uint32_t events, void *arg);

#define ADD_HANDLER "int (PyObject *, int, uint32_t, " \
                    "__pyx_t_6ioloop_ioloop_handler_v1, void *, PyObject *)"
#define REMOVE_HANDLER "int (PyObject *, int)"

static int (*add_handler)(PyObject *, int, uint32_t, handler, void *, PyObject *);
static int (*remove_handler)(PyObject *, int);

static void *imported(PyObject *functions, const char *name, const char *signature)
{
    PyObject *capsule = PyDict_GetItemString(functions, name);
    if (capsule == NULL) {
        PyErr_Format(PyExc_ImportError, "ioloop has no C function %s", name);
        return NULL;
    }
    return PyCapsule_GetPointer(capsule, signature);
}

/* Echoes until the end, then removes itself. */
static int on_ready(PyObject *loop, int fd, uint32_t events, void *arg)
{
    char data[100];
    ssize_t n = read(fd, data, sizeof(data));
    (void)events;
    *(int *)arg += 1;
    if (n > 0)
        return write(fd, data, n) == n ? 0 : (PyErr_SetFromErrno(PyExc_OSError), -1);
    return remove_handler(loop, fd);
}

static int calls;

static PyObject *serve(PyObject *self, PyObject *args)
{
    PyObject *loop;
    int fd;
    (void)self;
    if (!PyArg_ParseTuple(args, "Oi", &loop, &fd)
            || add_handler(loop, fd, 1, on_ready, &calls, Py_None) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *count(PyObject *self, PyObject *args)
{
    (void)self, (void)args;
    return PyLong_FromLong(calls);
}

static PyMethodDef methods[] = {
    {"serve", serve, METH_VARARGS, NULL},
    {"count", count, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "cdoor_plain", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_cdoor_plain(void)
{
    PyObject *ioloop = PyImport_ImportModule("ioloop"), *functions;
    if (ioloop == NULL)
        return NULL;
    functions = PyObject_GetAttrString(ioloop, "__pyx_capi__");
    Py_DECREF(ioloop);
    if (functions == NULL)
        return NULL;
    *(void **)&add_handler = imported(functions, "c_add_handler", ADD_HANDLER);
    if (add_handler != NULL)
        *(void **)&remove_handler = imported(functions, "c_remove_handler",
                                             REMOVE_HANDLER);
    Py_DECREF(functions);
    return remove_handler != NULL ? PyModule_Create(&module) : NULL;
}
