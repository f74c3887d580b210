"""
Tools around `modeling_infini`: `infini_transformers.conversion` and `infini_transformers.evaluation`, and the console
command `infini`, which is also `python -m infini_transformers`.
"""

from pathlib import Path


__version__ = "0.2.0"

# In a clone, conversion/ and evaluation/ stand beside this folder, not in it.
if not (Path(__file__).parent / "conversion").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))
