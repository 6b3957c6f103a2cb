"""Images in, samples out: layouts of others, degradations, Parquet datasets, training crops."""
