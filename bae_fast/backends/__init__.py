"""Implementations of the operators, one folder each; none imports another.

A folder's ``__init__`` registers its backend with :mod:`bae_fast.ops.registry`; importing this
package imports them all, so that nothing else needs to change when a folder is added.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    if _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
