/* Runs code in a new subinterpreter: a legacy one, which shares the GIL with the main
   interpreter, or one with a GIL of its own. */
#include <Python.h>

int run_in_subinterpreter(const char *code, int own_gil)
{
    PyThreadState *caller = PyThreadState_Get(), *tstate = NULL;
    int result;
    if (!own_gil)
        tstate = Py_NewInterpreter();
#if PY_VERSION_HEX >= 0x030C0000
    else {
        PyInterpreterConfig config = {
            .allow_threads = 1,
            .check_multi_interp_extensions = 1,
            .gil = PyInterpreterConfig_OWN_GIL,
        };
        if (PyStatus_Exception(Py_NewInterpreterFromConfig(&tstate, &config)))
            tstate = NULL;
    }
#endif
    if (!tstate)
        return -1;
    result = PyRun_SimpleString(code);
    Py_EndInterpreter(tstate);
    PyThreadState_Swap(caller);
    return result;
}
