"""flux-mini-distilled: a LoRA that draws flux-mini's images in four steps, and how it was made."""
