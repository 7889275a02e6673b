"""The entropy of sets of vectors, read off a binary code.

``synthetic``  sets of known entropy: estimate against truth
``layers``     a language model's layers and token positions
``icl``        the last prompt token as demonstrations are added
``rows``       the user's own rows

Each writes ``<name>.json``, ``<name>.csv`` and ``<name>.png`` into ``config.out`` and keeps every
run in a file of its own, so that it can be taken up again. What an earlier call left in
``config.out`` stays in the three files beside what this one adds.
"""
