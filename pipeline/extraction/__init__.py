"""Token rows to activation rows of both models, and the quarantine of documents that cannot become rows."""
