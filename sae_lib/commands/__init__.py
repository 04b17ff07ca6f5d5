"""The commands, one a file: each takes words of the command line, calls the library, and says what it wrote.

What goes wrong is told alike by all of them, by `sae_lib.commands.ending`; `sae_lib.__main__` has their list.
"""
