#!/usr/bin/env python3
"""By how many standard errors the mean reward of a run's last five steps exceeds that of its first five.

usage: reward_rise.py RUN/metrics.jsonl

With the steps' mean rewards r and the sample variance s² of each five:
(mean(last) - mean(first)) / sqrt((s²(first) + s²(last)) / 5). Needs nothing but Python.
"""

import json
import sys
from pathlib import Path
from statistics import mean, variance

ENDS = 5


def main() -> int:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    rewards = [line["reward/all/mean"] for line in lines]
    first, last = rewards[:ENDS], rewards[-ENDS:]
    error = ((variance(first) + variance(last)) / ENDS) ** 0.5
    print(json.dumps({
        "steps": len(rewards),
        "first": mean(first),
        "last": mean(last),
        "standard_error": error,
        "standard_errors": (mean(last) - mean(first)) / error,
    }))
    return 0


if __name__ == "__main__":
    sys.exit(main())
