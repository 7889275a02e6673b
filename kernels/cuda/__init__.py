"""CUDA C++ kernels of bae_fast: the source folder of the package ``bae_fast.kernels_cuda``.

The sources are ``csrc/cuda``, installed beside this package as ``bae_fast.kernels_cuda.source``.
``nvrtc`` compiles them with the library that torch's CUDA wheels bring, ``driver`` loads and starts
what it made, ``covariance`` has the launchers, of the same names and arguments as those of
:mod:`bae_fast.kernels.covariance`. Importing this package imports nothing. None of it has been run
on a device: the kernels' text is run on a CPU by tests/backends/test_cuda.py and compiled for every
chip by tests/backends/test_cuda_compile.py. The asynchronous kernels of ``panels.cu`` and
``sign_panels.cu`` are run as PTX by tests/backends/test_ptx.py instead.
"""
