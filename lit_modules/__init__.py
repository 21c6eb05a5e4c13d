"""LightningModules, callbacks, optimizers and the command line. This file stays light: `tokenformer --help` reads it."""
