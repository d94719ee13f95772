"""Files on disk to numpy batches: annotations, decoding, prompts, collation and the input pipeline."""
