"""
Imported before transformers, this silences what other libraries log as they are imported: which parts of theirs do not
load on this machine is of no concern to who reads a text. Our own warnings stay.
"""

import logging


for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
