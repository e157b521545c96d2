"""From a trained model to a small one: formats, calibration, and what both cost."""
