"""CUDA sources of bae_fast, which NVRTC compiles: the package ``bae_fast.kernels_cuda.source``."""
