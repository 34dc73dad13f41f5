"""A learning-rate schedule by metagradients, beside searches: `mgd recipe lr-schedule`."""
