"""LightningModules, callbacks, optimizers and the command line. Stays light: `tokenformer --help` reads it."""
