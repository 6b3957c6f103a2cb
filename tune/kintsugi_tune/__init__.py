"""Search over experiment configs with Ray Tune."""
