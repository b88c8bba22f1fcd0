"""From prompts to images and videos on disk, each drawn once."""
