"""The stages of `kraken_train.bench.acceptance`: what each runs, how long it may take, and what its figures must be."""
