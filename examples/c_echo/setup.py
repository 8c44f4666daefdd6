from setuptools import Extension, setup

server = Extension("_c_echo", ["_c_echo.pyx"])
# Not beside the source, where the C file would only litter.
server.cython_c_in_temp = True

setup(ext_modules=[server])
