"""What people have already: their data sets, loaders and trainers, as a training function takes them.

Looks into the training function and what lies below it. Import `mgd.batches`, and `mgd.integrations.transformers`.
"""
