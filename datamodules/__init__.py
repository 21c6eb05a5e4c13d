"""Lightning data modules: text. Knows nothing of models. Import the modules themselves: this file stays light."""
