"""The commands of `tokenformer`, one file each, and what they share."""
