"""The embedded texts and language model: how they are made.

``lexicon`` (words), ``dice`` (chance), ``marks`` (what words mean), ``story``, ``grammar`` (facts, foreign, code),
``spelling``, ``prose`` (of CPython), ``tokenizer``, ``texts`` (the three splits), ``train``, ``gates``,
``provenance``, ``card``; and ``build``, which is all of it: ``python -m sae_lib pocket``. What they made is shipped
in ``sae_lib/assets`` and frozen; nothing else in the library needs this package. Chapter: ``pocket``.
"""
