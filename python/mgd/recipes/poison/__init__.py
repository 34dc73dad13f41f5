"""How much a few perturbed training images cost, and which checks find them: `mgd recipe poison`."""
