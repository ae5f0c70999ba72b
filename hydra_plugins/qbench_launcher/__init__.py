"""Hydra launcher that takes a whole sweep at once, so that it can be planned before its first point runs."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SweepLauncher(Launcher):
    """Composes every point first, then runs them all in this process (models and texts are shared)."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from qbench.sweep import run_sweep

        loader = self.hydra_context.config_loader
        configs = [loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides]
        code = run_sweep(configs)
        if code:
            raise SystemExit(code)
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=0) for _ in configs]
