"""The pipelines that are drawn with, and what is known of the machine."""
