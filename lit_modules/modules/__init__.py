"""LightningModules for language and vision."""
