"""Text generation with cached attention, convolution and state-space states."""
