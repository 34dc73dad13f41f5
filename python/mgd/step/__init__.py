"""One training step as a pure function of the step number, the parameters, the buffers and the metaparameters.

Import `StepFunction` and `StepResult` (`step`), `Metaparameters` (`metaparameters`), `Binding` (`model`) and
`starting_state` (`initial_state`). Looks into `mgd_kernels` and `util`.
"""
