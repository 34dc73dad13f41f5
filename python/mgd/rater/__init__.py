"""Learning to rate training examples (DataRater, arXiv 2505.17895).

Import `DataRater` (`data_rater`). Looks into `mgd.function`, `mgd.results`, `step` and `util`.
"""
