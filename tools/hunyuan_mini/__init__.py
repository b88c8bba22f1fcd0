"""hunyuan-mini: data, training and export of the embedded HunyuanVideo model. Needs requirements-dev.txt."""
