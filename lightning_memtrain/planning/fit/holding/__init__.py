"""What a plan holds for: model, versions and batches, and who stops another run."""
