"""The other libraries are not installed beside the tests: their files are run by `bench`, each where its library is."""

collect_ignore = ["sae_lens.py", "dictionary_learning.py", "sparsify.py", "overcomplete.py"]
