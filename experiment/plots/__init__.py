"""Figures: functions from results to a Matplotlib figure, in one style (`style`)."""
