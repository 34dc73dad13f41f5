"""What all commands share: their options, their console, and the pages and JSON files that they write.

Import options and how their words are read (`options`), `Session` and `Reporter` (`console`), `Page` and `Section`
(`page`), the look of the pictures (`charts`), and what the machine is (`machine`). Looks into `util` and, to describe
the machine, into `mgd_kernels`. No module here may import torch when it is imported: `--help` should answer at once.
"""
