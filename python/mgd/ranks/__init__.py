"""One training on several processes: who evaluates which microbatches, and who owns which range of the flat buffers.

Import `ranks_of` (`processes`), `Ranks` (`ranks`), `Shards` and `shards_of` (`shards`), `Blocks` (`blocks`), `Layout`
and `layouts` (`layout`), and `SharedDirectory` (`directory`). Looks into `util` and `mgd_kernels`. Only `processes`
knows `torch.distributed`. No collective is ever differentiated: a step's VJP is explicit, and is cut into work per rank
like the step itself.
"""
