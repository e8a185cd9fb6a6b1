"""The Adversarial Robustness Toolbox, for models whose output is the state of a dynamics after some
time steps."""
