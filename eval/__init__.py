"""From prompts to images to tables: what the programs and the experiments share."""
