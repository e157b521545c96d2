"""What was found by timing: launch parameters of kernels by operation, shape, dtype and GPU."""
