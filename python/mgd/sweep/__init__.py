"""The two sweeps: training forward while log and snapshots are kept, then the adjoint backward.

Import `Sweep` (`sweep`), `open_storage` (`storage`) and `TrainedObjective` (`adjoint`). Looks into `plan`, `step`
and `util`, never into `autodiff`: a sweep is handed a step that knows its own derivatives.
"""
