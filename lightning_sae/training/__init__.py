"""What every training run shares: optimizer, lengths of its parts, resuming, refusals."""
