"""What text is worth training on, learned by metagradients: `mgd recipe rate`."""
