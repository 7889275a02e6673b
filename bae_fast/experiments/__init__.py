"""The experiments behind the commands: each a frozen configuration and ``run(config)``.

Example::

    from bae_fast.experiments import compare

    result = compare.run(compare.Config(methods=("bae", "topk"), steps=200))
    print(result.text)

A configuration's fields are the command's options. :func:`run` writes its files into
``config.out`` and returns a :class:`bae_fast.experiments.runs.Result`.
"""
