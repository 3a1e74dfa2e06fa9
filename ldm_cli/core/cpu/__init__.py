"""Faster ways to compute a model on a CPU, behind one door: `tune_for_cpu`."""

from __future__ import annotations

from ldm_cli.core.cpu.tune import tune_for_cpu as tune_for_cpu
