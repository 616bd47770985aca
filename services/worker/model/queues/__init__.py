"""How batches get to where the model computes and tokens from there, without waiting."""
