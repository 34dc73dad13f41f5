"""Shares of text sources by metagradients, in reverse and in forward mode, beside a grid: `mgd recipe mixture`."""
