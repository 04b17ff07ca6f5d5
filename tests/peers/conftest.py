"""The other libraries are not installed beside the tests: `bench` and `parity` run their files where they are."""

collect_ignore = ["sae_lens.py", "dictionary_learning.py", "sparsify.py", "overcomplete.py", "sae_bench.py"]
