"""Drops what libraries write to stderr (warnings, paths of this machine) from the outputs of all notebooks here."""

from pathlib import Path

import nbformat


for file in Path(__file__).parent.glob("*.ipynb"):
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, file)
