"""What the model reads: Python's own documentation, so that everybody has it and nothing is downloaded.

The help topics of `pydoc_data` and the docstrings of the standard library's modules, found in their source without
importing them. They change a little from one Python to the next, and with them the numbers of the example.
"""

import ast
import os
from pathlib import Path
from pydoc_data.topics import topics

DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def docstrings(source):
    """Every docstring of a module, in order."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def documentation():
    """All of it, as bytes."""
    parts = [topics[name] for name in sorted(topics)]
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        parts += docstrings(file.read_text(encoding="utf-8", errors="replace"))
    return "\n\n".join(parts).encode()
