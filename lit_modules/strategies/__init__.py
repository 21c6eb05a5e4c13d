"""Training on several devices: FSDP2, sharding, and what each strategy needs when a model grows."""
