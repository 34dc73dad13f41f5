"""Attribution: the exact influence of every training example on every query (MAGIC, arXiv 2504.16430).

Import `attribute` (`attribute`) and `Attribution` (`result`). Looks into `mgd.function`, `mgd.results` and `util`.
"""
