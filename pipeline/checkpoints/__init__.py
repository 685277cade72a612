"""Published crosscoders of other people: read into our tensors, and written so that their tools can read ours."""
