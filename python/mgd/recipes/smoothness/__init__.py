"""What makes a training smooth enough to follow its metagradients: `mgd recipe smoothness`."""
