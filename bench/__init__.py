"""Measurements, and the documents' tables made from them.

``python -m bench`` (``make bench``) runs the suites that measure speed and memory, writes
``bench/results/<suite>.json`` with the environment it ran in, and regenerates the tables between
the markers in README.md and docs/ (``documents.py``). ``python -m bench step --only rectangle-512``
tries a few cases and writes nothing; ``--tables`` only regenerates the tables from committed
results; ``recipe`` and ``ablation``, which train, run by name.

| file | what |
|---|---|
| ``eager.py`` | the paper's program in plain PyTorch, as it is, under autocast, compiled |
| ``exact.py`` | float64 and integers that every side is checked against before it is timed |
| ``inputs.py``, ``timing.py`` | random inputs; checks, turns, medians, peaks, the roofline |
| ``ceilings.py``, ``ceiling.cpp`` | what the machine can do at best |
| ``step.py``, ``operators.py`` | whole steps; every operator |
| ``levels.py``, ``memory.py`` | the covariance by instruction set; peak memory of a step |
| ``rival.py`` | the recipe's step beside that of a plain TopK autoencoder |
| ``sparse.py``, ``lists.cpp`` | the covariance of sparse codes beside a floor program |
| ``crossover.py`` | where lists of ones and bits take the same time |
| ``pairs.py`` | counts of pairs of columns, and the estimates that stand on them |
| ``recipe.py``, ``ablation.py`` | what training reaches, and what each part of it is worth |
| ``wide.py`` | the start's share of ones in wide dictionaries |
| ``supply.py``, ``jobs.py`` | where rows come from, and who shares them |
| ``collect.py`` | the tokens that go to each feature |
| ``launches.py``, ``compiled.py`` | of GPUs without one: what a step starts, its machine code |
| ``estimate.py`` | the time of a step on a GPU by arithmetic |
| ``device/`` | on a GPU: what is right, then times, kept case by case |
| ``models.py`` | real language models: loads, and what runs inside them, beside their own |
| ``saebench.py`` | SAEBench's core evaluation of what is trained here |
| ``versions.py``, ``abi.py`` | a wheel tried with given versions; what its symbols ask for |
| ``test_*.py`` | the same comparisons under pytest: tiny and untimed, or with |
| | ``pytest bench --benchmark-enable`` at full size by pytest-benchmark, a side at a time |
"""

from bench import checkout

checkout.use()
