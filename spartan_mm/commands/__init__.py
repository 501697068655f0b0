"""What ``spartan-mm`` can do, a file for each word; see ``spartan_mm/cli.py``.

A command is its docstring, which ``--help`` shows, an example first; ``add_arguments(parser)``; and
``run(args)``, which returns None, or 1 if what it looked for is wrong. An ``ExplainedError`` ends
it in a line. Flags of the same meaning have the same name in all of them, see ``arguments.py``.
"""
