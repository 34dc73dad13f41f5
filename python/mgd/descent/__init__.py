"""Descending on metaparameters: `MetaDescent`, with its constraints and outer optimizers.

Import `MetaDescent`, `Descent` (`descent`), `Box`, `Simplex` (`constraints`) and `SignDescent` (`sign_descent`). Looks
into `mgd.function`, `mgd.results` and `util`.
"""
