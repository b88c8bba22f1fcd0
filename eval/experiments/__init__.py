"""From configs/experiment to a folder of results."""
