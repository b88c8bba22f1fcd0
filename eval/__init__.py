"""From prompts to images to tables: what the programs and the experiments share."""

import importlib
import logging
import sys

# diffusers imports bitsandbytes and torchao where they are installed, which warn of what nobody asked for: kept off the
# terminal here, since the processes that draw have no program that could do it.
for noisy in ("bitsandbytes", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

# In a clone, `import eval` gives h2cache.eval (h2cache/clone.py). Imported as h2cache.eval, this changes nothing.
sys.modules[__name__] = importlib.import_module("h2cache.eval")
