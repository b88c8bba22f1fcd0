"""ComfyUI nodes that sample with an H2-Cache plan. ComfyUI reads the two mappings when it starts."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
