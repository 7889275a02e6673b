"""Triton kernels of bae_fast: the source folder of the package ``bae_fast.kernels``.

``kernels/`` itself has no ``__init__.py``: as a top-level package it would shadow the published
package ``kernels``, which transformers imports.

Importing this package imports nothing; its modules import triton. One file a piece of the step,
each with its mathematics, its kernels and their launchers; ``launch`` starts every kernel and
``configs`` holds the tile sizes. None of it has been run on a device.
"""
