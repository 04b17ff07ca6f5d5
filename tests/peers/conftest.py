"""The other libraries are not installed beside the tests: `bench` and `parity` run their files where they are."""

from peers.parity import LIBRARIES

collect_ignore = ["sae_lens.py", "dictionary_learning.py", "sparsify.py", "overcomplete.py"]
collect_ignore += [f"{library}.py" for library in LIBRARIES]
