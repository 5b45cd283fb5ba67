"""Records the metrics of a run, and copies them to MLflow."""
