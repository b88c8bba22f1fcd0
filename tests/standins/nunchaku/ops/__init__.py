"""What the kernels compute and refuse."""
