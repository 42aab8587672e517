"""The groups of settings of a training; `kraken_train.config` puts them together."""
