"""Measurements, and the README's tables made from them.

``python -m bench`` runs every suite, writes ``bench/results/<suite>.json`` with the environment it
ran in, and regenerates the tables between the markers in README.md. ``python -m bench memory``
runs one suite; ``python -m bench --tables`` only regenerates the tables from committed results.
"""
