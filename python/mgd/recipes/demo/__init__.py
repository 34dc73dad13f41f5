"""Which training images hurt: `mgd demo`."""
