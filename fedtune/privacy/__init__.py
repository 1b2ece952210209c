"""One module per concern: per-sample gradients, clipping, noise, the privacy plan, accounting, calibration."""
