"""Values that are logged in every step, without checks that the first call has passed."""

from typing import Any

from torch import Tensor


class Logged:
    """What `log` was called with, so that a repeated call can be shortened.

    Lightning's `log` checks its arguments and moves 24 attributes of the metric to the device, each
    time: 0.3 ms a value and 2 ms a step, where a step of a small SAE takes 15 (one thread). With
    the same arguments and for a metric that it has made, all of this has no effect, and the value
    is given to the metric. It needs two private attributes of Lightning, and without them
    every call is a whole one.
    """

    def __init__(self) -> None:
        self._calls: dict[str, tuple[Any, dict[str, Any]]] = {}

    def again(self, trainer: Any, fx: str | None, name: str, value: Any, how: Any) -> bool:
        """Log a value as before in the same hook. Returns False if a whole call is needed."""
        key = f"{fx}.{name}"
        if key not in self._calls or not isinstance(value, Tensor):
            return False
        metric, before = self._calls[key]
        if before != how:
            return False
        connector, results = trainer._logger_connector, trainer._results
        is_same = results is not None and results.get(key) is metric
        if not is_same or connector.should_reset_tensors(fx):
            return False
        if metric.value.device != value.device:
            return False
        metric.forward(value.detach(), 1)
        metric.has_reset = False
        return True

    def note(self, trainer: Any, fx: str | None, name: str, how: dict[str, Any]) -> None:
        """Remember a whole call, if the value is of this step alone."""
        if not hasattr(getattr(trainer, "_logger_connector", None), "should_reset_tensors"):
            return
        results = getattr(trainer, "_results", None)
        metric = None if results is None else results.get(f"{fx}.{name}")
        if metric is not None and metric.meta.on_step and not metric.meta.on_epoch:
            self._calls[f"{fx}.{name}"] = metric, how

    def __getstate__(self) -> dict[str, Any]:
        return Logged().__dict__  # the metrics belong to a trainer
