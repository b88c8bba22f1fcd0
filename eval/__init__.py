"""From prompts to images to tables: what the programs and the experiments share."""

import importlib
import sys

# In a clone, `import eval` gives h2cache.eval (h2cache/clone.py). Imported as h2cache.eval, this changes nothing.
sys.modules[__name__] = importlib.import_module("h2cache.eval")
