"""What a model is worth on a dataset: scorecards, their report, planted defects, calibration."""
