"""A daemon that does so many times as often what it does from time to time.

    python -m bench.hurried run …

What a quiet daemon costs is lost in what else a machine does; of this one it can be seen.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from unittest.mock import patch

from stalld import cli, netwatch, service, upkeep
from stalld.config import Config

FACTOR = 100


class Hurried(netwatch.NetWatch):
    """Looks at counters sooner than a configuration may say."""

    def apply(self, config: Config) -> None:
        """Go by other settings from now on."""
        softnet = replace(config.softnet, interval_s=config.softnet.interval_s / FACTOR)
        super().apply(replace(config, softnet=softnet))


if __name__ == "__main__":
    with (
        patch.object(service, "NetWatch", Hurried),
        patch.object(netwatch, "SURVEY_EVERY_S", netwatch.SURVEY_EVERY_S / FACTOR),
        patch.object(upkeep, "LEARN_EVERY_S", upkeep.LEARN_EVERY_S / FACTOR),
    ):
        sys.exit(cli.main())
