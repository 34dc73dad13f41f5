"""Small models on which recipes and benchmarks train: smooth enough to differentiate a training of theirs."""
