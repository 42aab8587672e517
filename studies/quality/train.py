"""Trains a model of the study: python -m studies.quality.train, with the settings of kraken_train.train.

`+model.NAME=VALUE` sets what `variant_config` adds, with model.architecture=kraken-variant.
"""

from __future__ import annotations

from kraken_train.train import main
from studies.quality.variant_config import register

if __name__ == "__main__":
    register()
    main()
