"""Bodies of the operators, which ``impl="triton"`` and ``impl="cuda"`` share.

Those of ``covariance`` and ``encoder_backward`` take the module of kernels for pairs and signs as
first argument: :mod:`bae_fast.kernels.covariance` or :mod:`bae_fast.kernels_cuda.covariance`.
"""
