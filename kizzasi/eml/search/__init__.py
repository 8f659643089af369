"""Search without gradients, for any module.

minimize      run an optimiser on a budget
objective     `ModuleObjective`: any module's loss as a function of its flat parameters
rows          `output_rows`: an EML attention layer as one problem per output channel
coordinate    `CoordinateDescent`, eml-core's trainer, and `BlockDescent`, the default for a loss
gauss_newton  `GaussNewton`, the default for residuals
pattern       `PatternSearch`
evolution     `AntitheticES`, `Spsa`, `SeparableCma`
optimizer     what an optimiser is, and the random numbers of all of them
"""
