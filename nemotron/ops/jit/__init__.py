"""What kernels for CPUs share that numba compiles: their arithmetic, threads, and kept code."""
