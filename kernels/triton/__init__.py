"""Triton kernels of bae_fast: the source folder of the package ``bae_fast.kernels``.

``kernels/`` itself has no ``__init__.py``: as a top-level package it would shadow the published
package ``kernels``, which transformers imports.
"""
