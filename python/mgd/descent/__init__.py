"""Metagradient descent: `MetaDescent`, with its constraints and outer optimizers.

Import `MetaDescent` and `Descent` (`descent`), `Box` and `Simplex` (`constraints`), and `SignDescent`
(`sign_descent`). Looks into `mgd.function`, `mgd.results`, `step` and `util`.
"""
