"""Complete uses of metagradients, each a function and a command: `mgd demo`, `mgd recipe ...`."""
