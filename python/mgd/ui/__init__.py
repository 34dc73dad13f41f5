"""What commands share: their options, the console they print to, and the pages they write.

Import the options (`options`), `Session` and `Reporter` (`console`), and charts and pages (`page`). Looks into `util`.
Importing a module of this room must not import torch: the command line should answer `--help` at once.
"""
