"""Faster layers for a CPU. Other packages use `tune_for_cpu` only."""

from __future__ import annotations

from ldm_cli.core.cpu.tune import tune_for_cpu as tune_for_cpu
