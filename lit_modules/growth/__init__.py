"""Growth of a module's model: when, how, and what is remembered of it."""
